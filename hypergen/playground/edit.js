// Edits: the input image with a mask painted over it, and the result beside it.
import { html, useLayoutEffect, useRef, useState } from "./vendor/preact-htm.js";
import { Running, Tile } from "./gallery.js";
import { modelOf } from "./fields.js";
import { Mask } from "./mask.js";
import { app, notify, update, useApp } from "./state.js";
import { urlOf } from "./store.js";
import { text } from "./text.js";
import { FieldError, FileButton, Slider, sizeOf } from "./ui.js";

const { edit } = text;

/** Make an image the input of edits, and show the edit view. */
export async function setSource(blob) {
  try {
    update({ source: { blob, ...(await sizeOf(blob)), mask: null }, tab: "edit", viewed: null });
  } catch {
    notify(text.errors.noImage(blob.name ?? text.fields.image));
  }
}

export function Edit() {
  const { source, images, requests } = useApp();
  if (!source) return html`<${Choose} images=${images} />`;
  const running = requests.find((request) => request.edit?.source === source.blob);
  const result = images.find((image) => image.source === source.blob);
  return html`<section class="edit" id="images" tabindex="-1" aria-label=${text.tabs.edit}>
    <div class="sides">
      <figure>
        <figcaption>${edit.original}</figcaption>
        <${MaskEditor} key=${urlOf(source.blob)} source=${source} />
      </figure>
      <figure>
        <figcaption>${edit.result}</figcaption>
        <ul class="tiles result">${running
          ? html`<${Running} request=${{ ...running, tiles: running.tiles.slice(0, 1) }} />`
          : result
            ? html`<${Tile} key=${result.id} image=${result} />`
            : html`<li class="empty">${edit.noResult}</li>`}</ul>
      </figure>
    </div>
    <ul class="tiles small">${images.slice(0, 24).map((image) => html`<${Tile} key=${image.id} image=${image} />`)}</ul>
  </section>`;
}

function Choose({ images }) {
  return html`<section class="edit" id="images" tabindex="-1" aria-label=${text.tabs.edit}>
    <div class="empty drop"><p>${edit.drop}</p><${FileButton} label=${text.chooseFile} onFile=${setSource} /></div>
    <ul class="tiles">${images.map((image) => html`<${Tile} key=${image.id} image=${image} onClick=${() => setSource(image.blob)} />`)}</ul>
  </section>`;
}

function MaskEditor({ source }) {
  const canvas = useRef();
  const mask = useRef();
  const { width, height } = source;
  const [brush, setBrush] = useState({ size: Math.round(Math.min(width, height) / 4), softness: 0.3, erase: false });
  const [cursor, setCursor] = useState(null); // where the brush is shown
  const hasMask = modelOf(app).options.includes("mask");
  const change = (patch) => setBrush((old) => ({ ...old, ...patch }));
  const act = (name, ...values) => () => (mask.current[name](...values), setCursor(mask.current.cursor));
  const resize = (factor) => () => change({ size: Math.max(2, Math.min(width, Math.round(brush.size * factor))) });
  const move = (x, y) => act("move", x * brush.size * 0.5, y * brush.size * 0.5);
  const switchEraser = () => change({ erase: !brush.erase });
  const actions = {
    ArrowLeft: move(-1, 0),
    ArrowRight: move(1, 0),
    ArrowUp: move(0, -1),
    ArrowDown: move(0, 1),
    " ": act("dab", brush),
    "[": resize(0.8),
    "]": resize(1.25),
    e: switchEraser,
    i: act("invert"),
    "ctrl z": act("undo"),
  };
  useLayoutEffect(() => {
    const keep = () => update({ source: { ...app.source, mask: mask.current.toBlob(), pixels: mask.current.pixels() } });
    if (hasMask) mask.current = new Mask(canvas.current, source, keep);
  }, [hasMask]);
  const onKey = (event) => {
    const action = actions[event.ctrlKey || event.metaKey ? `ctrl ${event.key}` : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  };
  const down = (event) => {
    event.currentTarget.setPointerCapture(event.pointerId);
    act("start", event, brush)();
  };
  const percent = (part, all) => `${(part / all) * 100}%`;
  const ring = cursor && { left: percent(cursor.x, width), top: percent(cursor.y, height), width: percent(brush.size, width) };
  const slider = (name, limits) => html`<label>${edit[name]}
    <${Slider} ...${limits} value=${brush[name]} onChange=${(value) => change({ [name]: value })} /></label>`;
  return html`<div class="mask-canvas" style=${{ aspectRatio: `${width} / ${height}`, maxWidth: `${(62 * width) / height}vh` }}>
      <img src=${urlOf(source.blob)} alt=${text.fields.image} draggable=${false} />
      ${hasMask && html`<canvas ref=${canvas} tabindex="0" role="application" aria-label=${edit.canvas} onKeyDown=${onKey}
        onFocus=${() => setCursor(mask.current.cursor)} onBlur=${() => setCursor(null)} onPointerLeave=${() => setCursor(null)}
        onPointerDown=${down} onPointerMove=${(event) => act("draw", event, brush)()} onPointerUp=${act("end")}></canvas>`}
      ${ring && html`<div class="brush" style=${ring}></div>`}
    </div>
    ${hasMask && html`<p class="hint">${edit.hint}</p>
    <div class="toolbar" data-field="mask">
      ${slider("size", { min: 2, max: width, step: 1 })}${slider("softness", { min: 0, max: 1, step: 0.05 })}
      <button type="button" aria-pressed=${String(brush.erase)} onClick=${switchEraser}>${edit.erase}</button>
      ${["invert", "undo", "clear"].map((name) => html`<button type="button" onClick=${() => mask.current[name]()}>${edit[name]}</button>`)}
      <${FieldError} name="mask" />
    </div>`}
    <div class="toolbar" data-field="image"><${FileButton} label=${edit.another} onFile=${setSource} />
      <button type="button" onClick=${() => update({ source: null })}>${text.removeFile}</button>
      <${FieldError} name="image" /></div>`;
}
