"""What a GGUF leaves unsaid about its marker tokens, told from the vocabulary itself: which of them end a
turn, and which take the white space beside them.

Invariant: a rule here hangs on tokens that a vocabulary has, never on the name that somebody gave the model.
A name makes a marker of an ordinary token only where no text has it by chance. Imports core. Used by
from_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from tinyllm.tokenizer.core import TokenFlags

# Tokens that end a text or a turn in the chat formats that are around; files name only one or two of them by
# id. These do so whatever their type, for there are converters that write them as text.
TURN_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
# These only as control tokens: </s> strikes text out in HTML, and Gemma, Phi-3 and Qwen2 have it as text.
CONTROL_ENDS = ("</s>", "<eos>", "[EOS]", "<EOT>", "[EOT]")

# Where all of a set are in the vocabulary, <|end|> ends a message, and the turn goes on.
_MESSAGE_ENDS = (
    frozenset({"<|return|>", "<|call|>", "<|end|>"}),  # gpt-oss
    frozenset({"<|calls|>", "<|flush|>", "<|end|>"}),  # Solar Open
)

# The added tokens of a vocabulary: what tells it from others, which tokens have flags, the flags. As the
# tokenizer_config.json of Phi-3 and Phi-3.5 has it, and that of Phi-4.
_FLAGS = (
    (
        frozenset({"<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|placeholder1|>"}),
        re.compile(r"</s>|<\|(user|assistant|system|end|placeholder[1-6])\|>"),
        TokenFlags(rstrip=True),
    ),
    (
        frozenset({"<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy_0|>"}),
        re.compile(r"<\|(endoftext|fim_\w+|im_start|im_sep|im_end|dummy_\d+)\|>"),
        TokenFlags(lstrip=True, rstrip=True),
    ),
)


def is_end_of_message(tokens: Collection[str]) -> bool:
    """Whether <|end|> is no end of a turn in a vocabulary of these tokens."""
    return any(all(token in tokens for token in together) for together in _MESSAGE_ENDS)


def token_flags(markers: Collection[str]) -> Mapping[str, TokenFlags]:
    """The flags of those of a vocabulary's special and added tokens that have any."""
    for together, pattern, flags in _FLAGS:
        if all(token in markers for token in together):
            return {token: flags for token in markers if pattern.fullmatch(token)}
    return {}
