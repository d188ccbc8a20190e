// The settings of the next request. Shows the fields that the chosen model has, with the server's ranges and defaults.
import { html, useState } from "./vendor/preact-htm.js";
import { EMBEDDED_MODEL, EMPTY, has, modelOf, rangeOf, sizesOf, toBody } from "./fields.js";
import { generate } from "./requests.js";
import { app, notify, setSettings, update, useApp } from "./state.js";
import { toDataUrl } from "./store.js";
import { text } from "./text.js";
import { Field, FileButton, Range, Segments, Select, inputOf } from "./ui.js";

const { fields } = text;

/** The body of the request in the form; null, with a sentence at the prompt, without a prompt. */
export function bodyOfForm() {
  const model = modelOf(app);
  const body = toBody(app.settings, model, (app.health?.models ?? []).length > 1);
  if (body.prompt.trim()) return body;
  update({ errors: { ...app.errors, prompt: text.needsPrompt } });
  document.getElementById("f-prompt")?.focus();
  return null;
}

/** The fields of an edit in addition: the strength, and the size of the input image if none is chosen. */
export function editBody(body) {
  const { strength } = app.settings;
  return strength === "" ? body : { ...body, strength: Number(strength) };
}

export function submit() {
  const body = bodyOfForm();
  if (!body) return;
  const { settings, source, tab } = app;
  update({ errors: {} });
  // On a phone the images are below the form.
  if (matchMedia("(max-width: 860px)").matches) document.getElementById("images")?.scrollIntoView({ block: "start" });
  if (tab === "edit" && source) generate(editBody(body), { source: source.blob, mask: source.mask });
  else generate(body);
  if (settings.seedMode === "increment" && settings.seed !== "") {
    setSettings({ seed: String(BigInt(settings.seed) + BigInt(settings.n)) });
  }
}

