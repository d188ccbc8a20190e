// The settings of the next request. Shows the fields that the chosen model has, with the server's ranges and defaults.
import { html, useState } from "./vendor/preact-htm.js";
import { EMBEDDED_MODEL, EMPTY, has, modelOf, rangeOf, sizesOf, toBody } from "./fields.js";
import { generate } from "./requests.js";
import { app, notify, setSettings, update, useApp } from "./state.js";
import { toDataUrl } from "./store.js";
import { text } from "./text.js";
import { Field, FileButton, IconButton, Range, Segments, Select, Slider, inputOf } from "./ui.js";

const { fields } = text;

/** The request in the form: { body, edit } as `generate` takes them. */
export function requestOfForm() {
  const { settings, source, tab } = app;
  const body = toBody(settings, modelOf(app), (app.health?.models ?? []).length > 1);
  if (tab !== "edit" || !source) return { body, edit: null };
  if (settings.strength !== "") body.strength = Number(settings.strength);
  return { body, edit: { source: source.blob, mask: source.mask } };
}

/** Whether there is a prompt; says so at the prompt if not. */
export function checkPrompt() {
  if (app.settings.prompt.trim()) return true;
  update({ errors: { ...app.errors, prompt: text.needsPrompt } });
  document.getElementById("f-prompt")?.focus();
  return false;
}

export function submit() {
  if ((app.tab === "edit" && !app.source) || !checkPrompt()) return;
  const { settings } = app;
  const { body, edit } = requestOfForm();
  update({ errors: {} });
  // On a phone the images are below the form.
  if (matchMedia("(max-width: 860px)").matches) document.getElementById("images")?.scrollIntoView({ block: "start" });
  generate(body, edit);
  if (settings.seedMode === "increment" && settings.seed !== "") {
    setSettings({ seed: String(BigInt(settings.seed) + BigInt(Math.trunc(settings.n) || 1)) });
  }
}

// The fields of the form; each shows and changes the setting of its name.
const set = (name) => (value) => setSettings({ [name]: value });
const choices = (names) => names.map((name) => [name, name]);

function prompt(name, rows, hint) {
  return html`<${Field} name=${name}>
    <textarea ...${inputOf(name)} rows=${rows} placeholder=${hint} value=${app.settings[name]}
      onInput=${(event) => setSettings({ [name]: event.target.value })}></textarea>
  <//>`;
}

function range(name, step, fallback = modelOf(app).defaults[name]) {
  return html`<${Range} name=${name} value=${app.settings[name]} step=${step} ...${rangeOf(app, name)}
    fallback=${fallback} onChange=${set(name)} />`;
}

function select(name, options, onChange = set(name), value = app.settings[name]) {
  return html`<${Select} name=${name} value=${value} options=${options} onChange=${onChange} />`;
}

export function Form({ showCode }) {
  const { settings, tab, health, source } = useApp();
  const model = modelOf(app);
  const models = health?.models ?? [];
  const schedules = model.schedules[settings.sampler] ?? [];
  const own = ["", text.modelDefault];
  const setSampler = (sampler) => {
    const keeps = model.schedules[sampler]?.includes(settings.scheduler);
    setSettings({ sampler, scheduler: keeps ? settings.scheduler : "" });
  };
  return html`<form class="panel" novalidate aria-label=${text.tabs[tab]} onSubmit=${(event) => (event.preventDefault(), submit())}>
    <div class="scroll">
      ${prompt("prompt", 3, text.promptHint)}
      ${model.id === EMBEDDED_MODEL && html`<${Examples} />`}
      ${has(model, "negative_prompt") && prompt("negative_prompt", 2, text.negativeHint)}
      ${models.length > 1 && select("model", choices(models.map(({ id }) => id)), set("model"), model.id)}
      ${tab === "edit" && range("strength", 0.05, source?.mask ? 1 : 0.7)}
      <${Size} model=${model} />
      <div class="pair">${range("num_inference_steps", 1)}${range("guidance_scale", 0.5)}</div>
      <div class="pair">
        ${select("sampler", [own, ...choices(model.samplers)], setSampler)}
        ${settings.sampler && schedules.length > 0 && select("scheduler", [own, ...choices(schedules)])}
      </div>
      <${Seed} settings=${settings} />
      ${tab !== "grid" && range("n", 1, 1)}
      ${model.loras.length > 0 && html`<${Loras} loras=${settings.loras} model=${model} />`}
      ${model.control_models.length > 0 && html`<${ControlNet} settings=${settings} model=${model} />`}
      <${More} model=${model} />
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
  const chip = (example) => html`<button type="button" class="chip" onClick=${() => setSettings({ prompt: example })}>${example}</button>`;
  return html`<div class="examples">
    <p>${text.embedded}</p>
    <ul>${text.examples.map((example) => html`<li>${chip(example)}</li>`)}</ul>
  </div>`;
}

function Size({ model }) {
  const { settings, tab, health } = app;
  const { max_side: maxSide } = health?.limits ?? {};
  const options = sizesOf(model, maxSide).map((size) => [`${size.width}x${size.height}`, text.sizeOption(size)]);
  const isOther = settings.size !== "" && !options.some(([size]) => size === settings.size);
  const [custom, setCustom] = useState(isOther);
  const shown = custom || isOther ? "custom" : settings.size;
  const [width, height] = (settings.size || model.defaults.size || "512x512").split("x");
  const own = tab === "edit" ? text.inputSize : model.defaults.size ? text.ownSize(model.defaults.size) : text.modelDefault;
  const all = [["", own], ...options.filter(([size]) => size !== model.defaults.size || shown === size), ["custom", text.customSize]];
  const choose = ({ target: { value } }) => {
    setCustom(value === "custom");
    setSettings({ size: value === "custom" ? `${width}x${height}` : value });
  };
  const side = (label, value, toSize) => html`<input class="number" type="number" step="8" min="64" max=${maxSide}
    aria-label=${label} value=${value} onInput=${(event) => setSettings({ size: toSize(event.target.value) })} />`;
  return html`<${Field} name="size">
    <div class="row">
      <select ...${inputOf("size")} value=${shown} onChange=${choose}>
        ${all.map(([size, label]) => html`<option value=${size} selected=${shown === size}>${label}</option>`)}
      </select>
      ${shown === "custom" &&
      html`${side(fields.width, width, (value) => `${value}x${height}`)}<span aria-hidden="true">×</span>
        ${side(fields.height, height, (value) => `${width}x${value}`)}`}
    </div>
  <//>`;
}

