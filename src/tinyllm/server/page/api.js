// Asks the server. Whatever goes wrong is an ApiError, which `inWords` tells to people; addresses are relative
// to the page, so it works behind a path as well.

import { ask, el } from "./dom.js";
import { key } from "./store.js";
import { t } from "./words.js";

/** status: of HTTP; 0: no answer. message: the server's own sentence. */
export class ApiError extends Error {
  constructor(status, message = "", retryAfter = null) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

export const get = async (path) => (await send(path)).json();
export const post = async (path, body, signal) => (await send(path, body, signal)).json();

async function send(path, body, signal) {
  for (;;) {
    const used = key.get();
    const headers = used ? { Authorization: `Bearer ${used}` } : {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      const method = body === undefined ? "GET" : "POST";
      response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      throw error.name === "AbortError" ? error : new ApiError(0);
    }
    if (response.ok) return response;
    if (response.status === 401 && (await newKey(used))) continue;
    const said = await response.json().catch(() => ({}));
    throw new ApiError(response.status, said.error?.message ?? "", response.headers.get("Retry-After"));
  }
}

let asking = null;

/** Asks for a key in place of `used`; whether there is another one now. */
async function newKey(used) {
  if (key.get() !== used) return true; // somebody typed one meanwhile
  const field = el(
    "label",
    { class: "field" },
    t("key"),
    el("input", { type: "password", autocomplete: "off", required: true, "aria-describedby": "key-kept" }),
    el("span", { class: "hint", id: "key-kept" }, t("key_kept")),
  );
  asking ??= ask({ text: t(used ? "key_wrong" : "key_needed"), ok: t("use"), cancel: t("cancel"), field });
  const typed = await asking;
  asking = null;
  if (typed) key.set(typed);
  return Boolean(typed);
}

/** The events of a stream, as the values of their JSON. Ends with [DONE]; anything else is an error. */
export async function* events(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new ApiError(0);
    }
    if (part.done) throw new ApiError(0);
    const blocks = (held + part.value).replaceAll("\r\n", "\n").split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const value = JSON.parse(data);
      if (value.error) throw new ApiError(value.error.code === "queue_full" ? 429 : 500, value.error.message ?? "");
      yield value;
    }
  }
}

/** {text, detail}: what is said of an error, and the server's own sentence. */
export function inWords(error) {
  if (!(error instanceof ApiError)) return { text: t("error_page"), detail: String(error) };
  const known = [0, 400, 401, 403, 404, 413, 429, 500, 503].includes(error.status);
  const name = known ? `error_${error.status}` : "error_500";
  const wait = error.status === 429 && error.retryAfter ? ` ${t("retry", { n: error.retryAfter })}` : "";
  return { text: t(name) + wait, detail: error.message };
}
