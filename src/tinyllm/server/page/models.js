// The models that are served, and which of them is asked. What is known of one comes from the server
// (/tinyllm/models); one that is not loaded is loaded when it is chosen. Changes are told as "model" events.

import { get, post } from "./api.js";
import { read, write } from "./store.js";

export let all = [];
export let problem = null; // why there is none, or the chosen one cannot be loaded
let name = null;

/** The facts of the chosen model; null before any is known. */
export const chosen = () => all.find((model) => model.name === name) ?? null;

/** Asks what is served, and chooses the model that was chosen last. */
export async function refresh() {
  try {
    all = (await get("tinyllm/models")).models;
  } catch (error) {
    problem = error;
    return changed();
  }
  if (!all.length) return changed();
  await choose(all.some((model) => model.name === read("model")) ? read("model") : all[0].name);
}

export async function choose(wanted) {
  name = wanted;
  problem = null;
  write("model", name);
  changed();
  if (chosen().loaded) return;
  try {
    const facts = await post("tinyllm/load", { model: wanted });
    all = all.map((model) => (model.name === wanted ? facts : model));
  } catch (error) {
    if (name === wanted) problem = error;
  }
  if (name === wanted) changed();
}

function changed() {
  document.dispatchEvent(new Event("model"));
}
