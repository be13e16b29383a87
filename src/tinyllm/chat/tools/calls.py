"""Tells a model's calls of tools from the rest of its answer, while it streams.

`CallSplitter` stands after the reasoning splitter: what that calls text is fed to it. Its parts are text,
the name and the arguments of calls as they come, and calls that are whole; what they say does not depend on
where the text is cut. Nothing that a model writes raises: what begins like a call and is none comes back as
text, with the reason beside it. Imports formats, scan, shapes, values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tinyllm.chat.tools.formats import Format
from tinyllm.chat.tools.grammar import Schema
from tinyllm.chat.tools.scan import SPACE, Ended, Malformed, NotACall, Scan, Steps
from tinyllm.chat.tools.shapes import ToolCall
from tinyllm.chat.tools.values import loads


@dataclass(frozen=True)
class Part:
    """A part of an answer.

    kind "text": text is the answer's own. error: why this text, which began like a call, is none; where index
    is given, the parts of that call which came before count for nothing.
    kind "tool_call": text is further text of the arguments of call `index`, which together are a JSON object.
    name: on its first part; id: there too, empty where the format writes it later. call: on its last.
    """

    kind: Literal["text", "tool_call"]
    text: str = ""
    index: int | None = None
    name: str = ""
    id: str = ""
    call: ToolCall | None = None
    error: str | None = None


class _Draft:
    """A call that is being read."""

    def __init__(self) -> None:
        self.index: int | None = None
        self.name, self.id = "", ""
        self.texts: list[str] = []
        self.arguments: dict[str, Any] | None = None  # None: not complete
        self.n_taken = 0  # how much had been taken of the text when it was


class CallSplitter:
    """tools: OpenAI's dicts (of `as_tools`). n_before: how many calls the conversation has already, so that
    ids which count do not come twice. prompt: its end, for a prompt that has opened a call.

    calls, errors: what there was so far.
    """

    def __init__(
        self, format: Format, tools: Iterable[Mapping[str, Any]], *, n_before: int = 0, prompt: str = ""
    ) -> None:
        self.calls: list[ToolCall] = []
        self.errors: list[str] = []
        self._format, self._n_before = format, n_before
        self._schemas: dict[str, Schema] = {
            tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools
        }
        self._scan = Scan()
        self._parts: list[Part] = []
        self._texts: list[str] = []  # of the last of them
        self._ids: dict[str, _Draft] = {}
        self._draft: _Draft | None = None
        self._n_begun = 0
        self._said = False  # there was text
        self._after_call = False  # and since then nothing but space
        self._spaces: list[str] = []  # at the end of the text so far
        ended = prompt.rstrip()
        self._opened = next((mark for mark in format.shape.opens if ended.endswith(mark)), None)
        self._steps = self._main()

    @property
    def is_in_call(self) -> bool:
        """Whether what comes next belongs to a call, as far as known."""
        return self._scan.taken is not None

    def feed(self, piece: str) -> list[Part]:
        """What is certain after this piece, in order."""
        self._scan.feed(piece)
        return self._go_on()

    def flush(self) -> list[Part]:
        """The answer ends here: what was held back."""
        self._scan.end()
        return self._go_on()

    def _go_on(self) -> list[Part]:
        next(self._steps, None)
        self._join()
        parts, self._parts = self._parts, []
        return parts

    def _main(self) -> Steps[None]:
        scan, shape = self._scan, self._format.shape
        try:
            mark = self._opened or (yield from self._start())
            while True:
                if mark is None:
                    mark = yield from scan.until(shape.opens, self._say)
                yield from self._section(mark)
                mark = None
        except Ended:
            self._say(scan.rest())
            if not self._after_call and self._spaces:
                self._emit("".join(self._spaces))

    def _start(self) -> Steps[str | None]:
        """The mark of a call that counts only where the answer begins."""
        if not self._format.shape.starts:
            return None
        space: list[str] = []
        try:
            yield from self._scan.match(SPACE, space.append)
        finally:
            self._say("".join(space))
        return (yield from self._scan.take(*self._format.shape.starts))

    def _section(self, mark: str) -> Steps[None]:
        scan = self._scan
        scan.start(mark)
        self._draft = None
        n_calls = len(self.calls)
        try:
            yield from self._format.shape.read(scan, self, mark)
            self._end_call()
            scan.stop()
        except Malformed as e:
            self._fail(str(e), mark)
        except NotACall:
            self._say(scan.stop())
        except Ended:
            is_open = self._draft is not None and self._draft.arguments is None
            self._end_call()
            scan.rest()
            if is_open or len(self.calls) == n_calls:
                self._fail("the text ends before the call is complete", mark)
            else:
                scan.stop()
            raise

    # ---- what a shape tells

    def begin(self) -> None:
        self._end_call()
        self._draft = _Draft()

    def name(self, name: str, id: str = "") -> Schema:
        assert self._draft is not None
        if name not in self._schemas:
            known = ", ".join(self._schemas)
            raise Malformed(f"it calls {name[:80]!r}, which is none of the tools ({known[:200]})")
        draft = self._draft
        draft.index, draft.name, draft.id = self._n_begun, name, id
        self._n_begun += 1
        if not self._format.shape.has_late_ids:
            self._give_id(draft)
        self._add(Part("tool_call", "", draft.index, name, draft.id))
        return self._schemas[name]

    def argument(self, text: str) -> None:
        draft = self._draft
        assert draft is not None
        draft.texts.append(text)
        self._add(Part("tool_call", text, draft.index))

    def complete(self, id: str = "") -> None:
        draft = self._draft
        assert draft is not None
        arguments = loads("".join(draft.texts))
        if not isinstance(arguments, dict):
            raise Malformed(f"its arguments are a {type(arguments).__name__}, not an object")
        draft.arguments, draft.id = arguments, id or draft.id
        assert self._scan.taken is not None
        draft.n_taken = len(self._scan.taken)

    # ---- what comes of it

    def _end_call(self, n_taken: int | None = None) -> None:
        """Passes on the call that is complete, if one is, with what was taken since it began."""
        draft, scan = self._draft, self._scan
        if draft is None or draft.arguments is None:
            return
        assert scan.taken is not None
        raw, scan.taken = "".join(scan.taken[:n_taken]), [] if n_taken is None else scan.taken[n_taken:]
        self._give_id(draft)
        call = ToolCall(draft.id, draft.name, draft.arguments, raw)
        self.calls.append(call)
        self._add(Part("tool_call", "", draft.index, call=call))
        self._draft = None
        self._spaces.clear()
        self._after_call = True

    def _give_id(self, draft: _Draft) -> None:
        """The id that was written, once; else one that counts."""
        number = self._n_before + (draft.index or 0)
        while self._ids.setdefault(draft.id, draft) is not draft or not draft.id:
            draft.id = self._format.id_of(number, draft.name)
            number += 1

    def _fail(self, message: str, mark: str) -> None:
        if self._draft is not None and self._draft.arguments is not None:
            self._end_call(self._draft.n_taken)
        index = self._draft.index if self._draft is not None else None
        self._draft = None
        text = self._scan.stop()
        if index is None and mark in self._format.shape.starts:  # an answer in JSON, say
            self._say(text)
            return
        error = f"a call of a tool is malformed: {message}"
        self.errors.append(error)
        self._say(text, error, index)

    def _say(self, text: str, error: str | None = None, index: int | None = None) -> None:
        """Text of the answer. Space around calls is dropped; blocks of text are joined with an empty line."""
        if not error and (not text or text.isspace()):
            if text:
                self._spaces.append(text)
            return
        kept = text.rstrip()
        before, self._spaces = "".join(self._spaces), [text[len(kept) :]] if len(kept) < len(text) else []
        if self._after_call:
            before, kept = ("\n\n" if self._said else ""), kept.lstrip()
            self._after_call = False
        self._emit(before + kept, error, index)

    def _emit(self, text: str, error: str | None = None, index: int | None = None) -> None:
        self._said = True
        self._add(Part("text", text, index, error=error))

    def _add(self, part: Part) -> None:
        """Parts that only bring further text of what the last one was about become one with it."""
        last = self._parts[-1] if self._parts else None
        is_plain = not (part.name or part.call or part.error)
        if (
            last is not None
            and is_plain
            and (last.kind, last.index) == (part.kind, part.index)
            and not (last.call or last.error)
        ):
            self._texts.append(part.text)
        else:
            self._join()
            self._parts.append(part)
            self._texts = [part.text]

    def _join(self) -> None:
        if len(self._texts) > 1:
            self._parts[-1] = replace(self._parts[-1], text="".join(self._texts))
        self._texts = []
