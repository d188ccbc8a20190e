// The page: its frame, its shortcuts, and what is dropped or pasted onto it.
import { html, render, useEffect, useState } from "./vendor/preact-htm.js";
import { key, setKey } from "./api.js";
import { Form, submit, useSettings } from "./form.js";
import { Gallery } from "./gallery.js";
import { cancelAll } from "./requests.js";
import { app, attempt, notify, update, useApp } from "./state.js";
import { Status, readHealth } from "./status.js";
import { loadImages } from "./store.js";
import { text } from "./text.js";
import { Dialog, IconButton } from "./ui.js";
import { CodeDialog } from "./code.js";
import { Edit, setSource } from "./edit.js";
import { Grid } from "./grid.js";
import { readSettings } from "./metadata.js";
import { Viewer } from "./viewer.js";

const THEME = "hypergen.theme";
const MAIN = { generate: Gallery, edit: Edit, grid: Grid };

function Page() {
  const { tab, viewed, needsKey, asksKey, notice, announcement } = useApp();
  const [code, setCode] = useState(false);
  const Main = MAIN[tab];
  return html`<a class="skip" href="#images">${text.skip}</a>
    <header class="top">
      <h1>${text.title}</h1>
      <nav role="tablist" aria-label=${text.views}>
        ${Object.entries(text.tabs).map(
          ([name, label]) => html`<button type="button" role="tab" aria-selected=${String(tab === name)} onClick=${() => update({ tab: name, errors: {} })}>${label}</button>`,
        )}
      </nav>
      <span class="space"></span>
      ${(needsKey || key()) && html`<button type="button" onClick=${() => update({ asksKey: true })}>${text.key.label}</button>`}
      <a href="docs" title=${text.apiDocsTitle}>${text.apiDocs}</a>
      <${IconButton} label=${text.theme} onClick=${changeTheme}>◐<//>
    </header>
    <main>
      <${Form} showCode=${() => setCode(true)} />
      <div class="content"><${Main} takeFile=${takeFile} /></div>
    </main>
    <${Status} />
    ${viewed && html`<${Viewer} key="viewer" />`}
    ${code && html`<${CodeDialog} onClose=${() => setCode(false)} />`}
    ${asksKey && html`<${KeyDialog} />`}
    <p class="hidden" role="status">${announcement}</p>
    <div class="notices" role="status">${notice && html`<${Notice} notice=${notice} />`}</div>`;
}

function Notice({ notice }) {
  useEffect(() => {
    const timer = setTimeout(() => app.notice === notice && update({ notice: null }), 8000);
    return () => clearTimeout(timer);
  }, [notice]);
  return html`<div class="notice"><span>${notice.text}</span>
    ${notice.action && html`<button type="button" onClick=${() => (update({ notice: null }), notice.run())}>${notice.action}</button>`}
    <${IconButton} label=${text.close} onClick=${() => update({ notice: null })}>✕<//>
  </div>`;
}

function KeyDialog() {
  const [value, setValue] = useState("");
  const [wrong] = useState(Boolean(key()));
  const save = async (event) => {
    event.preventDefault();
    setKey(value.trim());
    update({ needsKey: false, asksKey: false });
    await readHealth(); // asks again if the key is wrong
  };
  return html`<${Dialog} title=${text.key.title} className="small" onClose=${() => update({ asksKey: false })}>
    <form onSubmit=${save}>
      <p>${text.key.hint}</p>
      ${wrong && html`<p class="error" role="alert">${text.key.wrong}</p>`}
      <label>${text.key.label}<input type="password" autocomplete="off" autofocus value=${value} onInput=${(event) => setValue(event.target.value)} /></label>
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
  const found = await readSettings(file).catch(() => null);
  if (found) return useSettings(found.settings, text.notice.settingsOf(file.name, found.from));
  return notify(text.errors.noSettings(file.name), text.notice.useAsInput, () => setSource(file));
}

addEventListener("keydown", onKey);
addEventListener("drop", (event) => takeFrom(event, event.dataTransfer));
addEventListener("paste", (event) => takeFrom(event, event.clipboardData));
addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
const theme = attempt(() => localStorage.getItem(THEME));
if (theme) document.documentElement.dataset.theme = theme;
render(html`<${Page} />`, document.body);
loadImages().then(
  (images) => update({ images: [...app.images, ...images] }),
  () => notify(text.errors.storageClosed),
);
