// The conversation on the screen: what is in it, and the ways to go on with it. One answer at a time is made;
// what belongs to another conversation is stopped when that one is left. A base model's conversation is one
// text in parts.

import { inWords } from "./api.js";
import { answer, chatMessages, wholeText } from "./answers.js";
import { $, announce, el, grow, tool } from "./dom.js";
import { markdown } from "./markdown.js";
import * as models from "./models.js";
import { lookAt, openPanel } from "./panel.js";
import { isKept, newConversation, read, save, write } from "./store.js";
import { number, t } from "./words.js";

let conversation = newConversation("chat", null);
let running = null; // the AbortController of the answer that is made
let editing = null; // the number of the message that is edited
let live = null; // shows the last message anew while it is made

export const current = () => conversation;
export const isRunning = () => running !== null;

/** Shows a kept conversation, or with null a new one. */
export function open(kept) {
  stop();
  const model = models.chosen();
  conversation = kept ?? newConversation(model?.kind === "base" ? "base" : "chat", model?.name ?? null);
  editing = null;
  write("open", kept ? conversation.id : null);
  const served = models.all.find((one) => one.name === conversation.model);
  if (kept && served && served.name !== model?.name) models.choose(served.name);
  show();
  $("scroll").scrollTop = $("scroll").scrollHeight;
  document.dispatchEvent(new Event("kept"));
}

export function stop() {
  running?.abort();
  return isRunning();
}

/** A new model: an empty conversation becomes its own, another goes on with it where it can. */
export function modelChanged() {
  const model = models.chosen();
  if (model?.kind && !conversation.messages.length) {
    conversation = newConversation(model.kind === "base" ? "base" : "chat", model.name);
  } else if (model?.kind === conversation.kind) {
    conversation.model = model.name;
  }
  show();
}

export async function send(text) {
  if (running || !canWrite()) return;
  const isEmpty = !text.trim();
  if (conversation.kind === "chat" ? isEmpty : isEmpty && !wholeText(conversation)) return;
  if (!isEmpty) conversation.messages.push({ role: "user", content: conversation.kind === "chat" ? text.trim() : seam(text) });
  await run();
}

/** What is added to a text; a word does not stick to the one before it. */
function seam(text) {
  const before = wholeText(conversation);
  return before && /\S$/.test(before) && /^[\p{L}\p{N}]/u.test(text) ? ` ${text}` : text;
}

/** Writes the answer number i again, in place of it and of what follows. */
export async function again(i = conversation.messages.length - 1) {
  if (running || !canWrite()) return;
  conversation.messages.length = conversation.messages[i]?.role === "assistant" ? i : i + 1;
  await run();
}

function canWrite() {
  const { kind } = models.chosen() ?? {};
  return kind === conversation.kind;
}

async function run() {
  const mine = conversation;
  const controller = new AbortController();
  const message = { role: "assistant", content: "" };
  mine.model = models.chosen().name;
  mine.messages.push(message);
  editing = null;
  running = controller;
  keep();
  show();
  const place = $("scroll");
  place.scrollTop = place.scrollHeight;
  let isDrawn = false;
  const draw = () => {
    isDrawn = false;
    if (conversation !== mine || running !== controller) return;
    const follows = place.scrollHeight - place.scrollTop - place.clientHeight < 80;
    live?.();
    if (follows) place.scrollTop = place.scrollHeight;
  };
  const changed = () => {
    if (!isDrawn) requestAnimationFrame(draw);
    isDrawn = true;
  };
  let error = null;
  try {
    await answer(mine, controller.signal, changed);
  } catch (problem) {
    error = problem;
  }
  running = null;
  if (!message.content && !message.reasoning) mine.messages.pop();
  if (conversation !== mine) {
    if (mine.messages.length && isKept(mine)) save(mine);
    return;
  }
  keep();
  const follows = place.scrollHeight - place.scrollTop - place.clientHeight < 80;
  show(error);
  if (follows) place.scrollTop = place.scrollHeight;
  announce(error ? inWords(error).text : t(message.stats?.finish === "stopped" ? "answer_stopped" : "answer_done"));
}

