// The tokens of a text, or of an answer and what came before it: each in colour, with its id, and how likely
// the model found it.

import { inWords, post } from "./api.js";
import { $, el } from "./dom.js";
import { chosen } from "./models.js";
import { read, write } from "./store.js";
import { percent, t } from "./words.js";

const MOST_SHOWN = 3000;
let context = { messages: null, text: "" };
let found = null; // what the server said of it
let running = null;

/** What is shown of white space and of bytes that are no character. */
export function visible(token) {
  if (token.special || !token.text) return token.text || `<${token.id}>`;
  if (token.text.includes("\ufffd")) return token.bytes.replace(/../g, "<$&>");
  const shown = token.text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  return shown.replace(/[\p{C}]/gu, (c) => `<${c.codePointAt(0).toString(16)}>`);
}

/** Whether there is nothing to look at, or an answer of a model that gives none. */
export function isStale(context) {
  return context.messages ? !["chat", undefined].includes(chosen()?.kind) : !context.text;
}

/** asked: {messages, text} to look at; else what was looked at last. source: gives what is on the screen. */
export function showTokens(asked, source) {
  if (asked || isStale(context)) {
    context = asked ?? source();
    found = null;
  }
  if (found?.model !== chosen()?.name) found = null;
  const label = context.messages ? "tokens_answer" : "tokens_text";
  const area = el("textarea", { id: "tokens-text", rows: 3, value: context.text });
  const isAsked = el("input", { type: "checkbox", id: "tokens-likely", checked: read("likely", true) });
  isAsked.addEventListener("change", () => {
    write("likely", isAsked.checked);
    run();
  });
  area.addEventListener("input", () => (context = { ...context, text: area.value }));
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    run();
  });
  $("view-tokens").replaceChildren(
    el("p", { class: "intro" }, t("tokens_intro")),
    el("div", { class: "field" }, el("label", { for: "tokens-text" }, t(label)), area),
    el(
      "div",
      { class: "row" },
      el("label", { class: "check" }, isAsked, el("span", {}, t("with_probability"))),
      el("button", { type: "button", class: "wide small", id: "tokens-show", onclick: run }, t("show")),
    ),
    el("div", { id: "tokens-found", "aria-live": "polite" }),
  );
  if (found) result();
  else run();
}

async function run() {
  if (isStale(context) || !chosen()?.kind) return;
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  found = null;
  $("tokens-found").replaceChildren(el("p", { class: "hint" }, t("computing")));
  const { messages, text } = context;
  const body = { model: chosen()?.name, text, ...(messages && { messages }), logprobs: $("tokens-likely").checked };
  try {
    found = { ...(await post("tinyllm/tokens", body, signal)), characters: [...text].length };
  } catch (error) {
    if (error.name !== "AbortError") found = { error };
  }
  if (!signal.aborted) result();
}

function result() {
  const place = $("tokens-found");
  if (found.error) {
    const { text, detail } = inWords(found.error);
    return place.replaceChildren(el("div", { class: "error", role: "alert" }, el("p", {}, text), el("p", { class: "hint" }, detail)));
  }
  const prompt = found.tokens.slice(0, found.prompt_tokens);
  const own = found.tokens.slice(found.prompt_tokens);
  const { characters } = found;
  const each = own.length ? characters / own.length : 0;
  const has = own.some((token) => typeof token.logprob === "number");
  const detail = el("p", { class: "detail" }, t("tokens_hint"));
  const parts = [
    el("p", { class: "facts" }, t("tokens_count", { n: own.length, characters, each })),
    has && scale(),
    has && context.reasoning && el("p", { class: "hint" }, t("tokens_reasoning")),
    detail,
    cells(own, detail),
    prompt.length && el("details", {}, el("summary", {}, t("tokens_prompt", { n: prompt.length })), cells(prompt, detail)),
  ];
  return place.replaceChildren(...parts.filter(Boolean));
}

function scale() {
  return el("p", { class: "scale" }, t("unlikely"), el("span", { class: "bar" }), t("likely"));
}

/** One stop for Tab; the arrow keys move within. */
function cells(tokens, detail) {
  const box = el("div", { class: "cells", role: "group", "aria-label": t("tokens") });
  const shown = tokens.slice(0, MOST_SHOWN);
  for (const [i, token] of shown.entries()) {
    const likely = typeof token.logprob === "number";
    const kind = token.special ? "special" : likely ? "likely" : `hue${i % 5}`;
    const cell = el(
      "span",
      { class: `token ${kind}`, tabindex: i ? -1 : 0, "aria-label": said(token, i, tokens.length) },
      el("span", { class: "text" }, visible(token)),
      el("small", {}, String(token.id)),
    );
    if (likely) cell.style.setProperty("--p", String(Math.round(100 * Math.sqrt(Math.exp(token.logprob)))));
    const tell = () => (detail.textContent = said(token, i, tokens.length));
    cell.addEventListener("focus", tell);
    cell.addEventListener("mouseenter", tell);
    box.append(cell);
    if (token.text.endsWith("\n")) box.append(el("br"));
  }
  if (tokens.length > shown.length) box.append(el("p", { class: "hint" }, t("tokens_more", { n: tokens.length - shown.length })));
  box.addEventListener("keydown", (event) => {
    const all = [...box.querySelectorAll(".token")];
    const at = all.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined || !all[to]) return;
    event.preventDefault();
    all[at].tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  });
  return box;
}

function said(token, i, n) {
  const likely = typeof token.logprob === "number";
  return [
    `“${visible(token)}”`,
    t("token_id", { id: String(token.id) }),
    token.special && t("token_special"),
    likely ? t("token_probability", { p: percent(Math.exp(token.logprob)) }) : token.logprob === null && found.tokens[0] === token && $("tokens-likely").checked && t("token_first"),
    token.text.includes("\ufffd") && t("token_bytes", { bytes: token.bytes }),
    t("token_of", { i: i + 1, n }),
  ].filter(Boolean).join(" · ");
}
