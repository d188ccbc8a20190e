// The settings of the next request. Shows the fields that the chosen model has, with the server's ranges and defaults.
import { html, useState } from "./vendor/preact-htm.js";
import { EMBEDDED_MODEL, EMPTY, FALLBACK_SIZE, has, modelOf, rangeOf, sizesOf, toBody } from "./fields.js";
import { generate, showAtField } from "./requests.js";
import { app, notify, setSettings, update } from "./state.js";
import { toDataUrl } from "./store.js";
import { text } from "./text.js";
import { Field, FileButton, IconButton, Segments, Select, Slider, inputOf } from "./ui.js";

const { fields } = text;

/** The request in the form: { body, edit } as `generate` takes them. */
export const requestOfForm = () => ({ body: toBody(app), edit: app.tab === "edit" ? app.source : null });

/** Whether there is a prompt; says so at the prompt if not. */
export function checkPrompt() {
  const isGiven = app.settings.prompt.trim() !== "";
  if (!isGiven) showAtField({ param: "prompt", message: text.needsPrompt });
  return isGiven;
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

// The fields of the form; each shows and changes the setting of its name, if the model has it.
const set = (name) => (value) => setSettings({ [name]: value });
const typed = (name) => (event) => setSettings({ [name]: event.target.value });

function prompt(name, rows, hint) {
  return has(modelOf(app), name) && html`<${Field} name=${name}>
    <textarea ...${inputOf(name)} rows=${rows} placeholder=${hint} value=${app.settings[name]} onInput=${typed(name)}></textarea>
  <//>`;
}

/** A slider and a number; "" is the default, which the slider shows. */
function range(name, step, fallback = modelOf(app).defaults[name] ?? "") {
  if (!has(modelOf(app), name)) return null;
  const value = app.settings[name];
  const limits = { ...rangeOf(app, name), step };
  const number = html`<input ...${inputOf(name)} ...${limits} class="number" type="number" inputmode="decimal"
    value=${value} placeholder=${fallback} onInput=${typed(name)} />`;
  return html`<${Field} name=${name} hint=${number}>
    <${Slider} label=${fields[name]} ...${limits} value=${value === "" ? fallback || limits.min : value} onChange=${set(name)} />
  <//>`;
}

function checkbox(name) {
  const change = ({ target }) => setSettings({ [name]: target.checked });
  return has(modelOf(app), name) && html`<${Field} name=${name}>
    <input ...${inputOf(name)} type="checkbox" checked=${app.settings[name]} onChange=${change} />
  <//>`;
}

/** A choice of names; also of the value, which a file's settings may have from elsewhere. */
function select(name, names, onChange = set(name), value = app.settings[name]) {
  const options = [...new Set([...names, value])].map((option) => [option, option || text.modelDefault]);
  return html`<${Field} name=${name}><${Select} ...${inputOf(name)} value=${value} options=${options} onChange=${onChange} /><//>`;
}

export function Form() {
  const { settings, tab, models, source } = app;
  const model = modelOf(app);
  const schedules = model.schedules[settings.sampler] ?? [];
  const setSampler = (sampler) => {
    const keeps = model.schedules[sampler]?.includes(settings.scheduler);
    setSettings({ sampler, scheduler: keeps ? settings.scheduler : "" });
  };
  return html`<form class="panel" novalidate aria-label=${text.tabs[tab]} onSubmit=${(event) => (event.preventDefault(), submit())}>
    <div class="scroll">
      ${prompt("prompt", 3, text.promptHint)}
      ${model.id === EMBEDDED_MODEL && html`<${Examples} />`}
      ${prompt("negative_prompt", 2, text.negativeHint)}
      ${models.length > 1 && select("model", models.map(({ id }) => id), set("model"), model.id)}
      ${tab === "edit" && range("strength", 0.05, source?.mask ? 1 : 0.7)}
      <${Size} model=${model} />
      <div class="pair">${range("num_inference_steps", 1)}${range("guidance_scale", 0.5)}</div>
      <div class="pair">
        ${select("sampler", ["", ...model.samplers], setSampler)}
        ${settings.sampler && schedules.length > 0 && select("scheduler", ["", ...schedules])}
      </div>
      <${Seed} />
      ${tab !== "grid" && range("n", 1, 1)}
      ${model.loras.length > 0 && html`<${Loras} model=${model} />`}
      ${model.control_models.length > 0 && html`<${ControlNet} model=${model} />`}
      <${More} />
    </div>
    ${tab !== "grid" &&
    html`<div class="actions">
      <button class="primary" title=${text.shortcut} disabled=${tab === "edit" && !source}>${text.generate[tab]}</button>
      <button type="button" onClick=${() => update({ asksCode: true })}>${text.code}</button>
      <button type="button" onClick=${() => setSettings({ ...EMPTY, prompt: settings.prompt })}>${text.reset}</button>
    </div>`}
  </form>`;
}

function Examples() {
  const use = ({ target }) => setSettings({ prompt: target.textContent });
  return html`<div class="examples">
    <p>${text.embedded}</p>
    <ul>${text.examples.map((example) => html`<li><button type="button" class="chip" onClick=${use}>${example}</button></li>`)}</ul>
  </div>`;
}

function Size({ model }) {
  const { settings, tab, health } = app;
  const own = model.defaults.size;
  const [isCustom, setCustom] = useState(false);
  const sides = (settings.size || own || FALLBACK_SIZE).split("x");
  const fallback = own ? text.sizeOption(own, text.modelDefault) : text.modelDefault;
  const most = health?.limits?.max_side;
  const sizes = sizesOf(model, most).filter(([size]) => size !== own || settings.size === own);
  const options = [
    ["", tab === "edit" ? text.inputSize : fallback],
    ...sizes.map(([size, ratio]) => [size, text.sizeOption(size, ratio)]),
    ["custom", text.customSize],
  ];
  const isListed = options.some(([size]) => size === settings.size);
  const shown = isListed && !isCustom ? settings.size : "custom";
  const choose = (size) => {
    setCustom(size === "custom");
    setSettings({ size: size === "custom" ? sides.join("x") : size });
  };
  const side = (name, index) => {
    const enter = ({ target }) => (setCustom(true), setSettings({ size: sides.with(index, target.value).join("x") }));
    return html`<input class="number" type="number" step="8" min="64" max=${most}
      aria-label=${fields[name]} value=${sides[index]} onInput=${enter} />`;
  };
  return html`<${Field} name="size">
    <div class="row">
      <${Select} ...${inputOf("size")} value=${shown} options=${options} onChange=${choose} />
      ${shown === "custom" && html`${side("width", 0)}<span aria-hidden="true">×</span>${side("height", 1)}`}
    </div>
  <//>`;
}

function Seed() {
  const { seed, seedMode } = app.settings;
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
      <${Segments} name="seed-mode" label=${fields.seed} value=${seedMode} options=${Object.entries(text.seedModes)} onChange=${choose} />
    </div>
  <//>`;
}

function Loras({ model }) {
  const { loras } = app.settings;
  const change = (name, weight) => setSettings({ loras: { ...loras, [name]: weight } });
  const remove = (name) => setSettings({ loras: Object.fromEntries(Object.entries(loras).filter(([other]) => other !== name)) });
  const limits = { ...rangeOf(app, "loras"), step: 0.05 };
  const left = model.loras.filter((name) => !(name in loras)).map((name) => [name, name]);
  return html`<${Field} name="loras">
    ${Object.entries(loras).map(
      ([name, weight]) => html`<div class="lora">
        <span title=${name}>${name}</span>
        <${Slider} label=${text.weightOf(name)} ...${limits} value=${weight} onChange=${(value) => change(name, value)} />
        <output>${weight}</output>
        <${IconButton} label=${text.removeLora(name)} onClick=${() => remove(name)}>✕<//>
      </div>`,
    )}
    ${left.length > 0 && Object.keys(loras).length < model.max_loras &&
    html`<${Select} ...${inputOf("loras")} options=${[["", text.addLora], ...left]} onChange=${(name) => change(name, 1)} />`}
  <//>`;
}

function ControlNet({ model }) {
  const { control_image: image, control_model: chosen } = app.settings;
  const choose = async (file) => setSettings({ control_image: await toDataUrl(file) });
  return html`<details><summary>${fields.control_model}</summary>
    <${Field} name="control_image">
      ${image && html`<img class="control" src=${image} alt=${fields.control_image} />`}
      <div class="row">
        <${FileButton} id="f-control_image" label=${text.chooseFile} onFile=${choose} />
        ${image && html`<button type="button" onClick=${() => set("control_image")(null)}>${text.removeFile}</button>`}
      </div>
    <//>
    <div class="pair">
      ${select("control_model", model.control_models, set("control_model"), chosen || model.control_models[0])}
      ${select("control_preprocessor", app.schema?.control_preprocessor?.enum ?? [])}
    </div>
    ${range("controlnet_conditioning_scale", 0.05)}
    <div class="pair">${range("control_guidance_start", 0.05)}${range("control_guidance_end", 0.05)}</div>
  </details>`;
}

function More() {
  const prompts = [prompt("prompt_2", 2), prompt("negative_prompt_2", 2)];
  const shown = [...prompts, range("true_cfg_scale", 0.5), range("clip_skip", 1), checkbox("enable_refiner")];
  return shown.some(Boolean) && html`<details><summary>${text.more}</summary>${shown}</details>`;
}

/** Put settings into the form, and say so. */
export function useSettings(settings, message = text.settingsUsed) {
  setSettings(settings);
  update({ tab: app.tab === "grid" ? "grid" : "generate", viewed: null, errors: {} });
  notify(message);
}
