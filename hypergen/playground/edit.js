// Edits: the input image with a mask painted over it, and the result beside it.
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { Running, Tile } from "./gallery.js";
import { modelOf } from "./fields.js";
import { Mask } from "./mask.js";
import { app, notify, update, useApp } from "./state.js";
import { urlOf } from "./store.js";
import { text } from "./text.js";
import { FileButton, sizeOf } from "./ui.js";

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
  const [brush, setBrush] = useState({ size: Math.round(Math.min(source.width, source.height) / 4), softness: 0.3, erase: false });
  const hasMask = modelOf(app).options.includes("mask");
  const change = (patch) => setBrush((old) => ({ ...old, ...patch }));
  const keep = () => update({ source: { ...app.source, mask: mask.current.toBlob() } });
  useEffect(() => {
    mask.current = new Mask(canvas.current, source, keep);
  }, []);
  const resize = (factor) => change({ size: Math.max(2, Math.min(source.width, Math.round(brush.size * factor))) });
  const onKey = (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const actions = { " ": () => mask.current.dab(brush), "[": () => resize(0.8), "]": () => resize(1.25), e: () => change({ erase: !brush.erase }), i: () => mask.current.invert() };
    if (move) mask.current.move(move[0] * brush.size * 0.5, move[1] * brush.size * 0.5, brush);
    else if ((event.ctrlKey || event.metaKey) && event.key === "z") mask.current.undo();
    else if (actions[event.key] && !event.ctrlKey) actions[event.key]();
    else return;
    event.preventDefault();
  };
  const down = (event) => {
    event.currentTarget.setPointerCapture(event.pointerId);
    mask.current.start(event, brush);
  };
  return html`<div class="mask-canvas" style=${{ aspectRatio: `${source.width} / ${source.height}` }}>
      <img src=${urlOf(source.blob)} alt=${text.fields.image} draggable=${false} />
      ${hasMask && html`<canvas ref=${canvas} tabindex="0" role="application" aria-label=${edit.canvas} onKeyDown=${onKey}
        onPointerDown=${down} onPointerMove=${(event) => mask.current.draw(event, brush)} onPointerUp=${() => mask.current.end()}></canvas>`}
    </div>
    ${hasMask && html`<p class="hint">${edit.hint}</p>
    <div class="toolbar" data-field="mask">
      <label>${edit.size}<input class="slider" type="range" min="2" max=${source.width} value=${brush.size} onInput=${(event) => change({ size: Number(event.target.value) })} /></label>
      <label>${edit.softness}<input class="slider" type="range" min="0" max="1" step="0.05" value=${brush.softness} onInput=${(event) => change({ softness: Number(event.target.value) })} /></label>
      <button type="button" aria-pressed=${String(brush.erase)} onClick=${() => change({ erase: !brush.erase })}>${edit.erase}</button>
      <button type="button" onClick=${() => mask.current.invert()}>${edit.invert}</button>
      <button type="button" onClick=${() => mask.current.undo()}>${edit.undo}</button>
      <button type="button" onClick=${() => mask.current.clear()}>${edit.clear}</button>
    </div>`}
    ${app.errors.mask && html`<p class="error" role="alert">${app.errors.mask}</p>`}
    <div class="toolbar" data-field="image"><${FileButton} label=${edit.another} onFile=${setSource} />
      <button type="button" onClick=${() => update({ source: null })}>${text.removeFile}</button></div>
    ${app.errors.image && html`<p class="error" role="alert">${app.errors.image}</p>`}`;
}
