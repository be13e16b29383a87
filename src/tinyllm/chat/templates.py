"""Chat templates: from a conversation to the exact prompt that a model was trained on.

A model brings its own Jinja template: in a GGUF's metadata or beside the weights of a directory. This module
finds it and renders it; sandbox.py keeps it harmless, forms.py brings messages into the forms that it takes.
Imports errors, files and these two. Read next: prompts.py, which makes ids of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.chat.forms import Forms, StoppedError, as_taken, check_unicode, plain
from tinyllm.errors import Error, FormatError, MemoryLimitError, TemplateError, comes_from
from tinyllm.files import is_there, read_json_if_any, read_small, show, show_words

if TYPE_CHECKING:
    from tinyllm.chat.sandbox import Sandbox

Message = Mapping[str, Any]

_TOOL_USE = "tool_use"  # the name that model makers give to the template with tools
_GIVEN = {"bos_token", "eos_token", "messages", "tools", "documents", "add_generation_prompt"}  # by `render`
_TRIAL = 0.05  # of a template's limits, for each of the small conversations that show what it takes

# Tokens that open a turn in the chat formats that are around.
_TURN_TOKENS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|user\|>|\[INST\]|<\|start\|>|"
    r"<\|start_of_role\|>|<\|START_OF_TURN_TOKEN\|>|<｜User｜>"
)


@dataclass(frozen=True)
class Given:
    """A conversation, ready for `ChatTemplate.run`: all that one of its sources gets, as plain data."""

    source: str
    variables: Mapping[str, Any]

    def with_(self, **variables: Any) -> Given:
        return replace(self, variables={**self.variables, **variables})


class ChatTemplate:
    """A model's chat template.

    source: the Jinja text. bos_token, eos_token: the texts that the template knows under these names.
    name: the template's name or file, for messages. tool_source: a second template, used when tools are
    given.
    variables: further names that the template may use, such as other special tokens.

    Compiled on the first `render`, so that a broken template does not keep its model from being loaded.
    Threads may share it.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        name: str = "chat template",
        tool_source: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(source, str):
            raise TypeError(f"a chat template must be a str, not {type(source).__name__}")
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.name = name
        self.tool_source = tool_source
        self.variables = dict(variables or {})
        self._compiled: dict[str, tuple[Sandbox, Any]] = {}
        _sandbox()  # imported while a model is loaded, not by a call, amid which the process may fork
        self._forms: dict[str, Forms] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`, each a mapping with "role" and "content" (and what else the template
        reads), in any form that forms.py knows.

        tools: JSON schemas of functions. documents: texts for retrieval, where the template knows them.
        add_generation_prompt: end with the words that open the assistant's answer.
        kwargs: further variables, such as `enable_thinking=False`; they win over special tokens.

        The text holds the special tokens in full, begin of text included: tokenize it with `special=True,
        bos=False`. Raises TemplateError (the template's own refusal, a broken or a hostile template, with the
        line where there is one), ArgumentError (a text with a lone surrogate, arguments of a tool call that
        are no JSON where the template needs an object), UnsupportedError (images and the like),
        MemoryLimitError and TypeError (something other than plain data).
        """
        given = self.prepare(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **kwargs,
        )
        return self.run(given)

    def prepare(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> Given:
        """The first half of `render`: everything checked, the messages in the forms that the template
        takes."""
        source = self.tool_source if tools and self.tool_source else self.source
        variables = {
            **self.variables,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            **{key: plain(value, key) for key, value in kwargs.items()},
            "messages": _messages(messages),
            "tools": _dicts(tools, "tools"),
            "documents": _dicts(documents, "documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        with self._reported():
            self._compile(source)  # what is no template is not tried on conversations
        taken = as_taken(variables["messages"], self.forms(source))
        return Given(source, variables | {"messages": plain(taken, "messages")})

    def run(self, given: Given) -> str:
        """The second half: the prompt."""
        return self._run(given)

    def _run(self, given: Given, share: float = 1.0) -> str:
        with self._reported():
            environment, template = self._compile(given.source)
            text = environment.render(template, dict(given.variables), share)
            check_unicode(text)
            return text

    def names(self, source: str) -> frozenset[str]:
        """The names of variables that one of the template's sources reads at all."""
        with self._reported():
            return frozenset(_sandbox().names(source, self._filename))

    def free_variables(self) -> list[str]:
        """Names that the template reads and that a caller may give it, such as "enable_thinking"; sorted.

        Raises TemplateError for a template that is not valid.
        """
        with self._reported():
            names = _sandbox().free_variables(self.source, self._filename)
        return sorted(names - {*self.variables, *_GIVEN})

    def forms(self, source: str) -> Forms:
        """The forms of messages that one of the template's sources takes."""
        if source not in self._forms:
            bare = {
                **self.variables,
                "bos_token": self.bos_token,
                "eos_token": self.eos_token,
                "documents": None,
                "add_generation_prompt": True,
            }

            def render(messages: Any, tools: Any) -> str:
                return self._run(Given(source, {**bare, "messages": messages, "tools": tools}), _TRIAL)

            self._forms[source] = Forms(render, source)
        return self._forms[source]

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """What goes wrong inside becomes a TemplateError; what a signal handler raises meanwhile does not."""
        try:
            yield
        except Exception as e:
            if not comes_from(e, "jinja2", "markupsafe", self._filename):
                raise
            raise self._as_ours(e) from None

    def _as_ours(self, e: Exception) -> Error:
        import jinja2

        from tinyllm.chat import sandbox

        match e:
            case sandbox.LimitError():
                return self._error(f"was stopped: {e}", e, StoppedError)
            case sandbox.RefusedError():
                return self._error(f"does not take these messages: {e}", e)
            case jinja2.TemplateSyntaxError():
                return TemplateError(f"the {self.name} is not valid, line {e.lineno}: {_cut(e.message)}")
            case RecursionError():
                return self._error("was stopped: it is nested too deeply", e, StoppedError)
            case jinja2.TemplateError() | ArithmeticError() | LookupError() | TypeError() | ValueError():
                return self._error(f"failed: {e}", e)
            case MemoryError():
                return MemoryLimitError(f"no memory left while rendering the {self.name}")
            case _:  # a template can reach any corner of Jinja
                return self._error(f"failed ({type(e).__name__}): {e}", e)

    def _compile(self, source: str) -> tuple[Sandbox, Any]:
        """Without a lock, which a forked process or a signal handler would find held: two threads may compile
        the same at once."""
        if source not in self._compiled:
            environment = _sandbox()
            self._compiled[source] = environment, environment.compile_template(source, self._filename)
        return self._compiled[source]

    @property
    def _filename(self) -> str:
        return f"<{self.name}>"

    def _error(
        self, what: str, error: BaseException, kind: type[TemplateError] = TemplateError
    ) -> TemplateError:
        lines, trace = [], error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == self._filename:
                lines.append(trace.tb_lineno)
            trace = trace.tb_next
        where = f" (line {lines[-1]})" if lines else ""
        return kind(f"the {self.name} {_cut(what)}{where}")


def _sandbox() -> Sandbox:
    from tinyllm.chat.sandbox import Sandbox  # with Jinja, 40 ms that a model without a template does without

    return Sandbox()


def require(template: ChatTemplate | None, model: str, special_tokens: Iterable[str] = ()) -> ChatTemplate:
    """The template, or the error that says what to pass where a model has none."""
    if template is None:
        raise TemplateError(
            f"{model} has no chat template: it is {without_template(special_tokens)}. Give it a prompt "
            "instead of messages, or pass the template its makers publish as chat_template= (tinyllm-run: "
            "--chat-template)"
        )
    return template


def turn_tokens(special_tokens: Iterable[str]) -> list[str]:
    """The special tokens that open a turn in some chat format."""
    return sorted(text for text in special_tokens if _TURN_TOKENS.fullmatch(text))


def without_template(special_tokens: Iterable[str]) -> str:
    """What a model without a template is, for run and inspect alike: a base model, as far as its files say.

    The vocabulary does not tell. A base model often has that of its chat siblings, turn tokens and all.
    """
    what, turns = "a base model, which continues a text", turn_tokens(special_tokens)
    if not turns:
        return what
    return (
        f"taken for {what}, though its vocabulary has {', '.join(turns[:3])}, as those of chat models and of "
        "many base models do"
    )


def template_from_gguf(metadata: Mapping[str, Any]) -> ChatTemplate | None:
    """The template in a GGUF's metadata (`tokenizer.chat_template`, `tokenizer.chat_template.NAME`), or
    None. Raises FormatError for one that is no text."""
    key = "tokenizer.chat_template"
    stored = {name: value for name, value in metadata.items() if name == key or name.startswith(key + ".")}
    for name, value in stored.items():
        if not isinstance(value, str):
            raise FormatError(f"{show(name)} is a {type(value).__name__}, expected a text")
    sources = {name.removeprefix(key + "."): value for name, value in stored.items()}
    sources.pop("rerank", None)  # of a reranker: no conversation
    if key in sources:
        sources["default"] = sources.pop(key)
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    special = {}
    for name in ("bos", "eos", "unknown", "padding", "seperator"):  # "seperator" is how the format spells it
        key = f"tokenizer.ggml.{name}_token_id"
        index = metadata.get(key, -1)
        if type(index) is not int:
            raise FormatError(f"{key} must be an integer, not {type(index).__name__}")
        if 0 <= index < len(tokens):
            special[_HF_NAMES[name]] = str(tokens[index])
    return _template(sources, special, "chat template in the GGUF file")


_HF_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",
}


def template_from_directory(path: str | Path) -> ChatTemplate | None:
    """The template of a Hugging Face directory, or None.

    chat_template.jinja wins over chat_template.json and over the one in tokenizer_config.json, which may be a
    list of named templates; further ones lie in additional_chat_templates/. Raises FormatError where a file
    is not what it should be.
    """
    folder = Path(path)
    config = read_json_if_any(folder / "tokenizer_config.json")
    special = {
        key: text
        for origin in (read_json_if_any(folder / "special_tokens_map.json"), config)
        for key, value in origin.items()
        if key.endswith("_token") and (text := _token_text(value)) is not None
    }
    stored = config.get("chat_template") or read_json_if_any(folder / "chat_template.json").get(
        "chat_template"
    )
    sources = _named(stored, folder / "tokenizer_config.json")
    name = "chat template in tokenizer_config.json"
    alone = folder / "chat_template.jinja"
    if is_there(alone):
        sources["default"] = _read_text(alone)
        name = "chat template in chat_template.jinja"
    for extra in sorted(folder.glob("additional_chat_templates/*.jinja")):
        if not extra.stem.isprintable():
            raise FormatError(f"{extra.parent}: a template is named {show(extra.name)}; rename or delete it")
        sources[extra.stem] = _read_text(extra)
    return _template(sources, special, name)


def _template(sources: Mapping[str, Any], special: Mapping[str, str], name: str) -> ChatTemplate | None:
    """The default template, or the first there is; the one named tool_use beside it."""
    texts = {key: value for key, value in sources.items() if isinstance(value, str)}
    if not texts:
        return None
    return ChatTemplate(
        texts.get("default") or next(iter(texts.values())),
        bos_token=special.get("bos_token", ""),
        eos_token=special.get("eos_token", ""),
        name=name,
        tool_source=texts.get(_TOOL_USE),
        variables=special,
    )


def _named(stored: Any, where: Path) -> dict[str, Any]:
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {"default": stored}
    if isinstance(stored, list) and all(
        isinstance(e, dict) and {"name", "template"} <= e.keys() for e in stored
    ):
        return {str(entry["name"]): entry["template"] for entry in stored}
    raise FormatError(f"{where}: chat_template is neither a text nor a list of named templates")


def _token_text(value: Any) -> str | None:
    """A special token is written as its text or as an object that holds it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_text(path: Path) -> str:
    try:
        return read_small(path).decode()
    except UnicodeDecodeError as e:
        raise FormatError(f"{path}: cannot be read as text: {e}") from None


def _cut(message: str | None) -> str:
    """A template chooses what stands in its errors."""
    return show_words(message or "", 400)


def _messages(messages: Sequence[Message]) -> Any:
    if isinstance(messages, (str, Mapping)):
        raise TypeError("messages is a list of dicts such as {'role': 'user', 'content': 'Hello'}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"messages[{i}] is no dict with a text under 'role': {str(message)[:80]!r}")
    return plain(list(messages), "messages")


def _dicts(value: Any, where: str) -> Any:
    is_list = isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)
    if value is not None and not is_list:
        raise TypeError(f"{where} must be a list of dicts or None, not {str(value)[:80]!r}")
    return plain(value, where)
