"""How many tokens a call of the model takes. Changes no bit: a text may be cut into calls anywhere.

Invariant: a call takes every text that is being written; beside those that somebody reads along, a prompt
that is longer than SHORT gets only as many tokens as make the call STRETCH times as long as one without
prompts, and at least one; longer in proportion where more texts wait for their first token than are written.
So no text stands still while another's long prompt is read, for a short one it stands still once, those who
come together go on together, and every prompt is read to its end. Elsewhere a call takes `most` tokens, or as
many as a device that cannot stop within a call computes in `call_s`. What it knows of the machine it learns
from the calls that were made. Imports nothing of ours; engine.py asks it.
"""

from __future__ import annotations

import math

STRETCH = 1.5  # twice is promised; the rest is for what differs from call to call
SHORT = 256  # tokens that are left of a prompt which is read at once
FIRST = 16  # tokens of prompts beside texts, while nothing is known
LEAST = 64  # tokens of a call on a device that cannot stop within one
NEWS = 0.3  # how much of what is known a call replaces
MEMORY = 64  # tokens of prompts that count as much as all before: those of a short call say little


class Pace:
    """most: tokens of a call at most. call_s: seconds that one should take at most."""

    def __init__(self, most: int, call_s: float = math.inf) -> None:
        self._most, self._call_s = most, call_s
        self._alone = min(most, LEAST) if call_s < math.inf else most
        self._writing_s: dict[int, float] = {}  # of a call without prompts, by n_writing.bit_length()
        self._token_s: float | None = None  # what a prompt's token adds to such a call

    def room(self, n_writing: int, n_waiting: int = 1) -> int:
        """Tokens of long prompts in a call beside n_writing texts, each of which takes one, while n_waiting
        others wait for their first; 0 texts: of all prompts."""
        if not n_writing:
            return self._alone
        usual = self._usual(n_writing)
        if usual is None or self._token_s is None:
            return min(FIRST, self._alone)
        longer_s = (STRETCH - 1) * usual * max(1, n_waiting / n_writing)
        return max(1, min(self._alone, int(longer_s / self._token_s)))

    def learn(self, n_writing: int, n_prompt: int, seconds: float) -> None:
        """What a call of n_writing texts and n_prompt tokens of prompts took."""
        if n_prompt >= LEAST and self._call_s < math.inf:
            fitting = int(n_prompt * self._call_s / max(seconds, 1e-9)) // LEAST * LEAST
            self._alone = min(self._most, max(LEAST, fitting))
        kind = n_writing.bit_length()
        if not n_prompt:
            self._writing_s[kind] = _mixed(self._writing_s.get(kind), seconds)
        elif not n_writing or kind in self._writing_s:  # else what more texts cost would count as prompts'
            alone = self._writing_s[kind] if n_writing else 0.0
            # A few tokens cost next to nothing beside the weights, read anyway: at least a tenth of that.
            of_a_token = max(seconds - alone, alone / 10) / n_prompt
            self._token_s = _mixed(self._token_s, of_a_token, n_prompt / (n_prompt + MEMORY))

    def _usual(self, n_writing: int) -> float | None:
        """What a call of about so many texts takes, as far as is known."""
        kind = n_writing.bit_length()
        known = [k for k in self._writing_s if k <= kind] or list(self._writing_s)
        return self._writing_s[min(known, key=lambda k: abs(k - kind))] if known else None


def _mixed(before: float | None, seconds: float, news: float = NEWS) -> float:
    return seconds if before is None else before + news * (seconds - before)