function Seed({ settings: { seed, seedMode } }) {
  const choose = (mode) => setSettings({ seedMode: mode, seed: mode !== "random" && seed === "" ? "0" : seed });
  const enter = ({ target }) => {
    target.value = target.value.replace(/\D/g, "");
    const fixed = seedMode === "random" ? "fixed" : seedMode;
    setSettings({ seed: target.value, seedMode: target.value === "" ? "random" : fixed });
  };
  return html`<${Field} name="seed">
    <div class="row">
      <input ...${inputOf("seed")} inputmode="numeric" value=${seedMode === "random" ? "" : seed}
        placeholder=${text.seedModes.random.toLowerCase()} onInput=${enter} />
      <${Segments} name="seed-mode" label=${text.seedModesLabel} value=${seedMode} options=${Object.entries(text.seedModes)} onChange=${choose} />
    </div>
  <//>`;
}

function Loras({ loras, model }) {
  const change = (name, weight) => setSettings({ loras: { ...loras, [name]: weight } });
  const remove = (name) => setSettings({ loras: Object.fromEntries(Object.entries(loras).filter(([other]) => other !== name)) });
  const left = model.loras.filter((name) => !(name in loras));
  return html`<${Field} name="loras">
    ${Object.entries(loras).map(
      ([name, weight]) => html`<div class="lora">
        <span title=${name}>${name}</span>
        <${Slider} label=${text.weightOf(name)} ...${rangeOf(app, "loras")} step="0.05" value=${weight} onChange=${(value) => change(name, value)} />
        <output>${weight}</output>
        <${IconButton} label=${text.removeLora(name)} onClick=${() => remove(name)}>✕<//>
      </div>`,
    )}
    ${left.length > 0 && Object.keys(loras).length < model.max_loras &&
    html`<select ...${inputOf("loras")} value="" onChange=${(event) => (change(event.target.value, 1), (event.target.value = ""))}>
      <option value="">${text.addLora}</option>
      ${left.map((name) => html`<option value=${name}>${name}</option>`)}
    </select>`}
  <//>`;
}

function ControlNet({ settings, model }) {
  const image = settings.control_image;
  const preprocessors = app.schema.control_preprocessor?.enum ?? ["none", "canny"];
  return html`<details><summary>${text.controlNet}</summary>
    <${Field} name="control_image">
      ${image && html`<img class="control" src=${image} alt=${fields.control_image} />`}
      <div class="row">
        <${FileButton} id="f-control_image" label=${text.chooseFile} onFile=${async (file) => setSettings({ control_image: await toDataUrl(file) })} />
        ${image && html`<button type="button" onClick=${() => setSettings({ control_image: null })}>${text.removeFile}</button>`}
      </div>
    <//>
    <div class="pair">
      ${select("control_model", choices(model.control_models), set("control_model"), settings.control_model || model.control_models[0])}
      ${select("control_preprocessor", choices(preprocessors))}
    </div>
    ${range("controlnet_conditioning_scale", 0.05)}
    <div class="pair">${range("control_guidance_start", 0.05)}${range("control_guidance_end", 0.05)}</div>
  </details>`;
}

function More({ model }) {
  const refiner = () => html`<${Field} name="enable_refiner">
    <input ...${inputOf("enable_refiner")} type="checkbox" checked=${app.settings.enable_refiner}
      onChange=${(event) => setSettings({ enable_refiner: event.target.checked })} />
  <//>`;
  const optional = {
    prompt_2: () => [prompt("prompt_2", 2), prompt("negative_prompt_2", 2)],
    true_cfg_scale: () => range("true_cfg_scale", 0.5),
    clip_skip: () => range("clip_skip", 1),
    enable_refiner: refiner,
  };
  const shown = Object.keys(optional).filter((name) => has(model, name));
  return shown.length > 0 && html`<details><summary>${text.more}</summary>${shown.map((name) => optional[name]())}</details>`;
}

/** Put settings into the form, and say so. */
export function useSettings(settings, message = text.notice.settingsUsed) {
  setSettings(settings);
  update({ tab: app.tab === "grid" ? "grid" : "generate", viewed: null, errors: {} });
  notify(message);
}
