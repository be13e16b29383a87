"""What a conversation on a terminal consists of: `Chat` with a model made for it, `Text` of a base model.

Both know what a line, /undo, /regen, /drop and a saved file mean for them. A talk changes with `keep` and the
commands alone: an answer that fails leaves it as it was. Imports common.py. Read next: interactive.py, the
loop around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli.common import UsageError, counted

if TYPE_CHECKING:
    from tinyllm import LLM, Completion, SamplingParams
    from tinyllm.chat.tools import ToolCall
    from tinyllm.results import Stream

ROLES = ("system", "user", "assistant", "tool")
FREE = 4  # where room is made, a quarter of the context is free afterwards


class Talk:
    """What is said so far. params: of the next answer; where they have a seed, each answer has one of its own
    that follows from it, the first the seed itself."""

    help = ""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm, self.params, self._n_answers = llm, params, 0

    def _params_now(self) -> SamplingParams:
        from tinyllm.engine.sampling import stream_seed

        if self.params.seed is None or self._n_answers == 0:
            return self.params
        return replace(self.params, seed=stream_seed(self.params.seed, self._n_answers))

    def set_params(self, **changes: Any) -> None:
        """A new seed begins its row of seeds anew. Raises ArgumentError."""
        self.params = replace(self.params, **changes)
        if "seed" in changes:
            self._n_answers = 0

    @property
    def greeting(self) -> str:
        raise NotImplementedError

    def start(self, line: str) -> Stream | None:
        """The model's answer to a line; None where there is nothing to say. Changes nothing yet."""
        raise NotImplementedError

    def again(self) -> Stream | None:
        """Another answer in place of the last; None where there is none."""
        raise NotImplementedError

    def keep(self, completion: Completion) -> None:
        """Adds the answer that was started last, and what it answers."""
        self._n_answers += 1

    def calls(self) -> Sequence[ToolCall]:
        """Those of the last answer that have no result yet."""
        return ()

    def go_on(self, results: Sequence[str]) -> Stream | None:
        """The answer to what its calls gave, in their order."""
        return None

    def undo(self) -> str:
        """Takes back the last turn; says what it did."""
        raise NotImplementedError

    def clear(self) -> str:
        raise NotImplementedError

    def set_system(self, text: str) -> str:
        raise NotImplementedError

    def retry(self) -> Stream:
        """The answer that was started last, once more."""
        raise NotImplementedError

    def to_forget(self) -> str:
        """What `make_room` would forget so that this answer has room; "" where nothing helps."""
        raise NotImplementedError

    def make_room(self) -> None:
        """Forgets the oldest part of what this answer goes on from."""
        raise NotImplementedError

    def drop(self, n: int | None) -> str:
        """Forgets the oldest n turns (None: one), or tokens of a text (None: its first half); says what it
        did."""
        raise NotImplementedError

    def show(self) -> Iterator[str]:
        """Lines about the model, the talk and its settings."""
        llm = self._llm
        yield f"{llm.name}: {llm.config.architecture}, context {llm.context}, {llm.device}"
        in_force = self.params.resolve(llm.defaults)
        names = ["temperature", "top_k", "top_p", "min_p"]
        names += [f.name for f in fields(self.params) if f.name not in names and getattr(self.params, f.name)]
        values = [(name, getattr(in_force, name)) for name in names]
        yield ", ".join(f"{name} {f'{v:g}' if isinstance(v, float) else v}" for name, v in values)

    def record(self) -> dict[str, Any]:
        """What /save writes."""
        raise NotImplementedError

    def restore(self, record: Any) -> str:
        """What /load has read, in the place of what was said; says what it is. Raises UsageError."""
        raise NotImplementedError