export function Form({ showCode }) {
  const { settings, errors, tab, health, source } = useApp();
  const model = modelOf(app);
  const set = (name) => (value) => setSettings({ [name]: value });
  const range = (name, step) => html`<${Range} name=${name} errors=${errors} value=${settings[name]} step=${step}
    ...${rangeOf(app, name)} fallback=${model.defaults[name]} onChange=${set(name)} />`;
  const prompt = (name, rows, hint) => html`<${Field} name=${name} errors=${errors}>
    <textarea ...${inputOf(name, errors)} rows=${rows} placeholder=${hint} value=${settings[name]}
      onInput=${(event) => setSettings({ [name]: event.target.value })}></textarea>
  <//>`;
  const models = health?.models ?? [];
  const schedules = model.schedules[settings.sampler] ?? [];
  const named = (names) => [["", text.modelDefault], ...names.map((name) => [name, name])];
  return html`<form class="panel" aria-label=${text.tabs[tab]} onSubmit=${(event) => (event.preventDefault(), submit())}>
    <div class="scroll">
      ${prompt("prompt", 3, text.promptHint)}
      ${model.id === EMBEDDED_MODEL && html`<${Examples} />`}
      ${has(model, "negative_prompt") && prompt("negative_prompt", 2, text.negativeHint)}
      ${models.length > 1 &&
      html`<${Select} name="model" errors=${errors} value=${model.id} options=${models.map(({ id }) => [id, id])} onChange=${set("model")} />`}
      ${tab === "edit" && html`<${Range} name="strength" errors=${errors} value=${settings.strength} fallback=${source?.mask ? 1 : 0.7}
        min=${0} max=${1} step=${0.05} onChange=${set("strength")} />`}
      <${Size} settings=${settings} errors=${errors} model=${model} asInput=${tab === "edit"} />
      <div class="pair">${range("num_inference_steps", 1)}${range("guidance_scale", 0.5)}</div>
      <div class="pair">
        <${Select} name="sampler" errors=${errors} value=${settings.sampler} options=${named(model.samplers)}
          onChange=${(sampler) => setSettings({ sampler, scheduler: (model.schedules[sampler] ?? []).includes(settings.scheduler) ? settings.scheduler : "" })} />
        ${settings.sampler && schedules.length > 0 &&
        html`<${Select} name="scheduler" errors=${errors} value=${settings.scheduler} options=${named(schedules)} onChange=${set("scheduler")} />`}
      </div>
      <${Seed} settings=${settings} errors=${errors} />
      ${tab !== "grid" && html`<${Range} name="n" errors=${errors} value=${settings.n} step=${1} ...${rangeOf(app, "n")} onChange=${set("n")} />`}
      ${model.loras.length > 0 && html`<${Loras} settings=${settings} errors=${errors} model=${model} />`}
      ${model.control_models.length > 0 && html`<${ControlNet} settings=${settings} errors=${errors} model=${model} />`}
      <${More} model=${model}>
        ${has(model, "prompt_2") && [prompt("prompt_2", 2), prompt("negative_prompt_2", 2)]}
        ${has(model, "true_cfg_scale") && range("true_cfg_scale", 0.5)}
        ${has(model, "clip_skip") && range("clip_skip", 1)}
        ${has(model, "enable_refiner") &&
        html`<${Field} name="enable_refiner" errors=${errors}>
          <input ...${inputOf("enable_refiner", errors)} type="checkbox" checked=${settings.enable_refiner}
            onChange=${(event) => setSettings({ enable_refiner: event.target.checked })} />
        <//>`}
      <//>
    </div>
    ${tab !== "grid" &&
    html`<div class="actions">
      <button class="primary" title=${text.shortcut} disabled=${tab === "edit" && !source}>${tab === "edit" ? text.generateEdit : text.generate}</button>
      <button type="button" onClick=${showCode}>${text.code}</button>
      <button type="button" onClick=${() => setSettings({ ...EMPTY, prompt: settings.prompt })}>${text.reset}</button>
    </div>`}
  </form>`;
}

function Examples() {
  return html`<div class="examples">
    <p>${text.embedded}</p>
    <ul>${text.examples.map(
      (example) => html`<li><button type="button" class="chip" onClick=${() => setSettings({ prompt: example })}>${example}</button></li>`,
    )}</ul>
  </div>`;
}

function Size({ settings, errors, model, asInput }) {
  const sizes = sizesOf(model, app.health?.limits?.max_side);
  const options = sizes.map((size) => [`${size.width}x${size.height}`, text.sizeOption(size)]);
  const isOther = settings.size !== "" && !options.some(([size]) => size === settings.size);
  const [custom, setCustom] = useState(isOther);
  const shown = custom || isOther ? "custom" : settings.size;
  const [width, height] = (settings.size || model.defaults.size || "512x512").split("x");
  const own = model.defaults.size ? text.ownSize(model.defaults.size) : text.modelDefault;
  const side = (label, value, change) => html`<input class="number" type="number" step="8" min="64" aria-label=${label} value=${value}
    onInput=${(event) => setSettings({ size: change(event.target.value) })} />`;
  return html`<${Field} name="size" errors=${errors}>
    <div class="row">
      <select ...${inputOf("size", errors)} value=${shown}
        onChange=${({ target }) => (setCustom(target.value === "custom"), setSettings({ size: target.value === "custom" ? `${width}x${height}` : target.value }))}>
        <option value="" selected=${shown === ""}>${asInput ? text.inputSize : own}</option>
        ${options.filter(([size]) => size !== model.defaults.size || shown === size).map(
          ([size, label]) => html`<option value=${size} selected=${shown === size}>${label}</option>`,
        )}
        <option value="custom" selected=${shown === "custom"}>${text.customSize}</option>
      </select>
      ${shown === "custom" &&
      html`${side(fields.width, width, (value) => `${value}x${height}`)}<span aria-hidden="true">×</span>
        ${side(fields.height, height, (value) => `${width}x${value}`)}`}
    </div>
  <//>`;
}

