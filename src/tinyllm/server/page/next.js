// What may come next: the likeliest tokens after a text or in an answer, at several temperatures, and which of
// them sampling's filters leave. Choosing one writes it and looks again.

import { inWords, post } from "./api.js";
import { $, el } from "./dom.js";
import { chosen } from "./models.js";
import { filters } from "./settings.js";
import { read, write } from "./store.js";
import { isStale, visible } from "./tokens.js";
import { percent, t } from "./words.js";

const TOP = 15;
let context = { messages: null, text: "" };
let found = null;
let running = null;

/** asked: {messages, text} to look at; else what was looked at last. source: gives what is on the screen. */
export function showNext(asked, source) {
  if (asked || isStale(context)) {
    context = asked ?? source();
    found = null;
  }
  if (found?.model !== chosen()?.name) found = null;
  const area = el("textarea", { id: "next-text", rows: 3, value: context.text });
  area.addEventListener("input", () => (context = { ...context, text: area.value }));
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    run();
  });
  $("view-next").replaceChildren(
    el("p", { class: "intro" }, t("next_intro")),
    el("div", { class: "field" }, el("label", { for: "next-text" }, t(context.messages ? "next_answer" : "next_text")), area),
    el(
      "div",
      { class: "row" },
      el("button", { type: "button", class: "quiet", onclick: () => showNext(source(), source) }, t("next_take")),
      el("button", { type: "button", class: "wide small", id: "next-show", onclick: run }, t("show")),
    ),
    el("div", { id: "next-found" }),
  );
  if (found) result();
  else if (!isStale(context)) run();
}

const temperatures = () => {
  const kept = read("temperatures", [0.5, 1, 1.5]);
  const fits = Array.isArray(kept) && kept.length === 3 && kept.every((x) => typeof x === "number" && x >= 0 && x <= 1000);
  return fits ? kept : [0.5, 1, 1.5];
};

async function run() {
  const { messages, text } = context;
  if (!chosen()?.kind) return;
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  if (!found) $("next-found").replaceChildren(el("p", { class: "hint" }, t("computing")));
  const body = {
    model: chosen()?.name, text, ...(messages && { messages }), temperatures: temperatures(), top: TOP, ...filters(),
  };
  try {
    found = await post("tinyllm/next", body, signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    found = { error };
  }
  if (!signal.aborted && $("next-found")) result();
}

function result() {
  const place = $("next-found");
  if (found.error) {
    const { text, detail } = inWords(found.error);
    place.replaceChildren(el("div", { class: "error", role: "alert" }, el("p", {}, text), el("p", { class: "hint" }, detail)));
    return;
  }
  const had = document.activeElement?.dataset?.column;
  const most = Math.max(...found.tokens.flatMap((token) => token.probabilities));
  const head = [
    el("tr", {}, el("td"), el("th", { scope: "colgroup", colspan: 3 }, t("next_column"))),
    el("tr", {}, el("th", { scope: "col" }, t("next_token")), temperatures().map((value, i) => el("th", {}, temperature(value, i)))),
  ];
  const others = found.temperatures.map((_, i) => 1 - found.tokens.reduce((sum, token) => sum + token.probabilities[i], 0));
  const last = el("tr", { class: "others" }, el("th", { scope: "row" }, t("next_others")), others.map((p) => el("td", {}, percent(Math.max(0, p)))));
  place.replaceChildren(
    el("table", { class: "next" }, el("thead", {}, head), el("tbody", {}, found.tokens.map((token) => row(token, most)), last)),
    el("p", { class: "hint" }, summary()),
    el("p", { class: "hint" }, t("next_hint")),
  );
  if (had) place.querySelector(`[data-column="${had}"]`)?.focus();
}

function temperature(value, i) {
  const input = el("input", {
    type: "number", min: 0, max: 1000, step: "any", value, "data-column": String(i), "aria-label": `${t("next_column")} ${i + 1}`,
  });
  input.addEventListener("change", () => {
    if (!input.validity.valid || input.value === "") return;
    write("temperatures", temperatures().with(i, input.valueAsNumber));
    run();
  });
  return input;
}

function row(token, most) {
  const dropped = token.dropped_by;
  const name = visible(token);
  const isText = !token.special && !token.text.includes("\ufffd") && token.text;
  const label = isText ? t("next_add", { token: `“${name}”` }) : null;
  const why = dropped ? t("dropped_by", { filter: dropped }) : null;
  const button = el("button", { type: "button", class: "pick", disabled: !isText, title: why ?? label, "aria-label": label, onclick: () => add(token) }, name);
  return el(
    "tr",
    { class: dropped ? "dropped" : null },
    el("th", { scope: "row" }, button),
    token.probabilities.map((p) => {
      const bar = el("span", { class: "bar" });
      bar.style.width = `${(100 * p) / most}%`;
      return el("td", {}, el("span", { class: "share" }, bar), el("span", { class: "number" }, percent(p)));
    }),
  );
}

function summary() {
  const steps = found.filters.map(({ filter, left }) => t("next_filter", { filter, n: left })).join(", ");
  const kept = found.filters.at(-1)?.left ?? found.vocab_size;
  return `${t("next_kept", { n: found.vocab_size, kept })}${steps ? ` (${steps})` : ""}`;
}

function add(token) {
  const area = $("next-text");
  // The first space is the vocabulary's own, and no part of a text.
  area.value += area.value || context.messages ? token.text : token.text.trimStart();
  context = { ...context, text: area.value };
  area.scrollTop = area.scrollHeight;
  run();
}
