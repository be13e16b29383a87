// Asks a model for an answer, or to go on with a text, and writes what comes into a message while it comes. It
// speaks OpenAI's dialect, as any other client does.

import { events } from "./api.js";
import { chosen } from "./models.js";
import { BASE_MAX_TOKENS, sampling, system } from "./settings.js";

/** What a chat model is told: the system prompt and the messages before number `end`. */
export function chatMessages(conversation, end = conversation.messages.length) {
  const before = system() ? [{ role: "system", content: system() }] : [];
  return [...before, ...conversation.messages.slice(0, end).map(({ role, content }) => ({ role, content }))];
}

/** What a base model continues: the parts before number `end`, as one text. */
export function wholeText(conversation, end = conversation.messages.length) {
  return conversation.messages.slice(0, end).map((part) => part.content).join("");
}

/** Fills the last message of a conversation. changed: called after every piece. Aborting `signal` keeps what
    there is; anything else that ends it early is thrown. */
export async function answer(conversation, signal, changed) {
  const end = conversation.messages.length - 1;
  const message = conversation.messages[end];
  const isChat = conversation.kind === "chat";
  const about = isChat ? { messages: chatMessages(conversation, end) } : { prompt: wholeText(conversation, end) };
  const asked = sampling();
  if (!isChat) asked.max_tokens ??= chosen()?.sampling?.max_tokens ?? BASE_MAX_TOKENS;
  const body = { model: conversation.model, ...about, ...asked, stream: true, stream_options: { include_usage: true } };
  const started = performance.now();
  let first = null;
  let pieces = 0;
  let last = started;
  message.stats = {};
  try {
    for await (const event of events(isChat ? "v1/chat/completions" : "v1/completions", body, signal)) {
      const choice = event.choices?.[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      const reasoning = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? "";
      if (text || reasoning) {
        last = performance.now();
        first ??= last;
        pieces++;
        message.content += text;
        if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
      }
      if (choice?.finish_reason) message.stats.finish = choice.finish_reason;
      if (event.usage) message.stats.tokens = event.usage.completion_tokens;
      if (event.timings) message.stats.rate = event.timings.generated_tokens / event.timings.generate_s;
      if (event.seed !== undefined) message.stats.seed = event.seed;
      changed();
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    message.stats.finish = "stopped";
  } finally {
    if (first !== null) {
      message.stats.first = (first - started) / 1000;
      message.stats.tokens ??= pieces;
      message.stats.rate ??= pieces > 1 ? (pieces - 1) / ((last - first) / 1000) : null;
    }
  }
}
