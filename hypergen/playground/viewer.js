// The large view of one image: zoom, comparison with another, its settings, and what to do with it.
import { html, useRef, useState } from "./vendor/preact-htm.js";
import { setSource } from "./edit.js";
import { toSettings } from "./fields.js";
import { useSettings } from "./form.js";
import { nameOf } from "./gallery.js";
import { axisKinds, startGrid } from "./grid.js";
import { app, update, useApp } from "./state.js";
import { deleteImage, download, urlOf } from "./store.js";
import { text } from "./text.js";
import { Dialog, IconButton, Slider } from "./ui.js";

const { viewer } = text;
const FIT = { scale: 1, x: 0, y: 0 };
const MOST = 32;
const PAN = 60; // pixels per key
const SAME_SEED = ["guidance_scale", "num_inference_steps", "sampler", "lora"]; // what else may change

export function Viewer() {
  const { images, viewed } = useApp();
  const [view, setView] = useState(FIT);
  const [comparedId, setCompared] = useState("");
  const index = images.findIndex(({ id }) => id === viewed);
  const image = images[index];
  if (!image) return null;
  const compared = comparedId === "source" ? image.source : images.find(({ id }) => id === comparedId)?.blob;
  const show = (step) => images[index + step] && (setView(FIT), update({ viewed: images[index + step].id }));
  const zoom = (factor) =>
    setView((old) => {
      const scale = Math.min(MOST, old.scale * factor);
      return scale <= 1 ? FIT : { ...old, scale };
    });
  const pan = (x, y) => setView((old) => (old.scale === 1 ? old : { ...old, x: old.x + x, y: old.y + y }));
  const onKey = (event) => {
    if (event.target.matches("select, input")) return;
    const arrow = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (arrow && view.scale > 1) pan(arrow[0] * PAN, arrow[1] * PAN);
    else if (arrow) show(-arrow[0]);
    ({ "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: () => setView(FIT) })[event.key]?.();
  };
  return html`<${Dialog} title=${viewer.title} className="viewer" onKeyDown=${onKey} onClose=${() => update({ viewed: null })}>
    <div class="body">
      <div class="stage-side">
        <${Stage} image=${image} compared=${compared} view=${view} pan=${pan} zoom=${zoom} />
        <div class="toolbar">
          <${IconButton} label=${viewer.previous} disabled=${index === 0} onClick=${() => show(-1)}>←<//>
          <${IconButton} label=${viewer.next} disabled=${index === images.length - 1} onClick=${() => show(1)}>→<//>
          <span class="space"></span>
          <${IconButton} label=${viewer.zoomOut} onClick=${() => zoom(1 / 1.5)}>−<//>
          <button type="button" onClick=${() => setView(FIT)}>${view.scale === 1 ? viewer.fit : `${Math.round(view.scale * 100)} %`}</button>
          <${IconButton} label=${viewer.zoomIn} onClick=${() => zoom(1.5)}>+<//>
        </div>
      </div>
      <aside>
        <p class="prompt">${image.body.prompt}</p>
        ${image.understood && html`<p class="hint">${text.gallery.understood(image.understood)}</p>`}
        <${Facts} image=${image} />
        <label class="field"><span class="label">${viewer.compare}</span>
          <select value=${comparedId} onChange=${(event) => setCompared(event.target.value)}>
            <option value="">${viewer.compareNone}</option>
            ${image.source && html`<option value="source">${viewer.compareSource}</option>`}
            ${images.filter(({ id }) => id !== image.id).slice(0, 50).map((other) => html`<option value=${other.id}>${other.body.prompt.slice(0, 40)}, ${other.seed}</option>`)}
          </select>
        </label>
        <${Actions} image=${image} next=${images[index + 1] ?? images[index - 1]} />
      </aside>
    </div>
  <//>`;
}

function Stage({ image, compared, view, pan, zoom }) {
  const [divider, setDivider] = useState(50);
  const drag = useRef(null); // where the pointer was
  const onPointerDown = (event) => {
    drag.current = event;
    event.currentTarget.setPointerCapture(event.pointerId);
  };
  const onPointerMove = (event) => {
    if (!drag.current) return;
    pan(event.clientX - drag.current.clientX, event.clientY - drag.current.clientY);
    drag.current = event;
  };
  const style = { transform: `translate(${view.x}px, ${view.y}px) scale(${view.scale})`, imageRendering: view.scale > 3 ? "pixelated" : "auto" };
  return html`<div class="stage" onWheel=${(event) => (event.preventDefault(), zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2))}
      onPointerDown=${onPointerDown} onPointerMove=${onPointerMove} onPointerUp=${() => (drag.current = null)}>
      <div class="zoomed" style=${style}>
        <img src=${urlOf(image.blob)} alt=${image.body.prompt} draggable=${false} />
        ${compared && html`<img class="over" src=${urlOf(compared)} alt="" draggable=${false} style=${{ clipPath: `inset(0 ${100 - divider}% 0 0)` }} />`}
      </div>
    </div>
    ${compared && html`<${Slider} label=${viewer.slider} min="0" max="100" value=${divider} onChange=${setDivider} />`}`;
}

function Facts({ image }) {
  const { prompt: _prompt, seed: _seed, n: _n, size: _size, model: _model, loras, ...rest } = image.body;
  const facts = { seed: image.seed, size: image.size.replace("x", " × "), model: image.model, ...rest };
  const rows = Object.entries(facts).filter(([, value]) => value !== undefined && value !== null);
  for (const [name, weight] of Object.entries(loras ?? {})) rows.push([name, weight]);
  return html`<dl>${[...rows, [viewer.duration, text.seconds(image.ms / 1000)]].map(
    ([name, value]) => html`<div><dt>${text.fields[name] ?? name}</dt><dd>${String(value)}</dd></div>`,
  )}</dl>`;
}

function Actions({ image, next }) {
  const settings = () => toSettings({ ...image.body, size: image.source ? (image.body.size ?? "") : image.size }, image.seed);
  const kinds = axisKinds();
  const remove = async () => {
    update({ images: app.images.filter(({ id }) => id !== image.id), viewed: next?.id ?? null });
    await deleteImage(image.id);
  };
  return html`<div class="actions column">
    <button type="button" class="primary" onClick=${() => useSettings(settings())}>${viewer.useSettings}</button>
    <button type="button" onClick=${() => setSource(image.blob)}>${viewer.useAsInput}</button>
    <select aria-label=${viewer.sameSeed} value="" onChange=${(event) => startGrid(event.target.value, settings())}>
      <option value="">${viewer.sameSeed}</option>
      ${SAME_SEED.filter((kind) => kinds[kind]).map((kind) => html`<option value=${kind}>${kinds[kind]}</option>`)}
    </select>
    <div class="row">
      <button type="button" onClick=${() => download(image.blob, nameOf(image))}>${viewer.download}</button>
      <button type="button" onClick=${remove}>${viewer.delete}</button>
    </div>
  </div>`;
}