class Chat(Talk):
    """Messages back and forth through the model's chat template."""

    help = "Type a message and press Enter; pasted lines are one message."

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, **options: Any) -> None:
        """options: further arguments of `LLM.chat`."""
        super().__init__(llm, params)
        self._system, self._options = system, options
        self._messages: list[dict[str, Any]] = []
        self._before: list[dict[str, Any]] = []  # the answer that is made: after these
        self._new: list[dict[str, Any]] = []  # and to these
        self._calls: Sequence[ToolCall] = ()

    @property
    def greeting(self) -> str:
        return f"{Path(self._llm.name).name}: a chat. /help lists the commands, Ctrl-D leaves."

    def start(self, line: str) -> Stream | None:
        return self._ask(self._messages, [{"role": "user", "content": line}]) if line.strip() else None

    def again(self) -> Stream | None:
        if not (turns := self._turns()):
            return None
        return self._ask(self._messages[: turns[-1]], [self._messages[turns[-1]]])

    def calls(self) -> Sequence[ToolCall]:
        return self._calls

    def go_on(self, results: Sequence[str]) -> Stream | None:
        pairs = zip(self._calls, results, strict=True)
        new = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result}
            for call, result in pairs
        ]
        return self._ask(self._messages, new)

    def _ask(self, before: list[dict[str, Any]], new: list[dict[str, Any]]) -> Stream:
        self._before, self._new = before, new
        return self.retry()

    def retry(self) -> Stream:
        messages = self._with_system([*self._before, *self._new])
        stream: Stream = self._llm.chat(messages, params=self._params_now(), stream=True, **self._options)
        return stream

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return messages if self._system is None else [{"role": "system", "content": self._system}, *messages]

    def _turns(self) -> list[int]:
        """Where each turn begins: a message of the user's."""
        return [i for i, message in enumerate(self._messages) if message["role"] == "user"]

    def keep(self, completion: Completion) -> None:
        super().keep(completion)
        answer: dict[str, Any] = {"role": "assistant", "content": completion.text}
        if completion.tool_calls:
            answer["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in completion.tool_calls
            ]
        self._calls = completion.tool_calls
        self._messages = [*self._before, *self._new, answer]

    def undo(self) -> str:
        if not (turns := self._turns()):
            return "there is nothing to take back"
        question = self._messages[turns[-1]]["content"]
        del self._messages[turns[-1] :]
        self._calls = ()
        return f"took back {question[:60]!r} and its answer"

    def clear(self) -> str:
        self._messages, self._calls = [], ()
        return "the conversation starts anew" + ("" if self._system is None else "; the system prompt stays")

    def set_system(self, text: str) -> str:
        if text:
            self._system = None if text == "-" else text
        return "no system prompt" if self._system is None else f"system prompt: {self._system}"

    def _starts(self) -> list[int]:
        """Where what is kept of `_before` may begin: at one of its turns, or behind it."""
        return [i for i, m in enumerate(self._before) if m["role"] == "user"] + [len(self._before)]

    def _n_to_forget(self) -> int:
        """The fewest turns without which a quarter of the context is free, or all, if the rest fits then."""
        names = ("tools", "chat_template", "template_args", "special_in_messages")
        options = {name: value for name, value in self._options.items() if name in names}

        def n_tokens(start: int) -> int:
            kept = self._with_system([*self._before[start:], *self._new])
            return len(self._llm.chat_ids(kept, **options))

        starts, context = self._starts(), self._llm.context
        for n, start in enumerate(starts[1:], 1):
            if n_tokens(start) <= context - context // FREE:
                return n
        return len(starts) - 1 if len(starts) > 1 and n_tokens(starts[-1]) < context else 0

    def to_forget(self) -> str:
        n, n_turns = self._n_to_forget(), len(self._starts()) - 1
        return (f"the oldest {n} of {n_turns} turns" if n_turns > 1 else "the turn before") if n else ""

    def make_room(self) -> None:
        self._before = self._before[self._starts()[self._n_to_forget()] :]

    def drop(self, n: int | None) -> str:
        starts = [*self._turns(), len(self._messages)]
        n = min(n or 1, len(starts) - 1)
        self._messages = self._messages[starts[n] :]
        return f"forgot {counted(n, 'turn')}; {len(starts) - 1 - n} left"

    def show(self) -> Iterator[str]:
        yield from super().show()
        yield self.set_system("")
        yield f"{counted(len(self._turns()), 'turn')} so far"

    def record(self) -> dict[str, Any]:
        return {"model": self._llm.name, "system": self._system, "messages": self._messages}

    def restore(self, record: Any) -> str:
        given = {"messages": record} if isinstance(record, list) else record
        given = given if isinstance(given, Mapping) else {}
        messages, system = given.get("messages"), given.get("system")
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise UsageError("it holds no messages with a role and a text as content")
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        self._messages, self._calls = [dict(message) for message in messages], ()
        self._system = system if isinstance(system, str) else None
        return f"{counted(len(self._turns()), 'turn')}; {self.set_system('')}"


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("role") in ROLES and isinstance(value.get("content"), str)