function keep() {
  if (!conversation.messages.length) return;
  const hadRoom = save(conversation);
  write("open", conversation.id);
  $("composer").querySelector(".keys").textContent = hadRoom ? t("keys") : t("no_room");
  document.dispatchEvent(new Event("kept"));
}

// ---- what is seen

/** error: why the last answer ended early. */
export function show(error = null) {
  const { messages, kind } = conversation;
  const model = models.chosen();
  live = null;
  document.body.classList.toggle("running", isRunning());
  const parts = [];
  if (messages.length && kind === "base") parts.push(wholeTextView(messages));
  else if (messages.length) parts.push(...messages.map((message, i) => (message.role === "user" ? question(message, i) : reply(message, i))));
  else if (!error && !models.problem) parts.push(welcome(model));
  if (models.problem) parts.push(errorBox(models.problem, models.refresh));
  if (messages.length && model?.kind && model.kind !== kind) {
    parts.push(el("p", { class: "notice" }, t("other_kind", { kind: t(`kind_${kind}`) })));
  }
  if (error) parts.push(errorBox(error, () => again()));
  $("talk").className = kind;
  $("talk").replaceChildren(...parts);
  showComposer(model);
}

function showComposer(model) {
  const isBase = conversation.kind === "base";
  const hint = isBase ? (conversation.messages.length ? "write_more" : "write_text") : "write_message";
  const label = t(isRunning() ? "stop" : isBase && conversation.messages.length ? "continue" : "send");
  $("input").placeholder = model ? t(hint, { model: model.name }) : "";
  $("send").setAttribute("aria-label", label);
  $("send").title = label;
  $("send").disabled = !isRunning() && !canWrite();
  $("send-icon").setAttribute("href", isRunning() ? "#i-stop" : "#i-send");
}

function welcome(model) {
  const name = !model?.kind ? "loading" : model.kind;
  if (!model) return el("div", { class: "welcome" });
  const tries = t(`try_${name}`) ?? [];
  return el(
    "div",
    { class: "welcome" },
    el("h1", {}, t(`welcome_${name}`)),
    el("p", {}, t(`welcome_${name}_more`, { model: model.name })),
    name === "loading" && el("div", { class: "waiting", "aria-hidden": true }),
    el("div", { class: "tries" }, tries.map((text) => el("button", { type: "button", onclick: () => send(text) }, text))),
  );
}

function errorBox(error, retry) {
  const { text, detail } = inWords(error);
  return el(
    "div",
    { class: "error", role: "alert" },
    el("p", {}, text),
    detail && el("p", { class: "hint" }, detail),
    el("button", { type: "button", class: "quiet", onclick: () => retry() }, t("retry_now")),
  );
}

function question(message, i) {
  if (editing === i) {
    return editor(message.content, [[t("edit_send"), (text) => resend(i, text)]]);
  }
  return el(
    "article",
    { class: "user", "aria-label": t("you") },
    el("div", { class: "bubble" }, message.content),
    el("div", { class: "tools" }, tool("edit", t("edit"), () => edit(i)), copyTool(message.content)),
  );
}

function resend(i, text) {
  if (!text.trim() || running || !canWrite()) return;
  conversation.messages.length = i;
  send(text);
}

function edit(i) {
  editing = i;
  show();
  const area = $("talk").querySelector(".editor textarea");
  grow(area);
  area.focus();
}

/** actions: [label, what it does with the text]; the first is what Enter does. */
function editor(text, actions) {
  const area = el("textarea", { value: text, "aria-label": t("edit") });
  const leave = () => {
    editing = null;
    show();
    $("input").focus();
  };
  area.addEventListener("input", () => grow(area));
  area.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      leave();
    } else if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      actions[0][1](area.value);
    }
  });
  return el(
    "div",
    { class: "editor" },
    area,
    el(
      "div",
      { class: "row end" },
      el("button", { type: "button", class: "quiet", onclick: leave }, t("cancel")),
      actions.map(([label, act], i) => el("button", { type: "button", class: i ? "quiet" : "wide small", onclick: () => act(area.value) }, label)),
    ),
  );
}

