"""What makes texts of a model: engine.py runs the texts of all callers together, kvcache.py owns the pages of
what is computed, sampling.py chooses the next token, embedding.py makes vectors of texts, needs.py says what
a call takes."""

from tinyllm.engine.engine import Piece as Piece  # where pickles of version 0.1.0 look for it
