"""Guesses from the text itself: it goes on as it did the last times after the same words.

Invariant: the index holds where each pair of tokens ended before, so that reading a token costs one entry and
a guess looks at LOOKS places at most. Of these the longest common past wins, and between equals what followed
more often. Imports nothing.
"""

from __future__ import annotations

from bisect import bisect_right

LOOKS = 24  # places that are looked at, the latest first
LONGEST = 24  # tokens that are compared at each
GRADES = (2, 3, 5, 8, 13)  # lengths from which on matches are of the next grade


class Lookup:
    """Of one text, or of a session from request to request."""

    def __init__(self) -> None:
        self.grade = 0
        self._last: dict[int, int] = {}  # of a pair of tokens: where it ended last
        self._before: list[int] = []  # of each place: where the same pair ended before, or -1

    def propose(self, tokens: list[int], n: int) -> list[int]:
        end = len(tokens) - 1
        self._read(tokens)
        places, length = self._places(tokens, end)
        if not places:
            return []
        self.grade = bisect_right(GRADES, length)
        guesses: list[int] = []
        while len(guesses) < n and places:
            votes: dict[int, int] = {}
            followers = []
            for place, weight in places:
                at = (
                    place + 1 + len(guesses)
                )  # past the end a text that repeats itself goes on with the guesses
                token = tokens[at] if at <= end else guesses[at - end - 1]
                votes[token] = votes.get(token, 0) + weight
                followers.append(token)
            best = max(votes, key=votes.__getitem__)  # the latest of equals: it was looked at first
            places = [at for at, token in zip(places, followers, strict=True) if token == best]
            guesses.append(best)
        return guesses

    def _places(self, tokens: list[int], end: int) -> tuple[list[tuple[int, int]], int]:
        """Where the last pair ended before, each with its weight; the length of the longest common past."""
        found: list[tuple[int, int]] = []
        place = self._before[end] if end > 0 else -1
        while place >= 0 and len(found) < LOOKS:
            n, most = 2, min(place + 1, LONGEST)
            while n < most and tokens[place - n] == tokens[end - n]:
                n += 1
            found.append((place, 4**n))  # one token more weighs as four places
            place = self._before[place]
        longest = max((weight for _, weight in found), default=1)
        return found, longest.bit_length() // 2

    def _read(self, tokens: list[int]) -> None:
        if len(tokens) < len(self._before):  # another text after all
            self._last.clear()
            self._before.clear()
        last, before = self._last, self._before
        for i in range(len(before), len(tokens)):
            pair = tokens[i - 1] << 32 | tokens[i] if i else -1
            before.append(last.get(pair, -1))
            last[pair] = i
