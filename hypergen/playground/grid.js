// A grid of images over two axes: each cell is one request, and the grid can be saved as one image.
import { html, useState } from "./vendor/preact-htm.js";
import { modelOf } from "./fields.js";
import { checkPrompt, requestOfForm } from "./form.js";
import { cancelAll, generate } from "./requests.js";
import { app, setSettings, update, useApp } from "./state.js";
import { download, urlOf } from "./store.js";
import { text } from "./text.js";

const MOST_CELLS = 100;
const AT_ONCE = 4; // so that others are served, too
const NUMERIC = ["num_inference_steps", "guidance_scale", "lora"];
const { grid: texts } = text;
const NONE = { kind: "none", values: "" };

const split = (values) => values.split(",").map((value) => value.trim()).filter(Boolean);

/** The values of an axis as [label, change of a body]; throws an Error with a sentence. */
function readAxis({ kind, values }, body) {
  if (kind === "none") return [["", (cell) => cell]];
  // Before the weights of a LoRA is its name, which may have spaces and numbers.
  const named = modelOf(app).loras.filter((lora) => values.trim().startsWith(`${lora} `));
  const name = kind === "lora" ? named.sort((a, b) => b.length - a.length)[0] : "";
  if (name === undefined) throw new Error(texts.noLora);
  const all = split(values.trim().slice(name.length));
  const isNumeric = NUMERIC.includes(kind);
  if (!all.length || (isNumeric && all.some((value) => Number.isNaN(Number(value))))) throw new Error(texts.badValues);
  if (kind === "lora") {
    return all.map((weight) => [`${name} ${weight}`, (cell) => ({ ...cell, loras: { ...cell.loras, [name]: Number(weight) } })]);
  }
  if (kind === "words") {
    if (!body.prompt.includes(all[0])) throw new Error(texts.noWord(all[0]));
    return all.map((word) => [word, (cell) => ({ ...cell, prompt: cell.prompt.replaceAll(all[0], word) })]);
  }
  const label = (value) => (kind === "sampler" || kind === "model" ? value : `${texts.kinds[kind]} ${value}`);
  return all.map((value) => [label(value), (cell) => ({ ...cell, [kind]: isNumeric ? Number(value) : value })]);
}

/** What may change: kind -> its name. */
export function axisKinds() {
  const { lora, model, ...kinds } = texts.kinds;
  const models = app.health?.models ?? [];
  return { ...kinds, ...(modelOf(app).loras.length && { lora }), ...(models.length > 1 && { model }) };
}

/** Values of an axis to start with. */
function suggest(kind, [ownLora] = []) {
  const { samplers, schedules, loras } = modelOf(app);
  const own = {
    sampler: samplers,
    scheduler: schedules[app.settings.sampler],
    model: (app.health?.models ?? []).map(({ id }) => id),
    lora: [`${ownLora ?? loras[0]} 0`, "0.5", "1"],
    words: [],
  };
  return own[kind]?.slice(0, 8).join(", ") ?? texts.hints[kind] ?? "";
}

/** A grid with the settings of an image, one of which changes. */
export function startGrid(kind, settings) {
  setSettings({ ...settings, n: 1 });
  setSettings({ columns: { kind, values: suggest(kind, Object.keys(settings.loras)) }, rows: NONE });
  update({ tab: "grid", viewed: null, grid: null });
}

async function run(columns, rows) {
  if (!checkPrompt()) return null;
  const form = requestOfForm().body;
  // The same noise in every cell, unless the seed is an axis.
  const body = { ...form, n: undefined, seed: form.seed ?? String(crypto.getRandomValues(new Uint32Array(1))[0]) };
  let across, down;
  try {
    [across, down] = [readAxis(columns, body), readAxis(rows, body)];
    if (across.length * down.length > MOST_CELLS) throw new Error(texts.tooMany(MOST_CELLS));
  } catch (error) {
    return error.message;
  }
  const cells = down.map(([, changeRow]) => across.map(([, changeColumn]) => ({ body: changeColumn(changeRow(body)), image: null, error: null })));
  const grid = { cells, across: across.map(([label]) => label), down: down.map(([label]) => label) };
  update({ grid });
  const left = cells.flat();
  await Promise.all(Array.from({ length: AT_ONCE }, () => work(left, grid)));
  return null;
}

async function work(left, grid) {
  while (left.length && app.grid === grid) {
    const cell = left.shift();
    try {
      const images = await generate(cell.body, null, true);
      if (!images) left.length = 0; // cancelled
      cell.image = images?.[0] ?? null;
    } catch (error) {
      cell.error = error.message;
    }
    update({});
  }
}