function reply(message, i) {
  const isLast = i === conversation.messages.length - 1;
  const isLive = isLast && isRunning();
  const body = el("div", { class: "body" });
  const details = el("details", { class: "reasoning" }, el("summary"), el("div"));
  const draw = () => {
    const hasReasoning = Boolean(message.reasoning);
    details.hidden = !hasReasoning;
    details.firstChild.textContent = t(isLive && isRunning() && !message.content ? "reasoning_now" : "reasoning");
    details.lastChild.textContent = message.reasoning ?? "";
    body.replaceChildren(markdown(message.content.replace(/^\s+/, ""), codeBlock));
  };
  draw();
  if (isLive) live = draw;
  return el(
    "article",
    { class: `assistant${isLive ? " live" : ""}`, "aria-label": conversation.model },
    details,
    body,
    !isLive && under(message, [tool("again", t("again"), () => again(i)), copyTool(message.content), ...lookTools(i, message)]),
  );
}

/** The views of an answer: its tokens, and what could have come instead. */
function lookTools(i, message) {
  const messages = chatMessages(conversation, i);
  return [
    tool("tokens", t("see_tokens"), () => openPanel("tokens", { messages, text: message.content, reasoning: Boolean(message.reasoning) })),
    tool("next", t("see_next"), () => openPanel("next", { messages, text: "" })),
  ];
}

function wholeTextView(messages) {
  const text = wholeText(conversation);
  if (editing !== null) {
    const kept = (text) => {
      conversation.messages = text ? [{ role: "user", content: text }] : [];
      editing = null;
      keep();
      show();
    };
    const goOn = (text) => {
      if (running || !canWrite()) return;
      conversation.messages = [];
      send(text);
    };
    return editor(text, [[t("edit_send"), goOn], [t("edit_keep"), kept]]);
  }
  const spans = messages.map((part) => el("span", { class: part.role }, part.content));
  const last = messages.at(-1);
  if (isRunning()) live = () => (spans.at(-1).textContent = last.content);
  const tools = [
    last.role === "assistant" && tool("again", t("again"), () => again()),
    tool("edit", t("edit"), () => edit(0)),
    copyTool(text),
    tool("tokens", t("see_tokens"), () => openPanel("tokens", { messages: null, text })),
    tool("next", t("see_next"), () => openPanel("next", { messages: null, text })),
  ];
  return el(
    "article",
    { class: `whole${isRunning() ? " live" : ""}` },
    el("div", { class: "text" }, spans),
    !isRunning() && under(last, tools),
  );
}

function under(message, tools) {
  const { rate, first, tokens, seed, finish } = message.stats ?? {};
  const facts = [
    rate && t("stat_rate", { n: rate }),
    first && t("stat_first", { s: number(first, 2) }),
    tokens && (tokens === 1 ? t("stat_tokens_one") : t("stat_tokens", { n: tokens })),
    seed !== undefined && t("stat_seed", { n: String(seed) }),
    ["length", "stopped"].includes(finish) && t(`ended_${finish}`),
  ];
  return el("div", { class: "under" }, el("div", { class: "tools" }, tools), el("p", { class: "stats" }, facts.filter(Boolean).join(" · ")));
}

/** null where the browser lets no page write to the clipboard. */
function copyTool(text, label = t("copy")) {
  if (!navigator.clipboard) return null;
  const button = tool("copy", label, async () => {
    await navigator.clipboard.writeText(text);
    announce(t("copied"));
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1200);
  });
  return button;
}

function codeBlock(pre, text, language) {
  const head = el("div", { class: "head" }, el("span", {}, language ?? ""), copyTool(text, t("copy_code")));
  return el("div", { class: "code" }, head, pre);
}

// ---- from the outside

lookAt(() => {
  const { messages } = conversation;
  if (conversation.kind === "base") return { messages: null, text: wholeText(conversation) };
  const end = messages.at(-1)?.role === "assistant" ? messages.length - 1 : messages.length;
  if (!messages.length) return { messages: null, text: "" };
  return { messages: chatMessages(conversation, end), text: messages[end]?.content ?? "", reasoning: Boolean(messages[end]?.reasoning) };
});

/** What was open last. */
export function lastOpen(all) {
  return all.find((one) => one.id === read("open")) ?? null;
}

window.addEventListener("pagehide", () => {
  if (running) save(conversation); // what there is of the answer
});
