// The page: its frame, its shortcuts, and what is dropped or pasted onto it.
import { html, render } from "./vendor/preact-htm.js";
import { key, setKey } from "./api.js";
import { CodeDialog } from "./code.js";
import { Edit, setSource } from "./edit.js";
import { Form, submit, useSettings } from "./form.js";
import { Gallery } from "./gallery.js";
import { Grid } from "./grid.js";
import { readSettings } from "./metadata.js";
import { cancelAll } from "./requests.js";
import { app, attempt, notify, update, useUpdates } from "./state.js";
import { Status, readHealth, watchHealth } from "./status.js";
import { loadImages } from "./store.js";
import { text } from "./text.js";
import { Dialog, IconButton } from "./ui.js";
import { Viewer } from "./viewer.js";

const THEME = "hypergen.theme";
const VIEWS = { generate: Gallery, edit: Edit, grid: Grid };

function Page() {
  useUpdates();
  const { tab, viewed, needsKey, asksKey, asksCode, notice, announcement } = app;
  const tabs = Object.entries(text.tabs).map(([name, label]) => {
    const open = () => update({ tab: name, errors: {} });
    return html`<button type="button" role="tab" aria-selected=${String(tab === name)} onClick=${open}>${label}</button>`;
  });
  return html`<a class="skip" href="#images">${text.skip}</a>
    <header class="top">
      <h1>HyperGen</h1>
      <nav role="tablist" aria-label=${text.views}>${tabs}</nav>
      <span class="space"></span>
      ${(needsKey || key()) && html`<button type="button" onClick=${() => update({ asksKey: true })}>${text.key.label}</button>`}
      <a href="docs">${text.apiDocs}</a>
      <${IconButton} label=${text.theme} onClick=${changeTheme}>◐<//>
    </header>
    <main>
      <${Form} />
      <div class="content"><${VIEWS[tab]} takeFile=${takeFile} /></div>
    </main>
    <${Status} />
    ${viewed && html`<${Viewer} key="viewer" />`}
    ${asksCode && html`<${CodeDialog} />`}
    ${asksKey && html`<${KeyDialog} />`}
    <p class="hidden" role="status">${announcement}</p>
    <div class="notices" role="status">${notice && html`<${Notice} ...${notice} />`}</div>`;
}

function Notice({ message, action, run }) {
  const close = () => update({ notice: null });
  return html`<div class="notice"><span>${message}</span>
    ${action && html`<button type="button" onClick=${() => (close(), run())}>${action}</button>`}
    <${IconButton} label=${text.close} onClick=${close}>✕<//>
  </div>`;
}

function KeyDialog() {
  const save = (event) => {
    event.preventDefault();
    setKey(new FormData(event.target).get("key").trim());
    update({ needsKey: false, asksKey: false });
    readHealth(); // asks again if the key is wrong
  };
  return html`<${Dialog} title=${text.key.title} className="small" onClose=${() => update({ asksKey: false })}>
    <form onSubmit=${save}>
      <p>${text.key.hint}</p>
      ${app.needsKey && key() && html`<p class="error" role="alert">${text.errors.key}</p>`}
      <label>${text.key.label}<input name="key" type="password" autocomplete="off" autofocus /></label>
      <button class="primary">${text.key.save}</button>
    </form>
  <//>`;
}

function changeTheme() {
  const { dataset } = document.documentElement;
  const isDark = (dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  dataset.theme = isDark ? "light" : "dark";
  attempt(() => localStorage.setItem(THEME, dataset.theme));
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") cancelAll();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && app.tab !== "grid") {
    event.preventDefault();
    submit();
  }
}

function takeFrom(event, { files }) {
  if (!files.length) return; // pasted text, for example
  event.preventDefault(); // or the browser would leave the page and show the file
  takeFile([...files].find(({ type }) => type.startsWith("image/")) ?? files[0]);
}

/** In the edit view a file is the input image, elsewhere its settings are read. */
async function takeFile(file) {
  if (app.tab === "edit") return setSource(file);
  const found = await readSettings(file);
  if (found) return useSettings(found.settings, text.settingsOf(file.name, found.from));
  return notify(text.errors.noSettings(file.name), text.viewer.useAsInput, () => setSource(file));
}

addEventListener("keydown", onKey);
addEventListener("drop", (event) => takeFrom(event, event.dataTransfer));
addEventListener("paste", (event) => takeFrom(event, event.clipboardData));
addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
const theme = attempt(() => localStorage.getItem(THEME));
if (theme) document.documentElement.dataset.theme = theme;
render(html`<${Page} />`, document.body);
watchHealth();
loadImages().then(
  (images) => update({ images: [...app.images, ...images] }),
  () => notify(text.errors.storageClosed),
);
