// How answers are sampled, and the system prompt: kept in the browser, shown in the panel with a sentence for
// each. A field that is empty is not sent, so the model's own value counts.

import { $, el, grow } from "./dom.js";
import { chosen } from "./models.js";
import { read, write } from "./store.js";
import { language, number, t } from "./words.js";

export const BASE_MAX_TOKENS = 200; // of a base model, which rarely ends a text itself

// name: [lowest, highest, step], and whether there is a slider up to the highest.
const FIELDS = {
  temperature: [0, 2, 0.05, true],
  top_k: [0, 1000, 1, false],
  top_p: [0, 1, 0.01, true],
  min_p: [0, 1, 0.01, true],
  seed: [0, Number.MAX_SAFE_INTEGER, 1, false],
  max_tokens: [1, 1000000, 1, false],
};

let kept = read("settings", {});

/** What was set, by the names of the API. */
export function sampling() {
  const set = Object.keys(FIELDS).filter((name) => typeof kept[name] === "number");
  return Object.fromEntries(set.map((name) => [name, kept[name]]));
}

/** The filters among them. */
export function filters() {
  const { top_k, top_p, min_p } = sampling();
  return { top_k, top_p, min_p };
}

export const system = () => (typeof kept.system === "string" ? kept.system.trim() : "");

function set(name, value) {
  if (value === null || value === "") delete kept[name];
  else kept[name] = value;
  write("settings", kept);
}

export function showSettings() {
  const model = chosen();
  const isBase = model?.kind === "base";
  $("view-settings").replaceChildren(
    about(model),
    isBase ? el("p", { class: "hint" }, t("system_base")) : systemField(),
    el("h2", {}, t("sampling")),
    ...Object.keys(FIELDS).map((name) => field(name, model, isBase)),
    el("button", { type: "button", class: "quiet", onclick: reset }, t("defaults")),
  );
  const area = $("system");
  if (area) grow(area);
}

function reset() {
  kept = kept.system ? { system: kept.system } : {};
  write("settings", kept);
  showSettings();
}

function about(model) {
  if (!model?.kind) return el("div");
  const isFloat = /^B?F\d/.test(model.quantization ?? "");
  const numbers = model.parameters ? t("about_parameters", { n: short(model.parameters) }) : null;
  const facts = [model.architecture, numbers, t("about_context", { n: model.context })].filter(Boolean).join(" · ");
  return el(
    "div",
    { class: "about" },
    el("h2", {}, t("about")),
    el("p", { class: "facts" }, facts),
    el("p", {}, t(`about_${model.kind}`)),
    model.quantization && el("p", {}, t(isFloat ? "about_float" : "about_quantization", { format: model.quantization })),
    el("p", { class: "hint" }, t("about_where", { device: model.device === "cpu" ? "CPU" : model.device })),
  );
}

/** 3700000 as people say it. */
const short = (n) => new Intl.NumberFormat(language, { notation: "compact", compactDisplay: "long", maximumSignificantDigits: 3 }).format(n);

function systemField() {
  const area = el("textarea", { id: "system", rows: 3, value: kept.system ?? "", "aria-describedby": "system-why" });
  area.addEventListener("input", () => {
    set("system", area.value);
    grow(area);
  });
  return el(
    "div",
    { class: "field" },
    el("label", { for: "system" }, t("system")),
    area,
    el("p", { class: "hint", id: "system-why" }, t("system_why")),
  );
}

function field(name, model, isBase) {
  const [min, max, step, hasSlider] = FIELDS[name];
  const usual = model?.sampling?.[name] ?? (isBase && name === "max_tokens" ? BASE_MAX_TOKENS : null);
  const none = { seed: "random", max_tokens: "unlimited" }[name];
  const placeholder = usual !== null ? number(usual) : none ? t(none) : "";
  const input = el("input", {
    id: `set-${name}`, type: "number", min, max, step: name === "seed" || name === "max_tokens" ? 1 : "any",
    inputmode: step === 1 ? "numeric" : "decimal", placeholder, value: kept[name] ?? "", "aria-describedby": `why-${name}`,
  });
  const slider = hasSlider && el("input", { type: "range", min, max, step, tabindex: -1, "aria-hidden": true });
  const follow = () => {
    if (slider) slider.value = kept[name] ?? usual ?? min;
  };
  follow();
  input.addEventListener("input", () => {
    if (!input.validity.valid) return;
    set(name, input.value === "" ? null : input.valueAsNumber);
    follow();
  });
  slider?.addEventListener?.("input", () => {
    input.value = slider.value;
    set(name, slider.valueAsNumber);
  });
  const why = isBase && name === "max_tokens" ? "max_tokens_why_base" : `${name}_why`;
  return el(
    "div",
    { class: "field" },
    el("div", { class: "row" }, el("label", { for: `set-${name}` }, t(name)), input),
    slider,
    el("p", { class: "hint", id: `why-${name}` }, t(why)),
  );
}
