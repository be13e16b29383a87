"""What makes texts of a model: engine.py runs the texts of all callers together, pace.py says how many tokens
a call takes, kvcache.py owns the pages of what is computed, saved.py keeps them in files, sampling.py chooses
the next token (breakers.py: what ends DRY's repetitions), next_token.py shows what it chooses from. loop.py
runs texts for callers that must not block, wake.py wakes them, embedding.py makes vectors of texts, needs.py
says what a call takes. speculation.py says how many guessed tokens go with a call, guessers/ who guesses."""

from tinyllm.engine.engine import Piece as Piece  # where pickles of version 0.1.0 look for it
