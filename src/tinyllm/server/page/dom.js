// Makes DOM nodes. A string becomes text, never markup: nothing on this page parses HTML.

export const $ = (id) => document.getElementById(id);

/** An element. props: listeners as onclick, a property as value, attributes else; children: nodes and strings. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A symbol of index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button with a symbol, whose label is a tooltip and what is read aloud. */
export function tool(name, label, onclick) {
  return el("button", { type: "button", class: "tool", title: label, "aria-label": label, onclick }, icon(name));
}

/** As high as its text, up to what the style sheet allows. */
export function grow(textarea) {
  textarea.style.height = "auto";
  textarea.style.height = `${textarea.scrollHeight + textarea.offsetHeight - textarea.clientHeight}px`;
}

/** Says something to those who listen to the page. */
export function announce(text) {
  $("status").textContent = text;
}

/** Offers a value as a file of JSON. */
export function download(value, name) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Asks in a dialog; the value of `field`, or true, null where it was left. */
export function ask({ text, ok, cancel, field }) {
  const dialog = $("dialog");
  return new Promise((resolve) => {
    const form = el(
      "form",
      { method: "dialog" },
      el("p", {}, text),
      field,
      el(
        "div",
        { class: "row end" },
        el("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, cancel),
        el("button", { type: "submit", class: "wide" }, ok),
      ),
    );
    let answer = null;
    form.addEventListener("submit", () => (answer = field ? field.querySelector("input").value.trim() || null : true));
    dialog.replaceChildren(form);
    dialog.addEventListener("close", () => resolve(answer), { once: true });
    dialog.showModal();
  });
}
