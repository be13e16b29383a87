"""How many tokens a call of the model takes. Changes no bit: a text may be cut into calls anywhere.

Invariant: a call takes every text that is being written; beside those that somebody reads along, prompts get
only as many tokens as make the call STRETCH times as long as one without prompts, and at least one. So no
text stands still while another's long prompt is read, and every prompt is read to its end. Elsewhere a call
takes `most` tokens, or as many as a device that cannot stop within a call computes in `call_s`. What it knows
of the machine it learns from the calls that were made. Imports nothing of ours; engine.py asks it.
"""

from __future__ import annotations

import math

STRETCH = 1.5  # twice is promised; the rest is for what differs from call to call
FIRST = 16  # tokens of prompts beside texts, while nothing is known
LEAST = 64  # tokens of a call on a device that cannot stop within one
NEWS = 0.3  # how much of what is known a call replaces


class Pace:
    """most: tokens of a call at most. call_s: seconds that one should take at most."""

    def __init__(self, most: int, call_s: float = math.inf) -> None:
        self._most, self._call_s = most, call_s
        self._alone = min(most, LEAST) if call_s < math.inf else most
        self._writing_s: dict[int, float] = {}  # of a call without prompts, by n_writing.bit_length()
        self._token_s: float | None = None  # what a prompt's token adds to such a call

    def room(self, n_writing: int) -> int:
        """Tokens of prompts in a call beside n_writing texts, each of which takes one; 0 texts: in all."""
        if not n_writing:
            return self._alone
        usual = self._usual(n_writing)
        if usual is None or self._token_s is None:
            return min(FIRST, self._alone)
        return max(1, min(self._alone, int((STRETCH - 1) * usual / self._token_s)))

    def learn(self, n_writing: int, n_prompt: int, seconds: float) -> None:
        """What a call of n_writing texts and n_prompt tokens of prompts took."""
        if n_prompt >= LEAST and self._call_s < math.inf:
            fitting = int(n_prompt * self._call_s / max(seconds, 1e-9)) // LEAST * LEAST
            self._alone = min(self._most, max(LEAST, fitting))
        if not n_prompt:
            kind = n_writing.bit_length()
            self._writing_s[kind] = _mixed(self._writing_s.get(kind), seconds)
            return
        usual = (self._usual(n_writing) or 0.0) if n_writing else 0.0
        # A few tokens cost next to nothing beside the weights that are read anyway: at least a tenth of that.
        self._token_s = _mixed(self._token_s, max(seconds - usual, usual / 10) / n_prompt)

    def _usual(self, n_writing: int) -> float | None:
        """What a call of about so many texts takes, as far as is known."""
        kind = n_writing.bit_length()
        known = [k for k in self._writing_s if k <= kind] or list(self._writing_s)
        return self._writing_s[min(known, key=lambda k: abs(k - kind))] if known else None


def _mixed(before: float | None, seconds: float) -> float:
    return seconds if before is None else before + NEWS * (seconds - before)
