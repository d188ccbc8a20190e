// The state of the page: one object, changed by `update`, read by all components.
import { useState } from "./vendor/preact-htm.js";
import { EMPTY } from "./fields.js";

const SAVED = "hypergen.settings"; // so that a reload loses nothing that was typed
const NOTICE_MS = 8000;
let render = () => {};

/** The result of an action on localStorage; undefined if it is full or forbidden. */
export function attempt(action) {
  try {
    return action();
  } catch {
    return undefined; // the page itself still has what it should keep
  }
}

export const app = {
  tab: "generate", // or "edit", "grid"
  settings: { ...EMPTY, ...attempt(() => JSON.parse(localStorage.getItem(SAVED))) },
  errors: {}, // field -> sentence of the server
  health: null, // the latest answer of /health, with `stepsPerSecond`
  models: [], // its models
  offline: false,
  needsKey: false, // the server has keys, and has accepted none of ours
  asksKey: false, // the dialog is open
  asksCode: false,
  schema: null, // field -> its JSON schema in /openapi.json
  requests: [], // unfinished and failed ones, newest first
  images: [], // of this browser, newest first
  viewed: null, // id of the image in the large view
  source: null, // of edits: { blob, width, height, mask: a promise of a blob, or null; pixels: the painted mask }
  grid: null,
  notice: null, // { message, action, run }
  announcement: "", // for screen readers
};

/** For the root component: it and all below it render again after each update. */
export function useUpdates() {
  const [, setCount] = useState(0);
  render = () => setCount((count) => count + 1);
}

export function update(patch) {
  Object.assign(app, patch);
  render();
}

export function setSettings(patch) {
  const errors = Object.entries(app.errors).filter(([name]) => !(name in patch || (name === "sampler" && "scheduler" in patch)));
  update({ settings: { ...app.settings, ...patch }, errors: Object.fromEntries(errors) });
  attempt(() => localStorage.setItem(SAVED, JSON.stringify({ ...app.settings, control_image: null })));
}

export function notify(message, action, run) {
  const notice = { message, action, run };
  update({ notice });
  setTimeout(() => app.notice === notice && update({ notice: null }), NOTICE_MS);
}
