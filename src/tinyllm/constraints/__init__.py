"""Answers of a given form: which tokens may come next, so that a text matches a schema, a regex or a grammar.

forms.py turns what users ask for into a grammar and a finished text into a value; grammar.py says for each
text in the making which tokens may follow, through the package llguidance (the extra `structured`). The
engine knows neither: it asks an object for bits (engine/engine.py, `Constraint`). Imports `errors`.
"""

from tinyllm.constraints.forms import Form, form_of, form_of_calls
from tinyllm.constraints.grammar import Grammar, Vocabulary

__all__ = ["Form", "Grammar", "Vocabulary", "form_of", "form_of_calls"]
