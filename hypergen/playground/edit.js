// Edits: the input image with a mask painted over it, and the result beside it.
import { html, useLayoutEffect, useRef, useState } from "./vendor/preact-htm.js";
import { modelOf } from "./fields.js";
import { Running, Tile } from "./gallery.js";
import { Mask } from "./mask.js";
import { app, notify, update } from "./state.js";
import { urlOf } from "./store.js";
import { text } from "./text.js";
import { FieldError, FileButton, Slider, keyHandler } from "./ui.js";

const RECENT = 24; // images below an edit
const { edit } = text;

/** Make an image the input of edits, and show the edit view. */
export async function setSource(blob) {
  try {
    const { width, height } = await createImageBitmap(blob);
    update({ source: { blob, width, height, mask: null }, tab: "edit", viewed: null });
  } catch {
    notify(text.errors.noImage(blob.name ?? text.fields.image));
  }
}

export function Edit() {
  const { source, images } = app;
  const tile = (image) => html`<${Tile} key=${image.id} image=${image} onClick=${source ? undefined : () => setSource(image.blob)} />`;
  return html`<section class="edit" id="images" tabindex="-1" aria-label=${text.tabs.edit}>
    ${source
      ? html`<${Sides} source=${source} />`
      : html`<div class="empty drop"><p>${edit.drop}</p><${FileButton} label=${text.chooseFile} onFile=${setSource} /></div>`}
    <ul class=${source ? "tiles small" : "tiles"}>${images.slice(0, source ? RECENT : Infinity).map(tile)}</ul>
  </section>`;
}

function Sides({ source }) {
  const running = app.requests.find((request) => request.edit?.blob === source.blob);
  const image = app.images.find((other) => other.source === source.blob);
  const result = image ? html`<${Tile} key=${image.id} image=${image} />` : html`<li class="empty">${edit.noResult}</li>`;
  return html`<div class="sides">
    <figure>
      <figcaption>${edit.original}</figcaption>
      <${MaskEditor} key=${urlOf(source.blob)} source=${source} />
    </figure>
    <figure>
      <figcaption>${edit.result}</figcaption>
      <ul class="tiles result">${running ? html`<${Running} request=${running} most=${1} />` : result}</ul>
    </figure>
  </div>`;
}

function MaskEditor({ source }) {
  const { width, height, blob } = source;
  const canvas = useRef();
  const mask = useRef();
  const [brush, setBrush] = useState({ size: Math.round(Math.min(width, height) / 4), softness: 0.3, erase: false });
  const [cursor, setCursor] = useState({ x: width / 2, y: height / 2 }); // of the brush, in pixels of the image
  const hasMask = modelOf(app).options.includes("mask");
  useLayoutEffect(() => {
    if (hasMask) mask.current = new Mask(canvas.current, source);
  }, [hasMask]);
  const keep = () => update({ source: { ...app.source, mask: mask.current.toBlob(), pixels: mask.current.pixels } });
  const act = (name) => () => (mask.current[name](), keep());
  const dot = (at) => (mask.current.remember(), mask.current.line(at, at, brush));
  const within = (value, most) => Math.max(0, Math.min(most, value));
  const move = (x, y) =>
    setCursor({ x: within(cursor.x + (x * brush.size) / 2, width), y: within(cursor.y + (y * brush.size) / 2, height) });
  const change = (patch) => setBrush({ ...brush, ...patch });
  const resize = (factor) => () => change({ size: Math.max(2, Math.min(width, Math.round(brush.size * factor))) });
  const switchEraser = () => change({ erase: !brush.erase });
  const onKeyDown = keyHandler(move, {
    " ": () => (dot(cursor), keep()),
    "[": resize(0.8), "]": resize(1.25), e: switchEraser,
    i: act("invert"), "ctrl z": act("undo"),
  });
  const follow = ({ offsetX, offsetY, pointerId }) => {
    const { clientWidth, clientHeight } = canvas.current;
    const to = { x: (offsetX / clientWidth) * width, y: (offsetY / clientHeight) * height };
    if (canvas.current.hasPointerCapture(pointerId)) mask.current.line(cursor, to, brush);
    setCursor(to);
    return to;
  };
  const start = (event) => {
    dot(follow(event));
    canvas.current.setPointerCapture(event.pointerId);
  };
  const percent = (part, all) => `${(part / all) * 100}%`;
  const ring = { left: percent(cursor.x, width), top: percent(cursor.y, height), width: percent(brush.size, width) };
  const slider = (name, min, max, step) => html`<label>${edit[name]}
    <${Slider} min=${min} max=${max} step=${step} value=${brush[name]} onChange=${(value) => change({ [name]: value })} /></label>`;
  const button = (name) => html`<button type="button" onClick=${act(name)}>${edit[name]}</button>`;
  return html`<div class="mask-canvas" style=${{ aspectRatio: `${width} / ${height}`, maxWidth: `${(62 * width) / height}vh` }}>
      <img src=${urlOf(blob)} alt=${text.fields.image} draggable=${false} />
      ${hasMask &&
      html`<canvas ref=${canvas} tabindex="0" role="application" aria-label=${edit.canvas} onKeyDown=${onKeyDown}
          onPointerDown=${start} onPointerMove=${follow} onPointerUp=${keep}></canvas>
        <div class="brush" style=${ring}></div>`}
    </div>
    ${hasMask && html`<p class="hint">${edit.hint}</p>
    <div class="toolbar" data-field="mask">
      ${slider("size", 2, width, 1)}${slider("softness", 0, 1, 0.05)}
      <button type="button" aria-pressed=${String(brush.erase)} onClick=${switchEraser}>${edit.erase}</button>
      ${["invert", "undo", "clear"].map(button)}
      <${FieldError} name="mask" />
    </div>`}
    <div class="toolbar" data-field="image">
      <${FileButton} label=${edit.another} onFile=${setSource} />
      <button type="button" onClick=${() => update({ source: null })}>${text.removeFile}</button>
      <${FieldError} name="image" />
    </div>`;
}
