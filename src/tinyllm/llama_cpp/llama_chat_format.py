"""How messages become a prompt, and a completion an answer: chat formats and handlers, by name or your own.

A handler takes a `Llama`, messages and the options of a chat, and returns the chat's dict, or an iterator of
chunks with stream=True. A formatter only makes the prompt; `chat_formatter_to_chat_completion_handler` makes
a handler of it. The model's own template is tinyllm's business (docs/chat.md). Imports arguments.py,
chat_styles.py, completions.py. llama.py calls a handler for each chat.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tinyllm import SamplingParams
from tinyllm.chat.templates import ChatTemplate
from tinyllm.errors import ArgumentError
from tinyllm.llama_cpp.arguments import schema_of, strings_of
from tinyllm.llama_cpp.chat_styles import CHATML_TOOLS, STYLES, Style
from tinyllm.llama_cpp.completions import (
    Writer,
    call_delta,
    call_id,
    calls_message,
    chat_chunk,
    chat_of,
    text_to_call,
    text_to_chat,
)
from tinyllm.llama_cpp.llama_grammar import LlamaGrammar, grammar_of_format

Message = Mapping[str, Any]
Messages = Sequence[Message]


class LlamaChatCompletionHandler(Protocol):
    """`handler(llama=..., messages=..., **options)`: options are those of `create_chat_completion`."""

    def __call__(self, *, llama: Any, messages: Messages, **options: Any) -> Any: ...


class LlamaChatCompletionHandlerNotFoundException(ArgumentError):
    """There is no chat format of this name."""


class LlamaChatCompletionHandlerRegistry:
    """Handlers by name; all registries are one."""

    _handlers: dict[str, LlamaChatCompletionHandler] = {}  # noqa: RUF012

    def register_chat_completion_handler(
        self, name: str, chat_handler: LlamaChatCompletionHandler, overwrite: bool = False
    ) -> None:
        if name in self._handlers and not overwrite:
            raise ArgumentError(f"there is a chat format {name!r} already; overwrite=True replaces it")
        self._handlers[name] = chat_handler

    def unregister_chat_handler(self, name: str) -> None:
        if name not in self._handlers:
            raise ArgumentError(f"there is no chat format {name!r}")
        del self._handlers[name]

    def get_chat_completion_handler_by_name(self, name: str) -> LlamaChatCompletionHandler:
        if name not in self._handlers:
            raise LlamaChatCompletionHandlerNotFoundException(
                f"there is no chat format {name!r}, only {', '.join(self._handlers)}; "
                "register_chat_format adds one"
            )
        return self._handlers[name]


def get_chat_completion_handler(name: str) -> LlamaChatCompletionHandler:
    """Raises LlamaChatCompletionHandlerNotFoundException."""
    return LlamaChatCompletionHandlerRegistry().get_chat_completion_handler_by_name(name)


def register_chat_completion_handler(name: str) -> Callable[[Any], Any]:
    """A decorator: the handler below it gets this name."""

    def register(handler: LlamaChatCompletionHandler) -> LlamaChatCompletionHandler:
        LlamaChatCompletionHandlerRegistry().register_chat_completion_handler(name, handler)
        return handler

    return register


@dataclass
class ChatFormatterResponse:
    """A prompt, and what ends its answer. added_special: the prompt has its BOS."""

    prompt: str
    stop: str | list[str] | None = None
    stopping_criteria: Any = None
    added_special: bool = False


class ChatFormatter(Protocol):
    """`formatter(messages=..., **options)`: options are functions, function_call, tools, tool_choice."""

    def __call__(self, *, messages: Messages, **options: Any) -> ChatFormatterResponse: ...


def register_chat_format(name: str) -> Callable[[Any], Any]:
    """A decorator: the formatter below it gets this name."""

    def register(formatter: ChatFormatter) -> ChatFormatter:
        handler = chat_formatter_to_chat_completion_handler(formatter)
        LlamaChatCompletionHandlerRegistry().register_chat_completion_handler(name, handler)
        return formatter

    return register


class Jinja2ChatFormatter:
    """A formatter of a Jinja template, which runs in tinyllm's sandbox."""

    def __init__(
        self,
        template: str,
        eos_token: str,
        bos_token: str,
        add_generation_prompt: bool = True,
        stop_token_ids: list[int] | None = None,
    ) -> None:
        self.template, self.eos_token, self.bos_token = template, eos_token, bos_token
        self.add_generation_prompt = add_generation_prompt
        self.stop_token_ids = None if stop_token_ids is None else set(stop_token_ids)
        self._template = ChatTemplate(template, bos_token=bos_token, eos_token=eos_token)

    def __call__(self, *, messages: Messages, **options: Any) -> ChatFormatterResponse:
        prompt = self._template.render(
            messages, add_generation_prompt=self.add_generation_prompt, **_given(options)
        )
        ends, criteria = self.stop_token_ids, None
        if ends is not None:
            criteria = [lambda tokens, logits: int(tokens[-1]) in ends]
        return ChatFormatterResponse(prompt, [self.eos_token], criteria, added_special=True)

    def to_chat_handler(self) -> LlamaChatCompletionHandler:
        return chat_formatter_to_chat_completion_handler(self)


