// The strip at the bottom: what the server does. Reads /health every two seconds while the page is visible.
import { html, useEffect } from "./vendor/preact-htm.js";
import { get, key } from "./api.js";
import { modelOf } from "./fields.js";
import { app, update, useApp } from "./state.js";
import { text } from "./text.js";

const INTERVAL_MS = 2000;
const { status } = text;
let last = null; // { at, steps } of the previous answer

export async function readHealth() {
  let health;
  try {
    health = await get("health");
  } catch {
    update({ offline: true });
    return;
  }
  if (!health.models) {
    // Without a valid key, the answer is the status alone.
    update({ offline: false, needsKey: true, asksKey: app.asksKey || !app.needsKey });
    return;
  }
  const now = { at: performance.now(), steps: health.engines.reduce((sum, engine) => sum + engine.image_steps, 0) };
  if (last && now.steps >= last.steps) health.stepsPerSecond = ((now.steps - last.steps) / (now.at - last.at)) * 1000;
  last = now;
  update({ offline: false, needsKey: false, health });
  if (!Object.keys(app.schema).length) await readSchema();
}

async function readSchema() {
  const { paths } = await get("openapi.json");
  const body = paths["/v1/images/generations"].post.requestBody.content["application/json"].schema;
  update({ schema: body.properties });
}

export function Status() {
  const { health, offline, needsKey } = useApp();
  useEffect(() => {
    const read = () => document.hidden || (app.needsKey && !key()) || readHealth().catch(() => update({ offline: true }));
    readHealth().catch(() => update({ offline: true }));
    const timer = setInterval(read, INTERVAL_MS);
    return () => clearInterval(timer);
  }, []);
  const state = offline ? "offline" : (health?.status ?? "loading");
  return html`<footer class="status" aria-label=${status.label}>
    <span class=${`dot ${state}`} aria-hidden="true"></span>
    <span>${offline ? status.offline : needsKey && !health ? text.key.title : status.states[state]}</span>
    ${health && !offline && html`<${Figures} health=${health} />`}
  </footer>`;
}

function Figures({ health }) {
  const model = modelOf(app);
  const perForward = health.engines.map((engine) => engine.images_per_forward).filter(Boolean);
  const input = app.tab === "edit" && app.source ? `${app.source.width}x${app.source.height}` : model.defaults.size;
  const size = app.settings.size || input || "";
  const verdict = health.engines.map(({ determinism }) => determinism[size] ?? determinism[`${model.id} ${size}`]).find(Boolean);
  const figures = [
    health.reason,
    status.running(health.running),
    status.waiting(health.waiting + health.overflow),
    perForward.length > 0 && status.perForward(Math.max(...perForward)),
    health.stepsPerSecond > 0 && status.speed(health.stepsPerSecond),
    size && `${size.replace("x", " × ")}: ${status.verdict[verdict] ?? status.unprobed}`,
    status.memory(health.models.filter((served) => served.in_memory).map(({ id }) => id)),
  ];
  return figures.filter(Boolean).map((figure) => html`<span class="figure">${figure}</span>`);
}
