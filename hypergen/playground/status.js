// The strip at the bottom: what the server does. Reads /health every two seconds while the page is visible.
import { html } from "./vendor/preact-htm.js";
import { get, key } from "./api.js";
import { modelOf } from "./fields.js";
import { app, update } from "./state.js";
import { text } from "./text.js";

const INTERVAL_MS = 2000;
const { status } = text;
let last = null; // { at, steps } of the previous answer

export function watchHealth() {
  readHealth();
  setInterval(() => document.hidden || (app.needsKey && !key()) || readHealth(), INTERVAL_MS);
}

export async function readHealth() {
  try {
    const health = await get("health");
    update({ offline: false });
    // Without a valid key, the answer is the status alone.
    if (!health.models) return update({ needsKey: true, asksKey: app.asksKey || !app.needsKey });
    const now = { at: performance.now(), steps: health.engines.reduce((sum, engine) => sum + engine.image_steps, 0) };
    if (last && now.steps >= last.steps) health.stepsPerSecond = ((now.steps - last.steps) / (now.at - last.at)) * 1000;
    last = now;
    update({ needsKey: false, health, models: health.models });
    if (app.schema) return;
    const { paths } = await get("openapi.json");
    const { schema } = paths["/v1/images/generations"].post.requestBody.content["application/json"];
    update({ schema: schema.properties });
  } catch {
    update({ offline: true });
  }
}

export function Status() {
  const { health, offline, needsKey } = app;
  const state = offline ? "offline" : (health?.status ?? "loading");
  return html`<footer class="status" aria-label=${status.label}>
    <span class=${`dot ${state}`} aria-hidden="true"></span>
    <span>${needsKey && !health && !offline ? text.key.title : status.states[state]}</span>
    ${health && !offline && figures(health).map((figure) => html`<span class="figure">${figure}</span>`)}
  </footer>`;
}

function figures(health) {
  const model = modelOf(app);
  const perForward = Math.max(...health.engines.map((engine) => engine.images_per_forward ?? 0));
  const input = app.tab === "edit" && app.source ? `${app.source.width}x${app.source.height}` : model.defaults.size;
  const size = app.settings.size || input || "";
  const verdict = health.engines.map(({ determinism }) => determinism[size] ?? determinism[`${model.id} ${size}`]).find(Boolean);
  return [
    health.reason,
    status.running(health.running),
    status.waiting(health.waiting + health.overflow),
    perForward > 0 && status.perForward(perForward),
    health.stepsPerSecond > 0 && status.speed(health.stepsPerSecond),
    size && `${size.replace("x", " × ")}: ${status.verdict[verdict] ?? status.unprobed}`,
    status.memory(app.models.filter((served) => served.in_memory).map(({ id }) => id)),
  ].filter(Boolean);
}