def hf_tokenizer_config_to_chat_formatter(
    tokenizer_config: Mapping[str, Any], add_generation_prompt: bool = True
) -> ChatFormatter:
    """Of the contents of a tokenizer_config.json: chat_template, bos_token and eos_token, as texts."""
    for name in ("chat_template", "bos_token", "eos_token"):
        if not isinstance(tokenizer_config.get(name), str):
            raise ArgumentError(f"tokenizer_config has no text under {name!r}")
    bos, eos = tokenizer_config["bos_token"], tokenizer_config["eos_token"]
    template = ChatTemplate(tokenizer_config["chat_template"], bos_token=bos, eos_token=eos)

    def format(*, messages: Messages, **options: Any) -> ChatFormatterResponse:
        if add_generation_prompt:  # by an empty answer, which the model goes on from
            messages = [*messages, {"role": "assistant", "content": ""}]
        prompt = template.render(messages, add_generation_prompt=False, **_given(options))
        return ChatFormatterResponse(prompt, [eos, bos], added_special=True)

    return format


def hf_tokenizer_config_to_chat_completion_handler(
    tokenizer_config: Mapping[str, Any], add_generation_prompt: bool = True
) -> LlamaChatCompletionHandler:
    return chat_formatter_to_chat_completion_handler(
        hf_tokenizer_config_to_chat_formatter(tokenizer_config, add_generation_prompt)
    )


def hf_autotokenizer_to_chat_formatter(
    pretrained_model_name_or_path: str | os.PathLike[str],
) -> ChatFormatter:
    """Of a tokenizer of transformers, which this needs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path)

    def format(*, messages: Messages, **options: Any) -> ChatFormatterResponse:
        prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, **_given(options))
        return ChatFormatterResponse(prompt, tokenizer.eos_token, added_special=True)

    return format


def hf_autotokenizer_to_chat_completion_handler(
    pretrained_model_name_or_path: str | os.PathLike[str],
) -> LlamaChatCompletionHandler:
    return chat_formatter_to_chat_completion_handler(
        hf_autotokenizer_to_chat_formatter(pretrained_model_name_or_path)
    )


def chat_formatter_to_chat_completion_handler(chat_formatter: ChatFormatter) -> LlamaChatCompletionHandler:
    """A handler that makes the prompt and continues it. Tools are the formatter's business, but for one that
    `tool_choice` names: the answer is then its arguments, as its schema says."""

    def handler(*, llama: Any, messages: Messages, **options: Any) -> Any:
        tools, choice = _tools_of(options)
        named = {name: options.get(name) for name in ("functions", "function_call")}
        made = chat_formatter(messages=messages, **named, tools=tools, tool_choice=choice)
        prompt = llama.tokenize(made.prompt.encode(), add_bos=not made.added_special, special=True)
        return _answer(llama, prompt, options, tools, choice, made.stop, made.stopping_criteria)

    return handler


def template_handler(source: str | None = None) -> LlamaChatCompletionHandler:
    """A handler of the model's own template, or of one of this source. Calls of tools come back as such."""

    def handler(*, llama: Any, messages: Messages, **options: Any) -> Any:
        tools, choice = _tools_of(options)
        if tools and choice != "none":
            return _with_tools(llama, messages, options, tools, choice, source)
        prompt = llama.llm.chat_ids(messages, tools=tools, chat_template=source)
        return _answer(llama, prompt, options, tools, choice)

    return handler


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _tools_of(options: Mapping[str, Any]) -> tuple[list[Any] | None, Any]:
    """`tools` and `tool_choice`, which the old `functions` and `function_call` stand for too."""
    tools, choice = options.get("tools"), options.get("tool_choice")
    if options.get("functions") is not None:
        tools = [{"type": "function", "function": function} for function in options["functions"]]
    call = options.get("function_call")
    if isinstance(call, Mapping):
        choice = {"type": "function", "function": {"name": call.get("name")}}
    elif call is not None:
        choice = call
    if isinstance(choice, Mapping):
        name = (choice.get("function") or {}).get("name")
        if name not in [(tool.get("function") or {}).get("name") for tool in tools or []]:
            raise ArgumentError(f"tool_choice names {name!r}, which is none of the tools")
    elif choice not in (None, "none", "auto", "required"):
        raise ArgumentError(f"tool_choice is {choice!r}, expected 'none', 'auto', 'required' or a function")
    return tools, choice


