"""Which special tokens of a prompt the template wrote, and which are words of the messages.

A user may type "<|im_end|>", and to a tokenizer that is the token. So where such a text occurs in what the
template was given, it is rendered once more with that text marked by characters that occur nowhere, and where
they come out in the prompt is the user's. The prompt itself is never the marked one: where both differ in
more than the marks, the template has looked at what was marked, and this way of marking says nothing. There
are two ways, one after the other:

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
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Find = Callable[[str, int], tuple[int, str] | None]
"""The first text of a special token in a text, from an offset on: its offset, and it."""

Span = tuple[int, int]
_MOST = 256  # characters of a token's beginning or end that are looked for


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
    given: Any,
    spans: Mapping[str, Sequence[Span]],
    prompt: str,
    render: Callable[[Any], str | None],
) -> dict[int, str] | None:
    """The special tokens in `prompt` that its template wrote: offset -> text. None: they cannot be told from
    what it was given.

    given: plain data, of which `render` makes the prompt; None from it: the template refuses the data.
    spans: where special tokens, or their beginnings or ends, stand in the texts of `given`.
    """
    for way in (_hidden, _around):
        told = way(origins, given, spans, prompt, render)
        if told is not None:
            return told
    return None


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


def _marks_in(marks: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(form) for mark in marks for form in (mark, _escaped(mark))))


def _hidden(
    origins: Origins,
    given: Any,
    spans: Mapping[str, Sequence[Span]],
    prompt: str,
    render: Callable[[Any], str | None],
) -> dict[int, str] | None:
    characters = sorted({c for text, found in spans.items() for start, end in found for c in text[start:end]})
    hidden = dict(zip(characters, _unused(given, prompt), strict=False))
    if len(hidden) < len(characters):
        return None

    def hide(text: str) -> str:
        parts, at = [], 0
        for start, end in spans.get(text, ()):
            parts += [text[at:start], "".join(map(hidden.__getitem__, text[start:end]))]
            at = end
        return "".join([*parts, text[at:]])

    marked = render(_mapped(given, hide))
    if marked is None:
        return None
    shown = {form: c for c, mark in hidden.items() for form in (mark, _escaped(mark))}
    plain, length, at = [], 0, 0
    is_given = bytearray(len(prompt) + 1)
    for match in _marks_in(hidden.values()).finditer(marked):
        length += match.start() - at
        plain += [marked[at : match.start()], shown[match[0]]]
        if length < len(prompt):
            is_given[length] = 1
        length, at = length + 1, match.end()
    if "".join([*plain, marked[at:]]) != prompt:
        return None
    return origins.of_template(prompt, lambda start, end: 1 in is_given[start:end])


def _around(
    origins: Origins,
    given: Any,
    spans: Mapping[str, Sequence[Span]],
    prompt: str,
    render: Callable[[Any], str | None],
) -> dict[int, str] | None:
    unused = _unused(given, prompt)
    before, behind = next(unused, ""), next(unused, "")
    if not behind:
        return None

    def surround(text: str) -> str:
        parts, at = [], 0
        for start, end in spans.get(text, ()):
            parts += [text[at:start], before, text[start:end], behind]
            at = end
        return "".join([*parts, text[at:]])

    marked = render(_mapped(given, surround))
    if marked is None:
        return None
    parts, length, at = [], 0, 0
    starts: set[int] = set()
    ends: set[int] = set()
    for match in _marks_in((before, behind)).finditer(marked):
        parts.append(marked[at : match.start()])
        length += match.start() - at
        (starts if match[0] in (before, _escaped(before)) else ends).add(length)
        at = match.end()
    if "".join([*parts, marked[at:]]) != prompt:
        return None

    def is_given(start: int, end: int) -> bool:
        inside = range(start + 1, end)
        return (start in starts and end in ends) or any(i in starts or i in ends for i in inside)

    return origins.of_template(prompt, is_given)
