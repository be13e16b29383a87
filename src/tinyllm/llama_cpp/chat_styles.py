"""Chat formats by name: a row each, of the texts that stand around messages.

They are those of llama-cpp-python 0.3.36 for the same names. Left out: openbuddy and open-orca, which are
mostly a system prompt of their makers', functionary, and those for images; `register_chat_format` adds what
is missing. Imports nothing of ours. llama_chat_format.py registers them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Style:
    """turns: role -> what stands before a message and behind it; messages of other roles are left out, but
    for the first of the system's. system: that one, in place of "{}"; default: what it is where there is
    none. Without a message, not even by default, `bare` begins the prompt. opens: the answer follows it.
    """

    turns: Mapping[str, tuple[str, str]]
    opens: str = ""
    system: str = ""
    bare: str | None = None  # None: the system's text, with nothing in it
    default: str = ""
    stop: str | None = None
    after_system: tuple[str, str] | None = (
        None  # around the message that follows the system's, where it differs
    )
    strips: bool = False  # white space around the prompt goes

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        system = next((m.get("content") or "" for m in messages if m["role"] == "system"), "") or self.default
        text = self.bare if self.bare is not None and not system else self.system.replace("{}", system)
        first = self.after_system if system else None
        for message in messages:
            if message["role"] in self.turns:
                before, after = first or self.turns[message["role"]]
                first = None
                content = message.get("content")
                text += before + (content + after if isinstance(content, str) and content else "")
        text += self.opens
        return text.strip() if self.strips else text


def _turns(
    user: str, assistant: str, after: str, after_answer: str | None = None
) -> dict[str, tuple[str, str]]:
    return {"user": (user, after), "assistant": (assistant, after if after_answer is None else after_answer)}


_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
_SNOOZY = (
    "The prompt below is a question to answer, a task to complete, or a conversation to respond to; decide "
    "which and write an appropriate response."
)

STYLES: dict[str, Style] = {
    "llama-2": Style(
        {"user": ("<s>[INST]", "  "), "assistant": ("[/INST]", " </s>")},
        "[/INST]",
        system="[INST] <<SYS>>\n{}\n<</SYS>> ",
        bare=" ",
        after_system=("", " "),
    ),
    "llama-3": Style(
        {role: (_HEADER.format(role), "<|eot_id|>") for role in ("system", "user", "assistant")},
        _HEADER.format("assistant"),
        stop="<|eot_id|>",
    ),
    "alpaca": Style(_turns("### Instruction: ", "### Response: ", "\n\n", "</s>"), system="{}\n\n"),
    "qwen": Style(
        _turns("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        "<|im_start|>assistant\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
        default="You are a helpful assistant.",
        stop="<|endoftext|>",
    ),
    "vicuna": Style(_turns("USER: ", "ASSISTANT: ", " ", "</s>"), "ASSISTANT:", system=_VICUNA + " "),
    "oasst_llama": Style(
        _turns("<|prompter|>", "<|assistant|>", "</s>"),
        "<|assistant|>",
        system="[INST] <<SYS>>\n{}\n<</SYS>>\n\n",
    ),
    "baichuan-2": Style(_turns("<reserved_106>", "<reserved_107>", ""), "<reserved_107>", system="{}"),
    "baichuan": Style(_turns("<reserved_102>", "<reserved_103>", ""), "<reserved_103>", system="{}"),
    "redpajama-incite": Style(_turns("<human>: ", "<bot>: ", "\n"), "<bot>:", system="{}\n", stop="<human>"),
    "snoozy": Style(
        _turns("### Prompt: ", "### Response: ", "\n"),
        "### Response:",
        system="{}\n",
        default=_SNOOZY,
        stop="###",
    ),
    "phind": Style(
        _turns("### User Message: ", "### Assistant: ", "\n\n"),
        "### Assistant:",
        system="### System Prompt\nYou are an intelligent programming assistant.\n\n",
    ),
    "intel": Style(
        _turns("### User:: ", "### Assistant:: ", "\n"), "### Assistant::", system="### System:\n{}\n"
    ),
    "mistrallite": Style(
        _turns("<|prompter|>", "</s>\n<|assistant|>", " "),
        "</s>\n<|assistant|>",
        system="<|system|>{}</s>",
    ),
    "zephyr": Style(
        _turns("<|user|>\n\n", "<|assistant|>\n\n", "</s>\n"),
        "<|assistant|>\n\n",
        system="<|system|>\n{}</s>\n",
        stop="</s>",
    ),
    "pygmalion": Style(
        _turns("<|user|>\n", "<|model|>\n", "\n\n"), "<|model|>\n", system="<|system|>{}\n\n", stop="\n"
    ),
    "chatml": Style(
        _turns("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        "<|im_start|>assistant\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
        stop="<|im_end|>",
    ),
    "mistral-instruct": Style(
        {"user": ("[INST] ", ""), "assistant": (" [/INST]", "</s>")}, " [/INST]", stop="</s>"
    ),
    "chatglm3": Style(
        _turns("<|user|>\n ", "<|assistant|>\n ", ""),
        "<|assistant|>",
        system="<|system|>\n{}",
        stop="</s>",
    ),
    "openchat": Style(
        _turns(
            "GPT4 Correct User: \n",
            "<|end_of_turn|>GPT4 Correct Assistant: \n",
            "<|end_of_turn|>\n",
        ),
        "<|end_of_turn|>GPT4 Correct Assistant: \n",
        system="{}<|end_of_turn|><|end_of_turn|>\n",
        stop="<|end_of_turn|>",
    ),
    "saiga": Style(
        {role: (f"<s>{role}\n", "</s>") for role in ("system", "user", "bot")}, "<s>bot", strips=True
    ),
    "gemma": Style(
        _turns("<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n"),
        "<start_of_turn>model\n",
        stop="<end_of_turn>\n",
    ),
}

# ChatML with tools as Hermes models are shown them, for "chatml-function-calling".
CHATML_TOOLS = """{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif -%}
You may call functions to help with the user's request. Their signatures stand in <tools></tools>:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Write each call as a JSON object with its name and arguments in <tool_call></tool_call>:
<tool_call>
{"name": <function-name>, "arguments": <arguments-as-json>}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|im_start|>assistant
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- if call.function %}{% set call = call.function %}{% endif %}
<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% elif message.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != 'system' -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""
