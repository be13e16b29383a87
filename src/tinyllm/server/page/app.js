// Where the page begins: starts its parts and says what the keys do. Each file owns one thing: talk.js the
// conversation on the screen, list.js those that are kept, panel.js settings and views, api.js the server,
// store.js what the browser keeps, words.js all that is said.

import { $, grow } from "./dom.js";
import { showList, startList } from "./list.js";
import * as models from "./models.js";
import { closePanel, isOverlay, openPanel, openSide, startPanel } from "./panel.js";
import { conversations } from "./store.js";
import * as talk from "./talk.js";
import { switchLanguage, t, translate } from "./words.js";

function showModels() {
  const model = models.chosen();
  const options = models.all.map(({ name }) => new Option(name, name, false, name === model?.name));
  $("model").replaceChildren(...options);
  $("model").disabled = models.all.length < 2;
  const facts = model?.kind ? [t(`kind_${model.kind}`), model.quantization].filter(Boolean).join(" · ") : "";
  $("model-facts").textContent = model && !model.kind && !models.problem ? t("loading", { model: "" }) : facts;
}

function showLanguage() {
  $("language").textContent = t("other_language");
  $("language").title = t("other_language_name");
  $("language").setAttribute("aria-label", t("other_language_name"));
  $("language").lang = t("other_language").toLowerCase();
}

function submit() {
  if (talk.isRunning()) {
    talk.stop();
    return;
  }
  const text = $("input").value;
  $("input").value = "";
  grow($("input"));
  talk.send(text);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("input").addEventListener("input", () => grow($("input")));
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!talk.isRunning() && !$("send").disabled) submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("dialog").open) return;
  if (talk.stop() || openSide(false)) return;
  if (isOverlay()) closePanel();
});
$("model").addEventListener("change", () => models.choose($("model").value));
$("language").addEventListener("click", switchLanguage);
document.addEventListener("model", () => {
  showModels();
  talk.modelChanged();
  showList();
});
document.addEventListener("language", () => {
  showLanguage();
  showModels();
  talk.show();
});

translate();
showLanguage();
startPanel();
startList();
talk.open(talk.lastOpen(conversations()));
grow($("input"));
if (!isOverlay()) openPanel();
$("input").focus();
await models.refresh();
