// The server's HTTP API: requests, streams, and errors as one class. Uses the public API only.
import { text } from "./text.js";

const KEY = "hypergen.key"; // of sessionStorage: this tab alone, and never in an address
const base = new URL(".", location.href);

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY));
export const address = () => base.href.replace(/\/$/, "");

/** An error of the server or of the connection. `status` is 0 without an answer. */
export class ApiError extends Error {
  constructor(message, details) {
    super(message);
    Object.assign(this, { status: 0, param: null, retryAfter: null, ...details });
  }
}

async function toError(response) {
  const { status } = response;
  const body = await response.json().catch(() => null); // a proxy's error page, for example
  const { message = text.errors.status(status), param } = body?.error ?? {};
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  return new ApiError(status === 401 ? text.errors.key : message, { status, param, retryAfter });
}

async function send(path, options = {}) {
  const headers = { ...options.headers, ...(key() && { Authorization: `Bearer ${key()}` }) };
  try {
    return await fetch(new URL(path, base), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(text.errors.unreachable);
  }
}

/** GET as JSON; `/health` answers 503 with a body, too. */
export async function get(path) {
  const response = await send(path);
  if (!response.ok && !(path === "health" && response.status === 503)) throw await toError(response);
  return response.json();
}

/** JSON of a body whose `seed` may be text, because a seed can exceed JavaScript's exact integers. */
export function toJson({ seed, ...body }, indent) {
  const json = JSON.stringify({ ...body, ...(seed !== undefined && { seed: "SEED" }) }, null, indent);
  return json.replace('"SEED"', () => String(seed));
}

/** POST a body, and yield the events of the answer as objects with `type`. */
export async function* stream(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await send(path, { method: "POST", headers, body: toJson(body), signal });
  if (!response.ok) throw await toError(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = [];
  while (true) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(text.errors.lost);
    }
    if (chunk.done) return;
    pending.push(chunk.value); // joined once per event: an image is megabytes in many chunks
    if (!chunk.value.includes("\n") || !(pending.at(-2) ?? "").concat(chunk.value).includes("\n\n")) continue;
    const blocks = pending.join("").split("\n\n");
    pending = [blocks.pop()];
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (!data) continue; // a comment keeps the connection open
      const event = JSON.parse(data.slice(6));
      if (event.type === "error") throw new ApiError(event.error.message, { param: event.error.param });
      yield event;
    }
  }
}
