// Shows a model's text with the Markdown that models write: code, headings, lists, quotes, tables, emphasis.
// Everything becomes text nodes in a few harmless elements; HTML in the text stays text, and links are not made.

import { el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^ {0,3}\|?( *:?-+:? *\|)+( *:?-+:? *)?$/;
const MOST_NESTED = 8;

/** The nodes of a text. code: makes what stands around a block of code of it, a button to copy it, say. */
export function markdown(text, code = (pre) => pre) {
  return blocks(text.split("\n"), code, 0);
}

function blocks(lines, code, depth) {
  const out = document.createDocumentFragment();
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) out.append(el("p", {}, inlineLines(paragraph)));
    paragraph = [];
  };
  let i = 0;
  const block = (node) => {
    flush();
    out.append(node);
  };
  const take = (fits) => {
    const start = i;
    while (i < lines.length && fits(lines[i])) i++;
    return lines.slice(start, i);
  };
  while (i < lines.length) {
    const line = lines[i];
    let match;
    if ((match = FENCE.exec(line))) {
      const [, mark, language] = match;
      i++;
      const inside = take((l) => !(l.trim().startsWith(mark) && !l.trim().replaceAll(mark[0], "")));
      i++;
      const pre = el("pre", {}, el("code", { "data-language": language || null }, inside.join("\n")));
      block(code(pre, inside.join("\n"), language));
    } else if ((match = HEADING.exec(line))) {
      i++;
      block(el(`h${Math.min(6, match[1].length + 2)}`, {}, inline(match[2])));
    } else if (RULE.test(line)) {
      i++;
      block(el("hr"));
    } else if (depth < MOST_NESTED && QUOTE.test(line)) {
      block(el("blockquote", {}, blocks(take((l) => QUOTE.test(l)).map((l) => QUOTE.exec(l)[1]), code, depth + 1)));
    } else if (depth < MOST_NESTED && ITEM.test(line)) {
      block(list(lines, i, code, depth, (end) => (i = end)));
    } else if (line.includes("|") && DIVIDER.test(lines[i + 1] ?? "")) {
      const rows = take((l) => l.includes("|"));
      block(table(rows));
    } else {
      i++;
      if (line.trim()) paragraph.push(line);
      else flush();
    }
  }
  flush();
  return out;
}

function list(lines, start, code, depth, ended) {
  const [, indent, marker] = ITEM.exec(lines[start]);
  const isOrdered = /\d/.test(marker);
  const node = el(isOrdered ? "ol" : "ul", { start: isOrdered ? String(parseInt(marker, 10)) : null });
  let i = start;
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || item[1].length !== indent.length || /\d/.test(item[2]) !== isOrdered) break;
    const inner = [item[3]];
    const column = item[0].length - item[3].length;
    i++;
    while (i < lines.length) {
      const line = lines[i];
      const isDeeper = line.search(/\S/) > indent.length;
      const goesOn = line.trim() ? isDeeper : lines[i + 1]?.search(/\S/) > indent.length;
      if (!goesOn) break;
      inner.push(line.slice(Math.min(column, Math.max(0, line.search(/\S/)))));
      i++;
    }
    const content = blocks(inner, code, depth + 1);
    const first = content.firstChild;
    if (first?.tagName === "P") first.replaceWith(...first.childNodes);
    node.append(el("li", {}, content));
    if (!lines[i]?.trim() && ITEM.exec(lines[i + 1] ?? "")?.[1].length === indent.length) i++;
  }
  ended(i);
  return node;
}

function table(rows) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const [head, , ...body] = rows;
  const row = (line, tag) => el("tr", {}, cells(line).map((cell) => el(tag, {}, inline(cell))));
  const whole = el("table", {}, el("thead", {}, row(head, "th")), el("tbody", {}, body.map((line) => row(line, "td"))));
  return el("div", { class: "table" }, whole);
}

function inlineLines(lines) {
  return lines.flatMap((line, i) => (i ? [el("br"), ...inline(line.trim())] : inline(line.trim())));
}

const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["*", "em"],
  ["_", "em"],
];

function inline(text, depth = 0) {
  const out = [];
  const missing = new Set(); // marks that do not come again: looked for once
  let plain = "";
  let i = 0;
  const put = (node) => {
    if (plain) out.push(plain);
    plain = "";
    out.push(node);
  };
  while (i < text.length) {
    if (text[i] === "`") {
      const mark = /^`+/.exec(text.slice(i, i + 32))[0];
      const end = missing.has(mark) ? -1 : text.indexOf(mark, i + mark.length);
      if (end < 0) missing.add(mark);
      if (end > i) {
        put(el("code", {}, text.slice(i + mark.length, end).trim()));
        i = end + mark.length;
        continue;
      }
      plain += mark;
      i += mark.length;
      continue;
    }
    if (text[i] === "\\" && /[\\`*_#|~>[\]()-]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
      continue;
    }
    const found = depth < 4 && MARKS.find(([mark]) => text.startsWith(mark, i));
    if (found) {
      const end = closing(text, i, found[0], missing);
      if (end > 0) {
        put(el(found[1], {}, inline(text.slice(i + found[0].length, end), depth + 1)));
        i = end + found[0].length;
        continue;
      }
      plain += found[0];
      i += found[0].length;
      continue;
    }
    plain += text[i++];
  }
  if (plain) out.push(plain);
  return out;
}

/** Where the emphasis that begins at `start` ends, -1 where it is none. */
function closing(text, start, mark, missing) {
  const from = start + mark.length;
  const isWord = (c) => c !== undefined && /[\p{L}\p{N}]/u.test(c);
  if (/\s/.test(text[from] ?? " ") || missing.has(mark)) return -1;
  if (mark[0] === "_" && isWord(text[start - 1])) return -1;
  let end = text.indexOf(mark, from + 1);
  while (end > 0) {
    const isLonger = mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark);
    const isInWord = mark[0] === "_" && isWord(text[end + mark.length]);
    if (!/\s/.test(text[end - 1]) && !isLonger && !isInWord) return end;
    end = text.indexOf(mark, end + 1);
  }
  missing.add(mark);
  return -1;
}