def _answer(
    llama: Any,
    prompt: list[int],
    options: Mapping[str, Any],
    tools: Sequence[Any] | None,
    choice: Any,
    stop: str | list[str] | None = None,
    stopping_criteria: Any = None,
) -> Any:
    """The answer that continues this prompt."""
    stream, grammar = options["stream"], grammar_of_format(options["response_format"]) or options["grammar"]
    tool = None
    if isinstance(choice, Mapping):
        name = choice["function"]["name"]
        tool = next(tool for tool in tools or [] if tool["function"]["name"] == name)
        grammar = LlamaGrammar(_schema=schema_of(tool))
    answer = llama.create_completion(
        prompt=prompt,
        stop=[*strings_of(options["stop"]), *strings_of(stop)],
        stopping_criteria=stopping_criteria,
        grammar=grammar,
        logprobs=_n_top(options),
        **{name: options[name] for name in _PASSED},
    )
    if tool is not None:
        return text_to_call(answer, tool["function"]["name"], stream)
    return text_to_chat(answer, stream)


# Of a chat's options those that a completion takes as they are.
_PASSED = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "stream", "seed", "max_tokens", "presence_penalty",
    "frequency_penalty", "repeat_penalty", "tfs_z", "mirostat_mode", "mirostat_tau", "mirostat_eta", "model",
    "logits_processor", "logit_bias",
)  # fmt: skip


def _n_top(options: Mapping[str, Any]) -> int | None:
    return (options["top_logprobs"] or 0) if options["logprobs"] else None


def _with_tools(
    llama: Any,
    messages: Messages,
    options: Mapping[str, Any],
    tools: Sequence[Any],
    choice: Any,
    source: str | None,
) -> Any:
    """An answer that may call tools, in the format that the template teaches."""
    grammar = grammar_of_format(options["response_format"]) or options["grammar"]
    params: SamplingParams = llama.chat_params(options, grammar, strings_of(options["stop"]), _n_top(options))
    name = choice["function"]["name"] if isinstance(choice, Mapping) else choice or "auto"
    llama.release()
    strict = name != "auto" or any(tool["function"].get("strict") for tool in tools)
    ask: dict[str, Any] = {
        "tools": tools,
        "tool_choice": name,
        "strict": strict,
        "chat_template": source,
        "params": params,
    }
    writer: Writer = llama.writer(options["model"])
    if options["stream"]:
        return _tool_chunks(llama, llama.llm.chat(messages, stream=True, **ask), writer, options)
    answer = llama.llm.chat(messages, **ask)
    llama.was_written(answer)
    usage = {"prompt": len(answer.prompt_tokens), "answer": len(answer.tokens)}
    whole = writer.whole(
        answer.text, llama.logprobs_of(answer, writer), answer.finish_reason, usage["prompt"], usage["answer"]
    )
    message: dict[str, Any] = {"content": answer.text}
    if answer.tool_calls:
        calls = [
            (call_id(i, call.name, writer.id), call.name, json.dumps(call.arguments, ensure_ascii=False))
            for i, call in enumerate(answer.tool_calls)
        ]
        message = calls_message(calls, answer.text or None)
    if answer.reasoning is not None:
        message["reasoning_content"] = answer.reasoning
    return chat_of(whole, message, "tool_calls" if answer.tool_calls else answer.finish_reason)


def _tool_chunks(llama: Any, stream: Any, writer: Writer, options: Mapping[str, Any]) -> Iterator[Any]:
    names: dict[int, str] = {}
    with stream:
        yield chat_chunk(writer.chunk(""), {"role": "assistant"})
        for piece in stream:
            chunk = writer.chunk(piece.text, llama.piece_logprobs(piece, writer, options["logprobs"]))
            if piece.index is not None and piece.kind == "tool_call":
                names[piece.index] = name = piece.name or names.get(piece.index, "")
                call = (piece.index, call_id(piece.index, name, writer.id), name, piece.text)
                yield chat_chunk(chunk, call_delta(call))
            elif piece.text:
                key = "reasoning_content" if piece.kind == "reasoning" else "content"
                yield chat_chunk(chunk, {key: piece.text})
    answer = stream.completion
    llama.was_written(answer)
    yield chat_chunk(writer.chunk(""), {}, "tool_calls" if answer.tool_calls else answer.finish_reason)


def _style_formatter(style: Style) -> ChatFormatter:
    def format(*, messages: Messages, **options: Any) -> ChatFormatterResponse:
        return ChatFormatterResponse(style.prompt(messages), style.stop)

    return format


for _name, _style in STYLES.items():
    register_chat_format(_name)(_style_formatter(_style))
register_chat_completion_handler("chatml-function-calling")(template_handler(CHATML_TOOLS))
