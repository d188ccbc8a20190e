// Runs requests: each one streams its previews and its progress into the state, and its images into the gallery.
import { apiError, stream } from "./api.js";
import { saveImage, toDataUrl } from "./store.js";
import { app, notify, update } from "./state.js";
import { text } from "./text.js";

const STREAMED = { response_format: "b64_json", stream: true, stream_progress: true, partial_images: 3 };
const RETRY_S = 5; // after a 429 without Retry-After
// A browser has six connections to a server over HTTP/1.1; one is left for the status.
const MOST_STREAMS = 5;
let lastId = 0;
let streams = 0;
const waiting = []; // functions that start the next stream

function change(request, patch) {
  Object.assign(request, patch);
  update({});
}

const remove = (request) => update({ requests: app.requests.filter((other) => other !== request) });

/**
 * Send a body, and resolve to its images; null if it was cancelled.
 * After a 429 it waits as long as the server says, and tries again.
 * @param edit { blob, mask } of an edit; null: a generation.
 * @param quiet the caller shows the error: it is thrown, and no failed request is kept.
 */
export async function generate(body, edit = null, quiet = false) {
  const previews = Array.from({ length: body.n ?? 1 });
  const request = { id: ++lastId, body, edit, previews, state: "sent", controller: new AbortController() };
  update({ requests: [request, ...app.requests] });
  try {
    const images = await attempts(request, request.controller.signal);
    remove(request);
    return images;
  } catch (error) {
    const isCancelled = error.name === "AbortError";
    if (error.status === 401) update({ needsKey: true, asksKey: true });
    if (isCancelled || quiet || showAtField(error)) remove(request);
    else change(request, { state: "failed", error: error.message });
    if (quiet && !isCancelled) throw error;
    return null;
  }
}

/** Show an error at its field, if the form has it. */
export function showAtField({ param, message }) {
  const field = { lora_path: "loras", images: "image" }[param] ?? param;
  const element = document.querySelector(`[data-field="${field}"]`);
  if (!element) return false;
  update({ errors: { ...app.errors, [field]: message } });
  element.closest("details")?.setAttribute("open", "");
  element.querySelector("input, select, textarea")?.focus();
  return true;
}

async function attempts(request, signal) {
  while (true) {
    if (streams >= MOST_STREAMS) await new Promise((resolve) => waiting.push(resolve));
    streams += 1;
    let seconds;
    try {
      return await run(request, signal);
    } catch (error) {
      if (error.status !== 429) throw error;
      seconds = error.retryAfter ?? RETRY_S;
    } finally {
      streams -= 1;
      waiting.shift()?.();
    }
    for (; seconds > 0; seconds--) {
      change(request, { state: "waiting", seconds });
      await new Promise((resolve) => setTimeout(resolve, 1000));
      signal.throwIfAborted();
    }
  }
}

async function run(request, signal) {
  signal.throwIfAborted();
  const { body, edit, previews } = request;
  const started = performance.now();
  change(request, { state: "sent" });
  const streamed = { ...body, ...STREAMED };
  if (edit) streamed.images = [{ image_url: await toDataUrl(edit.blob) }];
  if (edit?.mask) streamed.mask = { image_url: await toDataUrl(await edit.mask) };
  const images = [];
  for await (const event of stream(edit ? "v1/images/edits" : "v1/images/generations", streamed, signal)) {
    const { type, index, position, step, steps, expected_s: seconds } = event;
    if (type.endsWith(".progress")) {
      change(request, { state: position === undefined ? "running" : "queued", position, step, steps, seconds });
      continue;
    }
    previews[index] = `data:image/${event.output_format};base64,${event.b64_json}`;
    update({});
    if (type.endsWith(".completed")) images[index] = await keep(event, request, Math.round(performance.now() - started));
  }
  // The stream ends early without an error if a proxy or the server closed it.
  if (images.filter(Boolean).length < previews.length) throw apiError(text.errors.lost);
  return images;
}

/** Put an image into the gallery. */
async function keep(event, { body, edit }, ms) {
  const bytes = Uint8Array.from(atob(event.b64_json), (character) => character.charCodeAt(0));
  const image = {
    id: `${Date.now()}-${Math.random()}`, // browsers have no randomUUID without https
    created: Date.now(),
    blob: new Blob([bytes], { type: `image/${event.output_format}` }),
    body: { ...body, control_image: undefined },
    // Not the event's: a seed may exceed JavaScript's exact integers.
    seed: body.seed === undefined ? String(event.seed) : String(BigInt(body.seed) + BigInt(event.index)),
    model: body.model ?? app.health?.model ?? "",
    size: event.size,
    understood: event.revised_prompt, // only if the model knows no word of the prompt
    ms,
    source: edit?.blob ?? null,
  };
  update({ images: [image, ...app.images], announcement: text.gallery.newImage(body.prompt) });
  await saveImage(image).catch(() => notify(text.errors.storage));
  return image;
}

export function cancel(request) {
  request.controller.abort();
  remove(request);
}

export function retry(request) {
  remove(request);
  return generate(request.body, request.edit);
}

export function cancelAll() {
  for (const request of app.requests) if (request.state !== "failed") cancel(request);
}
