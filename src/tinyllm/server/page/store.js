// What this browser keeps: conversations and settings in localStorage, the API key in sessionStorage, nothing
// elsewhere. What cannot be read counts as not there; where the browser keeps nothing, the page remembers.

const PREFIX = "tinyllm.";

function usable(name) {
  try {
    const storage = window[name];
    storage.getItem(PREFIX);
    return storage;
  } catch {
    const kept = new Map();
    return {
      getItem: (key) => kept.get(key) ?? null,
      setItem: (key, value) => kept.set(key, value),
      removeItem: (key) => kept.delete(key),
      key: (i) => [...kept.keys()][i] ?? null,
      get length() {
        return kept.size;
      },
    };
  }
}

const local = usable("localStorage");
const session = usable("sessionStorage");

export function read(name, otherwise) {
  try {
    return JSON.parse(local.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keeps a value; false where there is no room for it. */
export function write(name, value) {
  try {
    local.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const OF = "conversation.";

/** The latest first. */
export function conversations() {
  const found = [];
  for (let i = 0; i < local.length; i++) {
    const key = local.key(i);
    if (key?.startsWith(PREFIX + OF)) found.push(read(key.slice(PREFIX.length)));
  }
  return found.filter(isConversation).sort((a, b) => b.updated - a.updated);
}

function isConversation(value) {
  return Boolean(
    value && typeof value.id === "string" && ["chat", "base"].includes(value.kind) && Array.isArray(value.messages) &&
      value.messages.every((m) => m && typeof m.content === "string" && ["user", "assistant"].includes(m.role)),
  );
}

/** kind: "chat", or "base" for a text that a base model continues, whose messages are its parts. */
export function newConversation(kind, model) {
  const now = Date.now();
  const id = `${now.toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  return { id, kind, model, title: "", created: now, updated: now, messages: [] };
}

export function save(conversation) {
  conversation.updated = Date.now();
  conversation.title = (conversation.messages.find((m) => m.content.trim())?.content ?? "").trim().slice(0, 80);
  return write(OF + conversation.id, conversation);
}

/** Whether nobody has deleted it meanwhile. */
export const isKept = (conversation) => read(OF + conversation.id) !== undefined;

export function remove(conversation) {
  local.removeItem(PREFIX + OF + conversation.id);
}

export const key = {
  get: () => session.getItem(`${PREFIX}key`),
  set: (value) => session.setItem(`${PREFIX}key`, value),
};
