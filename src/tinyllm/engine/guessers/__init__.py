"""Who guesses how a text goes on: a file each, known to the engine by `propose` alone (speculation.py).

A guesser may be wrong at will: it changes no token, only how long they take.
"""

from tinyllm.engine.guessers.called import Called, Propose
from tinyllm.engine.guessers.draft import Draft, Translation, same_vocabulary
from tinyllm.engine.guessers.lookup import Lookup

__all__ = ["Called", "Draft", "Lookup", "Propose", "Translation", "same_vocabulary"]
