// The state of the page: one object, changed by `update`, read by components with `useApp`.
import { useEffect, useState } from "./vendor/preact-htm.js";
import { EMPTY } from "./fields.js";

const SAVED = "hypergen.settings"; // so that a reload loses nothing that was typed
const listeners = new Set();

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
  offline: false,
  needsKey: false, // the server has keys, and has accepted none of ours
  asksKey: false, // the dialog is open
  schema: {}, // field -> its JSON schema in /openapi.json
  requests: [], // unfinished and failed ones, newest first
  images: [], // of this browser, newest first
  viewed: null, // id of the image in the large view
  source: null, // of edits: { blob, width, height, mask: a promise of a blob, or null; pixels: the painted mask }
  grid: null,
  notice: null, // { text, action, run }
  announcement: "", // for screen readers
};

export function update(patch) {
  Object.assign(app, patch);
  for (const listener of listeners) listener();
}

export function setSettings(patch) {
  const errors = { ...app.errors };
  for (const name of Object.keys(patch)) delete errors[name];
  if ("scheduler" in patch || "sampler" in patch) delete errors.sampler;
  update({ settings: { ...app.settings, ...patch }, errors });
  attempt(() => localStorage.setItem(SAVED, JSON.stringify({ ...app.settings, control_image: null })));
}

export const notify = (message, action, run) => update({ notice: { text: message, action, run } });

/** The state; the component renders again after each change. */
export function useApp() {
  const [, render] = useState(0);
  useEffect(() => {
    const listener = () => render((count) => count + 1);
    listeners.add(listener);
    listener(); // what changed before this effect ran
    return () => listeners.delete(listener);
  }, []);
  return app;
}
