// Requests that run or failed, and the images of this browser.
import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { cancel, retry } from "./requests.js";
import { app, update, useApp } from "./state.js";
import { deleteImages, download, extensionOf, urlOf } from "./store.js";
import { text } from "./text.js";
import { FileButton } from "./ui.js";
import { zip } from "./zip.js";

const { gallery, progress } = text;

export const nameOf = (image) => {
  const words = image.body.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50);
  return `${words || "image"}-${image.seed}.${extensionOf(image.blob)}`;
};

export function Gallery({ takeFile }) {
  const { images, requests } = useApp();
  const settingsOfFile = html`<${FileButton} label=${gallery.settingsOfFile} onFile=${takeFile} />`;
  return html`<section id="images" tabindex="-1" aria-label=${gallery.label}>
    ${images.length > 0 &&
    html`<div class="toolbar">
      <span>${gallery.count(images.length)}</span>
      ${settingsOfFile}
      <button type="button" onClick=${() => downloadAll(images)}>${gallery.downloadAll}</button>
      <button type="button" onClick=${deleteAll}>${gallery.deleteAll}</button>
    </div>`}
    ${images.length + requests.length === 0 &&
    html`<div class="empty"><h2>${gallery.empty}</h2><p>${gallery.emptyHint}</p>${settingsOfFile}</div>`}
    <ul class="tiles">
      ${requests.map((request) => html`<${Running} key=${`r${request.id}`} request=${request} />`)}
      ${images.map((image) => html`<${Tile} key=${image.id} image=${image} />`)}
    </ul>
  </section>`;
}

export function Tile({ image, onClick = () => update({ viewed: image.id }) }) {
  return html`<li class="tile">
    <button type="button" class="open" aria-label=${gallery.open(image.body.prompt, image.seed)} onClick=${onClick}>
      <img src=${urlOf(image.blob)} alt="" loading="lazy" draggable=${false} />
    </button>
    ${image.understood && html`<p class="state">${gallery.understood(image.understood)}</p>`}
  </li>`;
}

/** The images of one request while they form; its state in words, and what to do about it. */
export function Running({ request }) {
  const { state, tiles, step, steps } = request;
  const shown = state === "failed" || state === "waiting" ? tiles.slice(0, 1) : tiles;
  return shown.map(
    (tile, index) => html`<li class=${`tile running ${state}`} key=${index}>
      <div class="open">${tile.preview ? html`<img src=${tile.preview} alt="" />` : html`<span class="waiting"></span>`}</div>
      ${index === 0 && html`<${State} request=${request} />`}
      ${state === "running" && steps && html`<progress aria-label=${request.body.prompt} max=${steps} value=${step ?? 0}></progress>`}
    </li>`,
  );
}

function State({ request }) {
  const { state, position, step, steps, seconds, error, retryAt } = request;
  const left = useSecondsUntil(state === "waiting" ? retryAt : null);
  const sentence = {
    sent: progress.sent,
    queued: progress.queued(position, seconds),
    running: progress.running(step, steps, seconds),
    waiting: progress.waiting(left),
    failed: error,
  }[state];
  return html`<div class="state">
    <p role=${state === "failed" ? "alert" : undefined}>${state === "failed" && html`<strong>${progress.failed}. </strong>`}${sentence}</p>
    ${state === "failed" && html`<button type="button" onClick=${() => retry(request)}>${progress.retry}</button>`}
    <button type="button" onClick=${() => cancel(request)}>${state === "failed" ? progress.dismiss : progress.cancel}</button>
  </div>`;
}

function useSecondsUntil(time) {
  const [, tick] = useState(0);
  useEffect(() => {
    if (time === null) return undefined;
    const timer = setInterval(() => tick((count) => count + 1), 500);
    return () => clearInterval(timer);
  }, [time]);
  return time === null ? 0 : Math.max(0, Math.ceil((time - Date.now()) / 1000));
}

async function downloadAll(images) {
  const files = images.map((image, index) => ({
    name: `${String(images.length - index).padStart(4, "0")}-${nameOf(image)}`,
    blob: image.blob,
    date: new Date(image.created),
  }));
  download(await zip(files), "hypergen-images.zip");
}

async function deleteAll() {
  if (!confirm(gallery.confirmDelete(app.images.length))) return;
  update({ images: [], viewed: null });
  await deleteImages();
}
