// Requests that run or failed, and the images of this browser.
import { html } from "./vendor/preact-htm.js";
import { downloadZip } from "./vendor/client-zip.js";
import { cancel, retry } from "./requests.js";
import { app, update } from "./state.js";
import { deleteImages, download, urlOf } from "./store.js";
import { text } from "./text.js";
import { FileButton } from "./ui.js";

const { gallery } = text;

export function nameOf({ body, seed, blob }) {
  const words = body.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50);
  return `${words || "image"}-${seed}.${blob.type.replace("image/", "").replace("jpeg", "jpg")}`;
}

export function Gallery({ takeFile }) {
  const { images, requests } = app;
  const settingsOfFile = html`<${FileButton} label=${gallery.settingsOfFile} onFile=${takeFile} />`;
  return html`<section id="images" tabindex="-1" aria-label=${gallery.label}>
    ${images.length > 0 &&
    html`<div class="toolbar">
      <span>${gallery.count(images.length)}</span>
      ${settingsOfFile}
      <button type="button" onClick=${downloadAll}>${gallery.downloadAll}</button>
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

export function Tile({ image, onClick }) {
  return html`<li class="tile">
    <${ImageButton} image=${image} onClick=${onClick} />
    ${image.understood && html`<p class="state">${gallery.understood(image.understood)}</p>`}
  </li>`;
}

export function ImageButton({ image, onClick = () => update({ viewed: image.id }) }) {
  return html`<button type="button" class="open" aria-label=${gallery.open(image.body.prompt, image.seed)} onClick=${onClick}>
    <img src=${urlOf(image.blob)} alt="" loading="lazy" draggable=${false} />
  </button>`;
}

/** An image while it forms. */
export function Preview({ src }) {
  const image = src ? html`<img src=${src} alt="" />` : html`<span class="waiting"></span>`;
  return html`<div class="open">${image}</div>`;
}

/** The images of one request while they form; its state in words, and what to do about it. */
export function Running({ request, most = Infinity }) {
  const { state, previews, step, steps } = request;
  const isFailed = state === "failed";
  const controls = () => html`<div class="state">
    <p role=${isFailed ? "alert" : undefined}>${isFailed && html`<strong>${text.failed}. </strong>`}${text.progress[state](request)}</p>
    ${isFailed && html`<button type="button" onClick=${() => retry(request)}>${text.retry}</button>`}
    <button type="button" onClick=${() => cancel(request)}>${isFailed ? text.dismiss : text.cancel}</button>
  </div>`;
  return previews.slice(0, isFailed || state === "waiting" ? 1 : most).map(
    (src, index) => html`<li class=${`tile running ${state}`} key=${index}>
      <${Preview} src=${src} />
      ${index === 0 && controls()}
      ${state === "running" && steps && html`<progress aria-label=${request.body.prompt} max=${steps} value=${step ?? 0}></progress>`}
    </li>`,
  );
}

async function downloadAll() {
  const files = app.images.map((image, index) => ({
    name: `${String(app.images.length - index).padStart(4, "0")}-${nameOf(image)}`,
    input: image.blob,
    lastModified: new Date(image.created),
  }));
  download(await downloadZip(files).blob(), "hypergen-images.zip");
}

async function deleteAll() {
  if (!confirm(gallery.confirmDelete(app.images.length))) return;
  update({ images: [], viewed: null });
  await deleteImages();
}
