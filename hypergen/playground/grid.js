// A grid of images over two axes: each cell is one request, and the grid can be saved as one image.
import { html, useState } from "./vendor/preact-htm.js";
import { modelOf, toBody } from "./fields.js";
import { checkPrompt } from "./form.js";
import { ImageButton, Preview } from "./gallery.js";
import { cancelAll, generate } from "./requests.js";
import { app, setSettings, update } from "./state.js";
import { download } from "./store.js";
import { text } from "./text.js";
import { Select } from "./ui.js";

const MOST_CELLS = 100;
const AT_ONCE = 4; // so that others are served, too
const NUMERIC = ["num_inference_steps", "guidance_scale", "lora"];
const { grid: texts } = text;
const NONE = { kind: "none", values: "" };

const split = (values) => values.split(",").map((value) => value.trim()).filter(Boolean);

/** What may change with this model, and values to start with: kind -> values. */
function suggestions() {
  const { samplers, schedules, loras } = modelOf(app);
  const lora = loras.find((name) => name in app.settings.loras) ?? loras[0];
  const list = (names) => names.slice(0, 8).join(", ");
  return {
    none: "",
    seed: "1, 2, 3",
    num_inference_steps: "2, 4, 8, 16, 32",
    guidance_scale: "1, 2, 4, 7, 12",
    sampler: list(samplers),
    scheduler: list(schedules[app.settings.sampler] ?? ["karras", "exponential"]),
    words: "",
    ...(lora && { lora: `${lora} 0, 0.5, 1` }),
    ...(app.models.length > 1 && { model: list(app.models.map(({ id }) => id)) }),
  };
}

/** What may change with this model: [kind, its name] each. */
export const axisKinds = () =>
  Object.keys(suggestions()).map((kind) => [kind, texts.kinds[kind] ?? text.fields[kind]]);

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
  const label = (value) => (kind === "sampler" || kind === "model" ? value : `${text.fields[kind]} ${value}`);
  return all.map((value) => [label(value), (cell) => ({ ...cell, [kind]: isNumeric ? Number(value) : value })]);
}

/** A grid with the settings of an image, one of which changes. */
export function startGrid(kind, settings) {
  setSettings({ ...settings, n: 1, rows: NONE });
  setSettings({ columns: { kind, values: suggestions()[kind] ?? "" } });
  update({ tab: "grid", viewed: null, grid: null });
}

/** Fill a grid; throws an Error with a sentence if an axis cannot be read. */
async function run(columns, rows) {
  if (!checkPrompt()) return;
  const form = toBody(app);
  // The same noise in every cell, unless the seed is an axis.
  const body = { ...form, n: undefined, seed: form.seed ?? String(crypto.getRandomValues(new Uint32Array(1))[0]) };
  const [across, down] = [readAxis(columns, body), readAxis(rows, body)];
  if (across.length * down.length > MOST_CELLS) throw new Error(texts.tooMany(MOST_CELLS));
  const toCell = (ofRow, ofColumn) => ({ body: ofColumn(ofRow(body)), image: null, error: null });
  const cells = down.map(([, ofRow]) => across.map(([, ofColumn]) => toCell(ofRow, ofColumn)));
  const grid = { cells, across: across.map(([label]) => label), down: down.map(([label]) => label) };
  update({ grid });
  const left = cells.flat();
  await Promise.all(Array.from({ length: AT_ONCE }, () => work(left, grid)));
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
  const { grid, requests, settings } = app;
  const { columns = { kind: "seed", values: suggestions().seed }, rows = NONE } = settings;
  const [error, setError] = useState(null);
  const start = (event) => {
    event.preventDefault();
    setError(null);
    run(columns, rows).catch(({ message }) => setError(message));
  };
  const lengths = [columns, rows].map(({ kind, values }) => (kind === "none" ? 1 : split(values).length || 1));
  return html`<section class="grid" id="images" tabindex="-1" aria-label=${text.tabs.grid}>
    <form class="axes" onSubmit=${start}>
      <${Axis} label=${texts.columns} axis=${columns} onChange=${(axis) => setSettings({ columns: axis })} />
      <${Axis} label=${texts.rows} axis=${rows} onChange=${(axis) => setSettings({ rows: axis })} />
      <button class="primary">${texts.run(lengths[0] * lengths[1])}</button>
      ${requests.length > 0 && html`<button type="button" onClick=${cancelAll}>${text.cancel}</button>`}
      ${grid && html`<button type="button" onClick=${() => save(grid)}>${texts.save}</button>`}
    </form>
    ${error && html`<p class="error" role="alert">${error}</p>`}
    ${grid ? html`<${Table} grid=${grid} />` : html`<div class="empty"><p>${texts.empty}</p></div>`}
  </section>`;
}

function Axis({ label, axis: { kind, values }, onChange }) {
  const suggested = suggestions();
  const choose = (other) => onChange({ kind: other, values: suggested[other] });
  const enter = ({ target }) => onChange({ kind, values: target.value });
  return html`<fieldset><legend>${label}</legend>
    <${Select} aria-label=${label} value=${kind} options=${axisKinds()} onChange=${choose} />
    ${kind !== "none" &&
    html`<input aria-label=${`${label}: ${texts.values}`} value=${values}
      placeholder=${suggested[kind] || texts.words} onInput=${enter} />`}
  </fieldset>`;
}

function Table({ grid }) {
  const row = (cells, index) => html`<tr>
    <th scope="row">${grid.down[index]}</th>${cells.map((cell) => html`<td><${Cell} cell=${cell} /></td>`)}
  </tr>`;
  return html`<div class="scroll"><table>
    <caption class="hidden">${texts.caption}</caption>
    <thead><tr><td></td>${grid.across.map((label) => html`<th scope="col">${label}</th>`)}</tr></thead>
    <tbody>${grid.cells.map(row)}</tbody>
  </table></div>`;
}

function Cell({ cell: { image, error, body } }) {
  if (image) return html`<${ImageButton} image=${image} />`;
  if (error) return html`<p class="open error" role="alert">${error}</p>`;
  return html`<${Preview} src=${app.requests.find((request) => request.body === body)?.previews[0]} />`;
}

/** The grid with its labels as one PNG. */
async function save({ cells, across, down }) {
  const images = await Promise.all(cells.flat().map(({ image }) => image && createImageBitmap(image.blob)));
  const most = (side) => Math.max(64, ...images.map((image) => image?.[side] ?? 0));
  const [width, height] = [most("width"), most("height")];
  const size = Math.max(12, Math.round(width / 16));
  const font = `${size}px system-ui, sans-serif`;
  const gap = Math.round(size / 2);
  const context = document.createElement("canvas").getContext("2d");
  context.font = font;
  const left = Math.max(...down.map((label) => context.measureText(label).width)) + (down[0] ? 2 * gap : 0);
  const top = across[0] ? size + 2 * gap : 0;
  const [x, y] = [(column) => left + column * (width + gap), (row) => top + row * (height + gap)];
  Object.assign(context.canvas, { width: x(across.length), height: y(down.length) });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  Object.assign(context, { fillStyle: "#18181b", font, textBaseline: "middle" });
  across.forEach((label, column) => context.fillText(label, x(column), top / 2, width));
  down.forEach((label, row) => context.fillText(label, gap, y(row) + height / 2));
  for (const [index, image] of images.entries()) {
    if (image) context.drawImage(image, x(index % across.length), y(Math.floor(index / across.length)));
  }
  context.canvas.toBlob((blob) => download(blob, "hypergen-grid.png"));
}
