"""The prompt that asks a reranker whether a text answers a query, as its makers trained it.

Its special tokens are those that the template wrote; what a query or a text spells like one is text. Imports
chat's prompts, `config`, `tokenizer` and `errors`. Read next: heads.py, which scores the answer; llm.py's
`rerank` is the door.
"""

from __future__ import annotations

import re

from tinyllm.chat.prompts import Prompts
from tinyllm.config.embedding import WEB_SEARCH
from tinyllm.errors import ArgumentError
from tinyllm.tokenizer import Tokenizer

_PLACES = re.compile(r"\{(query|document|instruction)\}")


def of_template(
    template: str, tokenizer: Tokenizer, query: str, text: str, instruction: str | None
) -> list[int]:
    """The ids of a prompt with places for {query} and {document}. instruction: in place of the usual one.
    Raises ArgumentError where the template does not have that."""
    template = template.replace(WEB_SEARCH, "{instruction}", 1)
    if instruction is not None and "{instruction}" not in template:
        raise ArgumentError("this reranker's template has no place for an instruction; leave it out")
    values = {"query": query, "document": text, "instruction": instruction or WEB_SEARCH}
    prompt, special = "", dict[int, str]()
    for i, piece in enumerate(_PLACES.split(template)):
        if i % 2:  # the name of a place
            prompt += values[piece]
            continue
        start = 0
        while found := tokenizer.find_special(piece, start):
            special[len(prompt) + found[0]] = found[1]
            start = found[0] + len(found[1])
        prompt += piece
    return tokenizer.encode(prompt, bos=False, special=special)  # with nothing around it, as llama.cpp does


def of_conversation(prompts: Prompts, query: str, text: str, instruction: str) -> list[int]:
    """The same by a chat template that knows the roles of a query and of a document."""
    messages = [{"role": "query", "content": query}, {"role": "document", "content": text}]
    if instruction:
        messages.insert(0, {"role": "system", "content": instruction})
    return prompts.ids(messages)
