// Runs requests: each one streams its previews and its progress into the state, and its images into the gallery.
import { ApiError, stream } from "./api.js";
import { saveImage, toDataUrl } from "./store.js";
import { app, notify, update } from "./state.js";
import { text } from "./text.js";

const PREVIEWS = 3;
const RETRY_S = 5; // of a 429 without Retry-After
// A browser has six connections to a server over HTTP/1.1; one is left for the status.
const MOST_STREAMS = 5;
let lastId = 0;
let streams = 0;
const waiting = []; // functions that start the next stream

function patch(id, change) {
  update({ requests: app.requests.map((request) => (request.id === id ? { ...request, ...change } : request)) });
}

const remove = (id) => update({ requests: app.requests.filter((request) => request.id !== id) });

/**
 * Send a body, and resolve to its images; null if it was cancelled.
 * After a 429 it waits as long as the server says, and tries again.
 * @param edit { source, mask } of an edit; null: a generation.
 * @param quiet the caller shows the error: it is thrown, and no failed request is kept.
 */
export async function generate(body, edit = null, quiet = false) {
  const id = ++lastId;
  const controller = new AbortController();
  const request = { id, body, edit, controller, state: "sent", tiles: Array.from({ length: body.n ?? 1 }, () => ({})) };
  update({ requests: [request, ...app.requests] });
  try {
    const images = await attempts(id, body, edit, controller.signal);
    remove(id);
    return images;
  } catch (error) {
    const isCancelled = error.name === "AbortError";
    if (error.status === 401) update({ needsKey: true, asksKey: true });
    if (isCancelled || quiet || (error.param && showAtField(error))) remove(id);
    else patch(id, { state: "failed", error: error.message });
    if (quiet && !isCancelled) throw error;
    return null;
  }
}

/** Show an error at its field, if the form has it. */
function showAtField({ param, message }) {
  const field = { lora_path: "loras", images: "image" }[param] ?? param;
  if (!document.querySelector(`[data-field="${field}"]`)) return false;
  update({ errors: { ...app.errors, [field]: message } });
  // After the render: the field may be in a closed section.
  setTimeout(() => {
    const element = document.querySelector(`[data-field="${field}"]`);
    element?.closest("details")?.setAttribute("open", "");
    element?.querySelector("input, select, textarea")?.focus();
  });
  return true;
}

async function attempts(id, body, edit, signal) {
  while (true) {
    try {
      return await attempt(id, body, edit, signal);
    } catch (error) {
      if (error.status !== 429) throw error;
      await wait(id, error, signal);
    }
  }
}

function wait(id, error, signal) {
  const seconds = error.retryAfter ?? RETRY_S;
  patch(id, { state: "waiting", error: error.message, retryAt: Date.now() + seconds * 1000 });
  return new Promise((resolve, reject) => {
    setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => reject(signal.reason));
  });
}

async function attempt(...request) {
  if (streams >= MOST_STREAMS) await new Promise((resolve) => waiting.push(resolve));
  streams += 1;
  try {
    return await run(...request);
  } finally {
    streams -= 1;
    waiting.shift()?.();
  }
}

async function run(id, body, edit, signal) {
  signal.throwIfAborted();
  const started = performance.now();
  patch(id, { state: "sent", error: null });
  const streamed = { ...body, response_format: "b64_json", stream: true, stream_progress: true, partial_images: PREVIEWS };
  if (edit) {
    streamed.images = [{ image_url: await toDataUrl(edit.source) }];
    if (edit.mask) streamed.mask = { image_url: await toDataUrl(await edit.mask) };
  }
  const images = [];
  for await (const event of stream(edit ? "v1/images/edits" : "v1/images/generations", streamed, signal)) {
    if (event.type.endsWith(".progress")) {
      const { position, step, steps, expected_s: seconds } = event;
      patch(id, { state: position === undefined ? "running" : "queued", position, step, steps, seconds });
    } else {
      const type = `image/${event.output_format}`;
      const tiles = app.requests.find((request) => request.id === id)?.tiles ?? [];
      const tile = { preview: `data:${type};base64,${event.b64_json}` };
      patch(id, { tiles: tiles.map((old, index) => (index === event.index ? tile : old)) });
      if (event.type.endsWith(".completed")) {
        images[event.index] = await keep(event, type, body, edit, performance.now() - started);
      }
    }
  }
  // The stream ends early without an error if a proxy or the server closed it.
  if (images.filter(Boolean).length < (body.n ?? 1)) throw new ApiError(text.errors.lost);
  return images;
}

/** Put an image into the gallery. */
async function keep(event, type, body, edit, ms) {
  const bytes = Uint8Array.from(atob(event.b64_json), (character) => character.charCodeAt(0));
  const image = {
    id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, // absent without https
    created: Date.now(),
    blob: new Blob([bytes], { type }),
    body: { ...body, control_image: undefined },
    // Not the event's: a seed may exceed JavaScript's exact integers.
    seed: body.seed === undefined ? String(event.seed) : String(BigInt(body.seed) + BigInt(event.index)),
    model: body.model ?? app.health?.model ?? "",
    size: event.size,
    understood: event.revised_prompt, // only if the model knows no word of the prompt
    ms: Math.round(ms),
    source: edit?.source ?? null,
  };
  update({ images: [image, ...app.images], announcement: text.gallery.newImage(body.prompt) });
  try {
    await saveImage(image);
  } catch {
    notify(text.errors.storage);
  }
  return image;
}

export function cancel(request) {
  request.controller.abort();
  remove(request.id);
}

export function retry(request) {
  remove(request.id);
  return generate(request.body, request.edit);
}

export function cancelAll() {
  for (const request of app.requests) if (request.state !== "failed") request.controller.abort();
}
