"""Which special tokens of a prompt the template wrote, and which are words of the messages.

A user may type "<|im_end|>", and to a tokenizer that is the token. So where such a text occurs in what the
template was given, it is rendered once more with that text marked by characters that occur nowhere, and where
they come out in the prompt is the user's. The prompt itself is never the marked one: where both differ in
more than the marks, the template has looked at what was marked, and this way of marking says nothing. There
are two ways, one after the other, and then the first once more with what it can hide:

    hidden   each character of the text is another one: keeps lengths, so a template may cut, trim, join,
             escape and encode; not look for the text
    around   a mark before the text and one behind it: a template may look for the text and split at it, and
             change its case; not cut by length

A token that only partly is a user's words is text as well, where these are the end or the beginning of it (a
content that is cut within a token, and its end in another). Where a template writes the brackets and the
message the name between them ("<|" ~ role ~ "|>"), it is the template's. Imports nothing of the package.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import islice
from typing import Any

Find = Callable[[str, int], tuple[int, str] | None]
"""The first text of a special token in a text, from an offset on: its offset, and it."""

Span = tuple[int, int]
Piece = tuple[str, bool]  # a text of a span, and whether it stands in an assistant's message
_MOST = 256  # characters of a token's beginning or end that are looked for; different ones that are hidden
_MOST_SECONDS = 2.0  # of trying what can be hidden


class Origins:
    """For one vocabulary: `special_tokens`, and `find` that finds their texts."""

    def __init__(self, special_tokens: Iterable[str], find: Find) -> None:
        tokens = sorted(filter(None, special_tokens))
        self._find = find
        self._tokens, self._reversed = tokens, sorted(token[::-1] for token in tokens)
        self._longest = min(_MOST, max(map(len, tokens), default=0))

    def spans(self, text: str) -> list[Span]:
        """Where special tokens stand in a text, and where it begins or ends within one."""
        whole, start = [], 0
        while found := self._find(text, start):
            start = found[0] + len(found[1])
            whole.append((found[0], start))
        first = whole[0][0] if whole else len(text)
        n_before = self._begun(self._reversed, text[: min(first, _MOST)][::-1])
        n_behind = self._begun(self._tokens, text[max(start, len(text) - _MOST) :])
        if n_before + n_behind > len(text):
            return [(0, len(text))]
        begins = [(0, n_before)] if n_before else []
        ends = [(len(text) - n_behind, len(text))] if n_behind else []
        return [*begins, *whole, *ends]

    def _begun(self, tokens: list[str], text: str) -> int:
        """The length of the longest end of `text` that begins one of the sorted `tokens`, short of all."""
        for n in range(min(len(text), self._longest), 0, -1):
            end = text[len(text) - n :]
            i = bisect_left(tokens, end)
            if i < len(tokens) and tokens[i].startswith(end):
                return n
        return 0

    def in_texts(self, given: Any) -> dict[str, list[Span]]:
        """The texts inside `given` that have spans, with these."""
        return {text: found for text in set(texts(given)) if (found := self.spans(text))}

    def of_template(
        self, prompt: str, is_given: Callable[[int, int], bool] = lambda start, end: False
    ) -> dict[int, str]:
        """The special tokens in `prompt` (offset -> text) that `is_given` does not call a user's."""
        found, start = {}, 0
        while hit := self._find(prompt, start):
            offset, token = hit
            if is_given(offset, offset + len(token)):
                start = offset + 1
            else:
                found[offset] = token
                start = offset + len(token)
        return found


def told_apart(
    origins: Origins,
    given: Mapping[str, Any],
    spans: Mapping[str, Sequence[Span]],
    prompt: str,
    render: Callable[[dict[str, Any]], str | None],
) -> tuple[dict[int, str], set[str]]:
    """The special tokens in `prompt` that its template wrote, as offset -> text; and which of them may be
    words of what it was given as well: that cannot be told.

    given: plain data by name, "messages" among it, of which `render` makes the prompt; None from it: the
    template refuses the data. spans: where special tokens, or their beginnings or ends, stand in the texts of
    `given` (`Origins.in_texts`).
    """
    marking = _Marking(origins, given, spans, prompt, render)
    told = marking.hidden() or marking.around()
    if told is not None:
        return told, set()
    # Piece by piece: what a template looks for, it mostly looks for in what the model said.
    pieces = marking.pieces()
    safe: set[Piece] = set()
    for piece in sorted(pieces):
        if marking.seconds < _MOST_SECONDS and marking.hidden({piece}) is not None:
            safe.add(piece)
    if safe and (told := marking.hidden(safe)) is not None:
        pieces -= safe
    if told is None:
        told = origins.of_template(prompt)
    return told, {text for text, _ in pieces} & set(told.values())


