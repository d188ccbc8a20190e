// The server's HTTP API: requests, streams, and errors. Uses the public API only.
import { createParser } from "./vendor/eventsource-parser.js";
import { text } from "./text.js";

const KEY = "hypergen.key"; // of sessionStorage: this tab alone, and never in an address

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (value) => sessionStorage.setItem(KEY, value);
export const address = () => new URL(".", location.href).href.replace(/\/$/, "");

/** An error of the server or of the connection; an answer's has `status`, maybe `param` and `retryAfter` in seconds. */
export const apiError = (message, details) => Object.assign(new Error(message), details);

async function toError(response) {
  const { status } = response;
  const body = await response.json().catch(() => null); // a proxy's error page, for example
  const { message = text.errors.status(status), param } = body?.error ?? {};
  const retryAfter = Number(response.headers.get("retry-after")) || undefined;
  return apiError(status === 401 ? text.errors.key : message, { status, param, retryAfter });
}

/** Handles an error of the network, which is a lost connection unless the request was cancelled. */
const lost = (message) => (error) => {
  throw error.name === "AbortError" ? error : apiError(message);
};

async function send(path, options) {
  const headers = { "content-type": "application/json", ...(key() && { Authorization: `Bearer ${key()}` }) };
  const sent = fetch(path, { ...options, headers, cache: "no-store" });
  const response = await sent.catch(lost(text.errors.unreachable));
  // /health answers 503 with a body, too.
  if (!response.ok && !(path === "health" && response.status === 503)) throw await toError(response);
  return response;
}

/** GET as JSON. */
export const get = async (path) => (await send(path)).json();

/** JSON of a body whose `seed` may be text, because a seed can exceed JavaScript's exact integers. */
export function toJson({ seed, ...body }, indent) {
  if (seed === undefined) return JSON.stringify(body, null, indent);
  return JSON.stringify({ seed: "SEED", ...body }, null, indent).replace('"SEED"', seed);
}

/** POST a body, and yield the events of the answer as objects with `type`. */
export async function* stream(path, body, signal) {
  const response = await send(path, { method: "POST", body: toJson(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const events = [];
  const parser = createParser({ onEvent: ({ data }) => events.push(JSON.parse(data)) });
  while (true) {
    const { done, value } = await reader.read().catch(lost(text.errors.lost));
    if (done) return;
    parser.feed(value);
    for (const event of events.splice(0)) {
      if (event.type === "error") throw apiError(event.error.message, { param: event.error.param });
      yield event;
    }
  }
}
