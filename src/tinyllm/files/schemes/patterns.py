"""Regular expressions from files, which come from strangers: only those that take no more than a moment to
match."""

from __future__ import annotations

import re
from functools import lru_cache
from re import Pattern

from tinyllm.config.fields import brief
from tinyllm.errors import FormatError, UnsupportedError

MAX_LENGTH = 500
MAX_REPEATS = 4  # each may multiply the time by the length of a name


@lru_cache(maxsize=256)
def safe_pattern(text: str) -> Pattern[str]:
    """Compiled. Raises FormatError for what is none, UnsupportedError for one with repeats within repeats, or
    with too many."""
    if len(text) > MAX_LENGTH:
        raise UnsupportedError(f"the pattern {brief(text)} of {len(text)} characters is too long")
    bare = re.sub(r"\\.|\[[^]]*\]", "x", text)
    if len(re.findall(r"[*+?{]", bare)) > MAX_REPEATS or re.search(r"\)\s*[*+{]", bare):
        raise UnsupportedError(f"the pattern {brief(text)} repeats too much")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"{brief(text)} is no pattern: {error}") from None
