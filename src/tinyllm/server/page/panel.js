// The panel at the side: three tabs, of which one is open, and when it is there at all.

import { $ } from "./dom.js";
import { read, write } from "./store.js";
import { showNext } from "./next.js";
import { showSettings } from "./settings.js";
import { showTokens } from "./tokens.js";

const TABS = { settings: showSettings, tokens: showTokens, next: showNext };
const isWide = matchMedia("(min-width: 1150px)");
let before = null; // what had the focus
let onScreen = null; // see lookAt

export const isOverlay = () => !isWide.matches;

/** of: gives what is on the screen, {messages, text}. */
export function lookAt(of) {
  onScreen = of;
}

/** context: {messages, text} to look at, for tokens and next; messages null for a text by itself. */
export function openPanel(name = read("tab", "settings"), context) {
  const tab = name in TABS ? name : "settings";
  if ($("panel").hidden) before = document.activeElement;
  $("panel").hidden = false;
  $("panel-button").setAttribute("aria-expanded", "true");
  write("tab", tab);
  for (const other of Object.keys(TABS)) {
    const isOpen = other === tab;
    $(`view-${other}`).hidden = !isOpen;
    $(`tab-${other}`).setAttribute("aria-selected", String(isOpen));
    $(`tab-${other}`).tabIndex = isOpen ? 0 : -1;
  }
  cover();
  TABS[tab](context, onScreen);
  if (isOverlay() || context) $(`tab-${tab}`).focus({ preventScroll: true });
}

export function closePanel() {
  if ($("panel").hidden) return false;
  $("panel").hidden = true;
  $("panel-button").setAttribute("aria-expanded", "false");
  cover();
  before?.focus?.({ preventScroll: true });
  return true;
}

/** The conversations on a narrow screen. */
export function openSide(isOpen) {
  const was = document.body.classList.contains("side-open");
  document.body.classList.toggle("side-open", isOpen);
  $("menu").setAttribute("aria-expanded", String(isOpen));
  cover();
  if (isOpen) $("new").focus({ preventScroll: true });
  else if (was) $("menu").focus({ preventScroll: true });
  return was;
}

/** What lies under something else cannot be reached. */
function cover() {
  const side = document.body.classList.contains("side-open");
  const panel = !$("panel").hidden && isOverlay();
  $("scrim").hidden = !(side || panel);
  $("main").inert = side || panel;
}

export function startPanel() {
  $("panel-button").addEventListener("click", () => ($("panel").hidden ? openPanel() : closePanel()));
  $("panel-close").addEventListener("click", closePanel);
  $("menu").addEventListener("click", () => openSide(true));
  $("scrim").addEventListener("click", () => openSide(false) || closePanel());
  for (const name of Object.keys(TABS)) $(`tab-${name}`).addEventListener("click", () => openPanel(name));
  $("panel").querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const names = Object.keys(TABS);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.id.startsWith("tab-")) return;
    const name = names[(names.indexOf(event.target.id.slice(4)) + step + names.length) % names.length];
    openPanel(name);
    $(`tab-${name}`).focus();
  });
  isWide.addEventListener("change", cover);
  const again = () => $("panel").hidden || openPanel();
  document.addEventListener("model", again);
  document.addEventListener("language", again);
}