class Text(Talk):
    """A text that a base model continues: a line begins a new one, an empty line goes on with it."""

    help = "Type the beginning of a text and press Enter; press Enter alone to let the text go on."

    def __init__(self, llm: LLM, params: SamplingParams, *, special: bool = False) -> None:
        super().__init__(llm, params)
        self._special = special
        # One text more a turn: its ids, and how many of them were there before the model went on.
        self._texts: list[tuple[list[int], int]] = []
        self._prompt: str | list[int] = ""  # of the answer that is made
        self._replaces = False  # whether it takes the place of the last

    @property
    def greeting(self) -> str:
        return (
            f"{Path(self._llm.name).name} is a base model: it continues a text rather than answering. Type a "
            "beginning; Enter alone goes on, /help lists the commands, Ctrl-D leaves."
        )

    def start(self, line: str) -> Stream | None:
        if not line and not self._texts:
            return None
        self._prompt, self._replaces = line or self._texts[-1][0], False
        return self.retry()

    def again(self) -> Stream | None:
        if not self._texts:
            return None
        ids, n_given = self._texts[-1]
        self._prompt, self._replaces = ids[:n_given], True
        return self.retry()

    def retry(self) -> Stream:
        return self._llm.stream(self._prompt, self._params_now(), special=self._special)

    def keep(self, completion: Completion) -> None:
        super().keep(completion)
        if self._replaces:
            self._texts.pop()
        self._prompt = ""
        self._texts.append(([*completion.prompt_tokens, *completion.tokens], len(completion.prompt_tokens)))

    def undo(self) -> str:
        if not self._texts:
            return "there is nothing to take back"
        self._texts.pop()
        return "took back the last continuation" + ("" if self._texts else "; there is no text now")

    def clear(self) -> str:
        self._texts.clear()
        return "there is no text now"

    def set_system(self, text: str) -> str:
        return "a base model has no system prompt: put what it should know into the text"

    def _latter(self, ids: list[int], n: int) -> list[int]:
        """n tokens of a text: its last ones, behind what every text of this model begins with."""
        first = ids[:1] if self._llm.tokenizer and ids[:1] == [self._llm.tokenizer.bos_id] else []
        return ids if len(ids) <= n else [*first, *ids[len(ids) - max(n - len(first), 1) :]]

    def to_forget(self) -> str:
        if isinstance(self._prompt, str) or len(self._prompt) <= self._llm.context // FREE:
            return ""
        return f"all but the last {self._llm.context // 2} of {len(self._prompt)} tokens"

    def make_room(self) -> None:
        assert not isinstance(self._prompt, str)
        self._prompt = self._latter(self._prompt, self._llm.context // 2)

    def drop(self, n: int | None) -> str:
        if not self._texts:
            return "there is no text now"
        ids, _ = self._texts[-1]
        kept = self._latter(ids, max(1, len(ids) - (len(ids) // 2 if n is None else n)))
        self._texts[-1] = kept, len(kept)
        return f"forgot {counted(len(ids) - len(kept), 'token')}; {len(kept)} left"

    def show(self) -> Iterator[str]:
        yield from super().show()
        n = len(self._texts[-1][0]) if self._texts else 0
        yield f"{counted(n, 'token')} of text"

    def record(self) -> dict[str, Any]:
        tokens, tokenizer = self._texts[-1][0] if self._texts else [], self._llm.tokenizer
        return {
            "model": self._llm.name,
            "text": tokenizer.decode(tokens) if tokenizer else "",
            "tokens": tokens,
        }

    def restore(self, record: Any) -> str:
        """The very tokens, where they are this model's; else those of the text."""
        text = record.get("text") if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            raise UsageError("it holds no text")
        tokens, tokenizer = record.get("tokens"), self._llm.tokenizer
        n = self._llm.config.vocab_size
        are_ids = isinstance(tokens, list) and all(type(i) is int and 0 <= i < n for i in tokens)
        if tokenizer and not (are_ids and tokenizer.decode(tokens) == text):
            tokens, are_ids = tokenizer.encode(text), True
        if not are_ids:
            raise UsageError(f"its tokens are not of {self._llm.name}")
        self._texts = [(tokens, len(tokens))] if tokens else []
        return f"{counted(len(tokens), 'token')} of text; Enter goes on with it"
