"""Answers of a given form: JSON that follows a schema, one of a few words, a pattern, a grammar.

python examples/structured.py [MODEL]      (needs llguidance: pip install llguidance)
"""

import json
import sys

import tinyllm

BALL = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue", "green"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 9},
        "owner": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
    },
    "required": ["colour", "size", "owner"],
    "additionalProperties": False,
}

with tinyllm.load(sys.argv[1] if len(sys.argv) > 1 else "stories") as llm:
    ball = llm("Lily had a big red ball. As JSON: ", json_schema=BALL, max_tokens=60, seed=1)
    print(ball.text)
    print("parsed:", json.dumps(ball.parsed))  # a dict; of a pydantic model's class its instance

    colour = llm("Lily's favourite colour was", choices=[" red", " blue", " green"], temperature=0)
    print("choice:", colour.text)

    time = llm("They went home at", regex=r" (1[0-2]|[1-9]):[0-5][0-9]", seed=2)
    print("regex:", time.text)

    sums = llm("One and one:", grammar='start: NUMBER "+" NUMBER "=" NUMBER\nNUMBER: /[1-9][0-9]?/', seed=3)
    print("grammar:", sums.text)
