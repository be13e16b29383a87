// The conversations that this browser keeps: the list at the side, to open, export and delete.

import { $, ask, download, el, tool } from "./dom.js";
import { conversations, remove } from "./store.js";
import { current, open } from "./talk.js";
import { openSide } from "./panel.js";
import { t } from "./words.js";

export function showList() {
  const all = conversations();
  $("list").replaceChildren(...all.map(item));
  $("export-all").disabled = $("delete-all").disabled = !all.length;
}

function item(conversation) {
  const isOpen = conversation.id === current().id;
  const title = conversation.title || t("untitled");
  return el(
    "li",
    { class: isOpen ? "open" : null },
    el(
      "button",
      { type: "button", class: "title", "aria-current": isOpen ? "true" : null, title, onclick: () => choose(conversation) },
      title,
    ),
    tool("save", t("export_one"), () => download(conversation, `${fileName(title)}.json`)),
    tool("bin", t("delete_one"), () => drop(conversation, title)),
  );
}

const fileName = (title) => title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation";

function choose(conversation) {
  open(conversation);
  openSide(false);
}

async function drop(conversation, title) {
  const sure = await ask({ text: t("delete_one_sure", { title }), ok: t("delete"), cancel: t("cancel") });
  if (!sure) return;
  remove(conversation);
  if (conversation.id === current().id) open(null);
  showList();
}

export function startList() {
  $("new").addEventListener("click", () => {
    open(null);
    openSide(false);
    $("input").focus();
  });
  $("export-all").addEventListener("click", () => download(conversations(), "tinyllm-conversations.json"));
  $("delete-all").addEventListener("click", async () => {
    const all = conversations();
    const sure = await ask({ text: t("delete_all_sure", { n: all.length }), ok: t("delete"), cancel: t("cancel") });
    if (!sure) return;
    all.forEach(remove);
    open(null);
    showList();
  });
  document.addEventListener("language", showList);
  document.addEventListener("kept", showList);
  window.addEventListener("storage", showList); // another tab
}
