// Small parts that all views share.
import { html, useEffect, useRef } from "./vendor/preact-htm.js";
import { app } from "./state.js";
import { text } from "./text.js";

/** A labelled part of the form, with the server's sentence about it if there is one. */
export function Field({ name, children, hint }) {
  return html`<div class=${`field ${app.errors[name] ? "invalid" : ""}`} data-field=${name}>
    <div class="label"><label for=${`f-${name}`}>${text.fields[name]}</label>${hint}</div>
    ${children}
    <${FieldError} name=${name} />
  </div>`;
}

export function FieldError({ name }) {
  const error = app.errors[name];
  return error && html`<p class="error" id=${`e-${name}`} role="alert">${error}</p>`;
}

/** Attributes of the input in a `Field`. */
export const inputOf = (name) => ({
  id: `f-${name}`,
  "aria-invalid": app.errors[name] ? "true" : undefined,
  "aria-describedby": app.errors[name] ? `e-${name}` : undefined,
});

/** A slider and a number; "" is the default, which the slider shows. */
export function Range({ name, value, fallback = "", onChange, ...limits }) {
  const change = (event) => onChange(event.target.value);
  const number = html`<input ...${inputOf(name)} ...${limits} class="number" type="number" inputmode="decimal"
    value=${value} placeholder=${fallback} onInput=${change} />`;
  return html`<${Field} name=${name} hint=${number}>
    <${Slider} label=${text.fields[name]} ...${limits} value=${value === "" ? fallback || limits.min : value} onChange=${onChange} />
  <//>`;
}

export function Slider({ label, onChange, ...limits }) {
  return html`<input class="slider" type="range" aria-label=${label} ...${limits} onInput=${(event) => onChange(Number(event.target.value))} />`;
}

export function Select({ name, value, options, onChange }) {
  const known = options.some(([option]) => option === value);
  const all = known ? options : [...options, [value, value]];
  return html`<${Field} name=${name}>
    <select ...${inputOf(name)} value=${value} onChange=${(event) => onChange(event.target.value)}>
      ${all.map(([option, shown]) => html`<option value=${option} selected=${option === value}>${shown}</option>`)}
    </select>
  <//>`;
}

/** One of a few choices, as radio buttons that look like one control. */
export function Segments({ name, label, value, options, onChange }) {
  return html`<div class="segments" role="radiogroup" aria-label=${label}>
    ${options.map(
      ([option, shown]) => html`<label class=${option === value ? "chosen" : ""}>
        <input type="radio" name=${name} checked=${option === value} onChange=${() => onChange(option)} />${shown}
      </label>`,
    )}
  </div>`;
}

export function IconButton({ label, children, ...attributes }) {
  return html`<button type="button" class="icon" aria-label=${label} title=${label} ...${attributes}>${children}</button>`;
}

/** A modal dialog; Esc and a click beside it close it. */
export function Dialog({ title, className = "", onClose, onKeyDown, children }) {
  const dialog = useRef();
  useEffect(() => {
    dialog.current.showModal();
  }, []);
  return html`<dialog ref=${dialog} class=${className} aria-label=${title} onClose=${onClose} onKeyDown=${onKeyDown}
    onClick=${(event) => event.target === dialog.current && dialog.current.close()}>
    <div class="dialog">
      <header><h2>${title}</h2>
        <${IconButton} label=${text.close} onClick=${() => dialog.current.close()}>✕<//>
      </header>
      ${children}
    </div>
  </dialog>`;
}

/** A button that opens the file chooser. */
export function FileButton({ label, onFile, id }) {
  return html`<label class="button file">${label}
    <input id=${id} type="file" accept="image/png,image/jpeg,image/webp"
      onChange=${(event) => {
        const [file] = event.target.files;
        event.target.value = "";
        if (file) onFile(file);
      }} />
  </label>`;
}

/** Size of an image file; throws if the browser cannot read it. */
export async function sizeOf(blob) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  bitmap.close();
  return { width, height };
}
