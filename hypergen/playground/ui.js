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

export const FieldError = ({ name }) =>
  app.errors[name] && html`<p class="error" id=${`e-${name}`} role="alert">${app.errors[name]}</p>`;

/** Attributes of the input in a `Field`. */
export const inputOf = (name) => ({
  id: `f-${name}`,
  "aria-invalid": app.errors[name] ? "true" : undefined,
  "aria-describedby": app.errors[name] ? `e-${name}` : undefined,
});

export function Slider({ label, onChange, ...limits }) {
  const change = ({ target }) => onChange(target.valueAsNumber);
  return html`<input class="slider" type="range" aria-label=${label} ...${limits} onInput=${change} />`;
}

/** A choice of options, [value, shown text] each. */
export function Select({ value = "", options, onChange, ...attributes }) {
  return html`<select ...${attributes} value=${value} onChange=${(event) => onChange(event.target.value)}>
    ${options.map(([option, shown]) => html`<option value=${option} selected=${option === value}>${shown}</option>`)}
  </select>`;
}

/** The same, as radio buttons that look like one control. */
export function Segments({ name, label, value, options, onChange }) {
  const radio = ([option, shown]) => html`<label>
    <input type="radio" name=${name} checked=${option === value} onChange=${() => onChange(option)} />${shown}
  </label>`;
  return html`<div class="segments" role="radiogroup" aria-label=${label}>${options.map(radio)}</div>`;
}

export const IconButton = ({ label, children, ...rest }) =>
  html`<button type="button" class="icon" aria-label=${label} title=${label} ...${rest}>${children}</button>`;

/** A handler of keys: name of a key ("ctrl z" with Ctrl or Cmd) -> action; `move(x, y)` is the action of the arrows. */
export function keyHandler(move, actions) {
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  return (event) => {
    const arrow = arrows[event.key];
    const action = arrow ? () => move(...arrow) : actions[event.ctrlKey || event.metaKey ? `ctrl ${event.key}` : event.key];
    if (!action || event.target.matches("select, input")) return;
    event.preventDefault();
    action();
  };
}

/** A modal dialog; Esc and a click beside it close it. */
export function Dialog({ title, className = "", children, ...events }) {
  const dialog = useRef();
  const close = () => dialog.current.close();
  useEffect(() => dialog.current.showModal(), []);
  const closeBeside = ({ target }) => target === dialog.current && close();
  return html`<dialog ref=${dialog} class=${className} aria-label=${title} onClick=${closeBeside} ...${events}>
    <div class="dialog">
      <header><h2>${title}</h2><${IconButton} label=${text.close} onClick=${close}>✕<//></header>
      ${children}
    </div>
  </dialog>`;
}

/** A button that opens the file chooser. */
export function FileButton({ label, onFile, id }) {
  const choose = ({ target }) => {
    if (target.files.length) onFile(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  };
  return html`<label class="button file">${label}
    <input id=${id} type="file" accept="image/png,image/jpeg,image/webp" onChange=${choose} />
  </label>`;
}
