"""Where DRY's repetitions end: strings such as a line break, as the tokens in which they can come.

Imports the tokenizer. Read next: csrc/repetition.c, which looks for these tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinyllm.tokenizer import Tokenizer

MOST_BYTES = 40  # of a string; what is longer is cut, as in llama.cpp
MOST_AFTER = 20  # tokens after the first


def breaker_ids(tokenizer: Tokenizer, strings: Sequence[str]) -> list[list[int]]:
    """Sequences of ids that hold one of the strings, as llama.cpp takes them: a token that has it in it, or
    one that ends with its beginning, then the tokens of its rest. Looks at the whole vocabulary: about a
    microsecond a token, so keep the result.
    """
    texts = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    of_byte = {text: i for i, text in enumerate(texts) if len(text) == 1}
    found: dict[tuple[int, ...], None] = {}
    for string in strings:
        whole = string.encode()[:MOST_BYTES]
        rests: dict[int, tuple[int, ...]] = {}  # by how many bytes are gone
        for i, text in enumerate(texts):
            if whole in text:
                found[(i,)] = None
                continue
            for n in range(1, len(whole)):
                if text.endswith(whole[:n]):
                    if n not in rests:
                        rests[n] = tuple(_ids(tokenizer, whole[n:], of_byte)[:MOST_AFTER])
                    found[(i,) + rests[n]] = None
    return [list(ids) for ids in found]


def _ids(tokenizer: Tokenizer, data: bytes, of_byte: dict[bytes, int]) -> list[int]:
    """The ids of bytes that may begin amid a character, or end in one that was cut."""
    start = next((i for i, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))
    text = data[start:].decode("utf-8", "ignore")
    ends = [of_byte[data[i : i + 1]] for i in range(start) if data[i : i + 1] in of_byte]
    return [*ends, *(tokenizer.encode(text, bos=False) if text else ())]
