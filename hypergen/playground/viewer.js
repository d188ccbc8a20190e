// The large view of one image: zoom, comparison with another, its settings, and what to do with it.
import { html, useRef, useState } from "./vendor/preact-htm.js";
import { setSource } from "./edit.js";
import { toSettings } from "./fields.js";
import { useSettings } from "./form.js";
import { nameOf } from "./gallery.js";
import { startGrid } from "./grid.js";
import { app, update, useApp } from "./state.js";
import { deleteImage, download, urlOf } from "./store.js";
import { text } from "./text.js";
import { Dialog } from "./ui.js";

const { viewer } = text;
const FIT = { scale: 1, x: 0, y: 0 };
const MOST = 32;

export function Viewer() {
  const { images, viewed } = useApp();
  const [view, setView] = useState(FIT);
  const [comparedId, setCompared] = useState("");
  const index = images.findIndex(({ id }) => id === viewed);
  const image = images[index];
  if (!image) return null;
  const compared = comparedId === "source" ? image.source : images.find(({ id }) => id === comparedId)?.blob;
  const show = (step) => images[index + step] && (setView(FIT), update({ viewed: images[index + step].id }));
  const zoom = (factor) => setView((old) => ({ ...old, scale: Math.min(MOST, Math.max(1, old.scale * factor)) }));
  const onKey = (event) => {
    if (event.target.matches("select, input")) return;
    const actions = { ArrowLeft: () => show(-1), ArrowRight: () => show(1), "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: () => setView(FIT) };
    actions[event.key]?.();
  };
  return html`<${Dialog} title=${viewer.title} className="viewer" onKeyDown=${onKey} onClose=${() => update({ viewed: null })}>
    <div class="body">
      <div class="stage-side">
        <${Stage} image=${image} compared=${compared} view=${view} setView=${setView} zoom=${zoom} />
        <div class="toolbar">
          <button type="button" class="icon" aria-label=${viewer.previous} title=${viewer.previous} disabled=${index === 0} onClick=${() => show(-1)}>←</button>
          <button type="button" class="icon" aria-label=${viewer.next} title=${viewer.next} disabled=${index === images.length - 1} onClick=${() => show(1)}>→</button>
          <span class="space"></span>
          <button type="button" class="icon" aria-label=${viewer.zoomOut} title=${viewer.zoomOut} onClick=${() => zoom(1 / 1.5)}>−</button>
          <button type="button" onClick=${() => setView(FIT)}>${view.scale === 1 ? viewer.fit : `${Math.round(view.scale * 100)} %`}</button>
          <button type="button" class="icon" aria-label=${viewer.zoomIn} title=${viewer.zoomIn} onClick=${() => zoom(1.5)}>+</button>
        </div>
      </div>
      <aside>
        <p class="prompt">${image.body.prompt}</p>
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

function Stage({ image, compared, view, setView, zoom }) {
  const [divider, setDivider] = useState(50);
  const drag = useRef(null);
  const onPointerMove = (event) => {
    if (!drag.current || view.scale === 1) return;
    const { x, y } = drag.current;
    setView((old) => ({ ...old, x: old.x + event.clientX - x, y: old.y + event.clientY - y }));
    drag.current = { x: event.clientX, y: event.clientY };
  };
  const style = { transform: `translate(${view.x}px, ${view.y}px) scale(${view.scale})`, imageRendering: view.scale > 3 ? "pixelated" : "auto" };
  return html`<div class="stage" onWheel=${(event) => (event.preventDefault(), zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2))}
      onPointerDown=${(event) => ((drag.current = { x: event.clientX, y: event.clientY }), event.currentTarget.setPointerCapture(event.pointerId))}
      onPointerMove=${onPointerMove} onPointerUp=${() => (drag.current = null)}>
      <div class="zoomed" style=${style}>
        <img src=${urlOf(image.blob)} alt=${image.body.prompt} draggable=${false} />
        ${compared && html`<img class="over" src=${urlOf(compared)} alt="" draggable=${false} style=${{ clipPath: `inset(0 ${100 - divider}% 0 0)` }} />`}
      </div>
    </div>
    ${compared && html`<input class="slider" type="range" min="0" max="100" value=${divider} aria-label=${viewer.slider} onInput=${(event) => setDivider(Number(event.target.value))} />`}`;
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
  const remove = async () => {
    update({ images: app.images.filter(({ id }) => id !== image.id), viewed: next?.id ?? null });
    await deleteImage(image.id);
  };
  return html`<div class="actions column">
    <button type="button" class="primary" onClick=${() => useSettings(settings())}>${viewer.useSettings}</button>
    <button type="button" onClick=${() => setSource(image.blob)}>${viewer.useAsInput}</button>
    <select aria-label=${viewer.sameSeed} value="" onChange=${(event) => startGrid(event.target.value, settings())}>
      <option value="">${viewer.sameSeed}</option>
      ${Object.entries(viewer.sameSeedOptions).map(([kind, label]) => html`<option value=${kind}>${label}</option>`)}
    </select>
    <div class="row">
      <button type="button" onClick=${() => download(image.blob, nameOf(image))}>${viewer.download}</button>
      <button type="button" onClick=${remove}>${viewer.delete}</button>
    </div>
  </div>`;
}