function Seed({ settings, errors }) {
  const modes = Object.entries(text.seedModes);
  const choose = (seedMode) => setSettings({ seedMode, seed: seedMode !== "random" && settings.seed === "" ? "0" : settings.seed });
  return html`<${Field} name="seed" errors=${errors}>
    <div class="row">
      <input ...${inputOf("seed", errors)} inputmode="numeric" value=${settings.seedMode === "random" ? "" : settings.seed}
        placeholder=${text.seedModes.random.toLowerCase()}
        onInput=${({ target }) => {
          const seed = target.value.replace(/\D/g, "");
          target.value = seed;
          setSettings({ seed, seedMode: seed === "" ? "random" : settings.seedMode === "random" ? "fixed" : settings.seedMode });
        }} />
      <${Segments} name="seed-mode" label=${text.seedModesLabel} value=${settings.seedMode} options=${modes} onChange=${choose} />
    </div>
  <//>`;
}

function Loras({ settings, errors, model }) {
  const { loras } = settings;
  const change = (name, weight) => setSettings({ loras: { ...loras, [name]: weight } });
  const remove = (name) => setSettings({ loras: Object.fromEntries(Object.entries(loras).filter(([other]) => other !== name)) });
  const left = model.loras.filter((name) => !(name in loras));
  return html`<${Field} name="loras" errors=${errors}>
    ${Object.entries(loras).map(
      ([name, weight]) => html`<div class="lora">
        <span title=${name}>${name}</span>
        <input class="slider" type="range" min="0" max="2" step="0.05" value=${weight} aria-label=${text.weightOf(name)}
          onInput=${(event) => change(name, Number(event.target.value))} />
        <output>${weight}</output>
        <button type="button" class="icon" aria-label=${text.removeLora(name)} onClick=${() => remove(name)}>✕</button>
      </div>`,
    )}
    ${left.length > 0 && Object.keys(loras).length < model.max_loras &&
    html`<select ...${inputOf("loras", errors)} value="" onChange=${(event) => (change(event.target.value, 1), (event.target.value = ""))}>
      <option value="">${text.addLora}</option>
      ${left.map((name) => html`<option value=${name}>${name}</option>`)}
    </select>`}
  <//>`;
}

function ControlNet({ settings, errors, model }) {
  const set = (name) => (value) => setSettings({ [name]: value });
  const range = (name) => html`<${Range} name=${name} errors=${errors} value=${settings[name]} step=${0.05} ...${rangeOf(app, name)} onChange=${set(name)} />`;
  return html`<details><summary>${text.controlNet}</summary>
    <${Field} name="control_image" errors=${errors}>
      ${settings.control_image && html`<img class="control" src=${settings.control_image} alt=${fields.control_image} />`}
      <div class="row">
        <${FileButton} id="f-control_image" label=${text.chooseFile} onFile=${async (file) => setSettings({ control_image: await toDataUrl(file) })} />
        ${settings.control_image && html`<button type="button" onClick=${() => setSettings({ control_image: null })}>${text.removeFile}</button>`}
      </div>
    <//>
    <div class="pair">
      <${Select} name="control_model" errors=${errors} value=${settings.control_model || model.control_models[0]}
        options=${model.control_models.map((name) => [name, name])} onChange=${set("control_model")} />
      <${Select} name="control_preprocessor" errors=${errors} value=${settings.control_preprocessor}
        options=${(app.schema.control_preprocessor?.enum ?? ["none", "canny"]).map((name) => [name, name])} onChange=${set("control_preprocessor")} />
    </div>
    ${range("controlnet_conditioning_scale")}
    <div class="pair">${range("control_guidance_start")}${range("control_guidance_end")}</div>
  </details>`;
}

function More({ model, children }) {
  const some = ["prompt_2", "true_cfg_scale", "clip_skip", "enable_refiner"].some((field) => has(model, field));
  return some && html`<details><summary>${text.more}</summary>${children}</details>`;
}

/** Put settings into the form, and say so. */
export function useSettings(settings, message = text.notice.settingsUsed) {
  setSettings(settings);
  update({ tab: app.tab === "grid" ? "grid" : "generate", viewed: null, errors: {} });
  notify(message);
}