class _Marking:
    """Renders what a template was given once more, marked."""

    def __init__(
        self,
        origins: Origins,
        given: Mapping[str, Any],
        spans: Mapping[str, Sequence[Span]],
        prompt: str,
        render: Callable[[dict[str, Any]], str | None],
    ) -> None:
        self._origins, self._given, self._spans = origins, given, spans
        self._prompt, self._render = prompt, render
        self._unused = list(islice(_unused(given, prompt), _MOST))
        self.seconds = 0.0  # spent on rendering

    def pieces(self) -> set[Piece]:
        found: set[Piece] = set()

        def see(text: str, is_own: bool) -> str:
            found.update((text[start:end], is_own) for start, end in self._spans.get(text, ()))
            return text

        self._changed(see)
        return found

    def hidden(self, pieces: Set[Piece] | None = None) -> dict[int, str] | None:
        """The template's tokens, by hiding these pieces (None: all); None where that changes the prompt."""
        characters = sorted({c for found in (pieces or self.pieces()) for c in found[0]})
        if len(characters) > len(self._unused):
            return None
        marks = dict(zip(characters, self._unused, strict=False))

        def hide(text: str, is_own: bool) -> str:
            def change(part: str) -> str:
                is_wanted = pieces is None or (part, is_own) in pieces
                return "".join(map(marks.__getitem__, part)) if is_wanted else part

            return self._change_spans(text, change)

        is_given: set[int] = set()

        def note(mark: str, offset: int) -> str:
            is_given.add(offset)
            return shown[mark]

        shown = {mark: c for c, mark in marks.items()}
        if not self._is_same(self._changed(hide), marks.values(), note):
            return None
        return self._origins.of_template(
            self._prompt, lambda start, end: not is_given.isdisjoint(range(start, end))
        )

    def around(self) -> dict[int, str] | None:
        """The template's tokens, by marks around all pieces; None where that changes the prompt."""
        before, behind = self._unused[:2]

        def surround(text: str, is_own: bool) -> str:
            return self._change_spans(text, lambda part: before + part + behind)

        at: dict[str, set[int]] = {before: set(), behind: set()}

        def note(mark: str, offset: int) -> str:
            at[mark].add(offset)
            return ""

        if not self._is_same(self._changed(surround), at, note):
            return None

        def is_given(start: int, end: int) -> bool:
            inside = range(start + 1, end)
            is_whole = start in at[before] and end in at[behind]
            return is_whole or not all(marks.isdisjoint(inside) for marks in at.values())

        return self._origins.of_template(self._prompt, is_given)

    def _change_spans(self, text: str, change: Callable[[str], str]) -> str:
        parts, at = [], 0
        for start, end in self._spans.get(text, ()):
            parts += [text[at:start], change(text[start:end])]
            at = end
        return "".join([*parts, text[at:]])

    def _changed(self, change: Callable[[str, bool], str]) -> dict[str, Any]:
        """What was given, with every text changed; the second argument: whether an assistant's."""
        own, other = (partial(_with, change, is_own) for is_own in (True, False))
        changed = {name: _mapped(value, other) for name, value in self._given.items() if name != "messages"}
        changed["messages"] = [
            _mapped(message, own if message["role"] == "assistant" else other)
            for message in self._given["messages"]
        ]
        return changed

    def _is_same(self, data: dict[str, Any], marks: Iterable[str], note: Callable[[str, int], str]) -> bool:
        """Whether the prompt of marked data is the prompt but for the marks. `note` gets each mark with its
        offset in the prompt, and says what stands there."""
        start = time.thread_time()
        marked = self._render(data)
        self.seconds += time.thread_time() - start
        if marked is None:
            return False
        forms = {form: mark for mark in marks for form in (mark, _escaped(mark))}
        parts, length, at = [], 0, 0
        for match in re.finditer("|".join(map(re.escape, forms)) or "(?!)", marked):
            length += match.start() - at
            parts += [marked[at : match.start()], note(forms[match[0]], length)]
            length, at = length + len(parts[-1]), match.end()
        return "".join([*parts, marked[at:]]) == self._prompt


def texts(value: Any) -> Iterator[str]:
    """Every text inside, keys of dicts as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _with(change: Callable[[str, bool], str], is_own: bool, text: str) -> str:
    return change(text, is_own)


def _unused(given: Any, prompt: str) -> Iterator[str]:
    """Characters for private use that occur nowhere, as themselves or as JSON escapes them."""
    used = set().union(prompt, *texts(given))
    escaped = any("\\u" in text for text in (*texts(given), prompt))
    for code in (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)):
        if chr(code) not in used and not (escaped and _occurs(_escaped(chr(code)), given, prompt)):
            yield chr(code)


def _occurs(text: str, given: Any, prompt: str) -> bool:
    return text in prompt or any(text in other for other in texts(given))


def _escaped(character: str) -> str:
    """As JSON in ASCII has it."""
    data = character.encode("utf-16-be")
    return "".join(f"\\u{data[i : i + 2].hex()}" for i in range(0, len(data), 2))