export function Grid() {
  const { grid, requests, settings } = useApp();
  const { columns = { kind: "seed", values: texts.hints.seed }, rows = NONE } = settings;
  const [error, setError] = useState(null);
  const start = async (event) => {
    event.preventDefault();
    setError(null);
    setError(await run(columns, rows));
  };
  const count = [columns, rows].reduce((product, { kind, values }) => product * (kind === "none" ? 1 : split(values).length || 1), 1);
  return html`<section class="grid" id="images" tabindex="-1" aria-label=${text.tabs.grid}>
    <form class="axes" onSubmit=${start}>
      <${Axis} label=${texts.columns} axis=${columns} onChange=${(axis) => setSettings({ columns: axis })} />
      <${Axis} label=${texts.rows} axis=${rows} onChange=${(axis) => setSettings({ rows: axis })} />
      <button class="primary">${texts.run(count)}</button>
      ${requests.length > 0 && html`<button type="button" onClick=${cancelAll}>${text.progress.cancel}</button>`}
      ${grid && html`<button type="button" onClick=${() => save(grid)}>${texts.save}</button>`}
    </form>
    ${error && html`<p class="error" role="alert">${error}</p>`}
    ${grid ? html`<${Table} grid=${grid} requests=${requests} />` : html`<div class="empty"><p>${texts.empty}</p></div>`}
  </section>`;
}

function Axis({ label, axis, onChange }) {
  return html`<fieldset><legend>${label}</legend>
    <select aria-label=${label} value=${axis.kind} onChange=${({ target }) => onChange({ kind: target.value, values: suggest(target.value) })}>
      ${Object.entries(axisKinds()).map(([kind, shown]) => html`<option value=${kind} selected=${kind === axis.kind}>${shown}</option>`)}
    </select>
    ${axis.kind !== "none" &&
    html`<input aria-label=${`${label}: ${texts.values}`} value=${axis.values} placeholder=${texts.hints[axis.kind]}
      onInput=${(event) => onChange({ ...axis, values: event.target.value })} />`}
  </fieldset>`;
}

function Table({ grid, requests }) {
  return html`<div class="scroll"><table>
    <caption class="hidden">${texts.caption}</caption>
    <thead><tr><td></td>${grid.across.map((label) => html`<th scope="col">${label}</th>`)}</tr></thead>
    <tbody>${grid.cells.map(
      (row, index) => html`<tr><th scope="row">${grid.down[index]}</th>${row.map((cell) => html`<td><${Cell} cell=${cell} request=${requests.find(({ body }) => body === cell.body)} /></td>`)}</tr>`,
    )}</tbody>
  </table></div>`;
}

function Cell({ cell, request }) {
  if (cell.image) {
    const { id, blob, body, seed } = cell.image;
    return html`<button type="button" class="open" aria-label=${text.gallery.open(body.prompt, seed)} onClick=${() => update({ viewed: id })}><img src=${urlOf(blob)} alt="" /></button>`;
  }
  if (cell.error) return html`<p class="open error" role="alert">${cell.error}</p>`;
  return html`<div class="open">${request?.tiles[0]?.preview ? html`<img src=${request.tiles[0].preview} alt="" />` : html`<span class="waiting"></span>`}</div>`;
}

/** The grid with its labels as one PNG. */
async function save({ cells, across, down }) {
  const images = await Promise.all(cells.map((row) => Promise.all(row.map(({ image }) => image && createImageBitmap(image.blob)))));
  const all = images.flat().filter(Boolean);
  const [width, height] = [Math.max(64, ...all.map((image) => image.width)), Math.max(64, ...all.map((image) => image.height))];
  const font = Math.max(12, Math.round(width / 16));
  const context = document.createElement("canvas").getContext("2d");
  context.font = `${font}px system-ui, sans-serif`;
  const gap = Math.round(font / 2);
  const left = Math.max(...down.map((label) => context.measureText(label).width)) + (down[0] ? 2 * gap : 0);
  const top = across[0] ? font + 2 * gap : 0;
  Object.assign(context.canvas, { width: left + across.length * (width + gap), height: top + down.length * (height + gap) });
  Object.assign(context, { fillStyle: "#fff", font: `${font}px system-ui, sans-serif`, textBaseline: "middle" });
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  context.fillStyle = "#18181b";
  across.forEach((label, x) => context.fillText(label, left + x * (width + gap), top / 2, width));
  down.forEach((label, y) => context.fillText(label, gap, top + y * (height + gap) + height / 2));
  images.forEach((row, y) => row.forEach((image, x) => image && context.drawImage(image, left + x * (width + gap), top + y * (height + gap))));
  context.canvas.toBlob((blob) => download(blob, "hypergen-grid.png"));
}
