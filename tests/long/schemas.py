"""The official JSON Schema test suite, each schema as an answer's form: is it enforced or refused by name?

Random logits stand for the model. Every finished output of an accepted schema must validate with the package
`jsonschema`, in whose source distribution the suite lies (folder json/tests):

    pip download --no-deps --no-binary :all: jsonschema && tar xf jsonschema-*.tar.gz
    python tests/long/schemas.py jsonschema-*/json/tests --outputs 8

Prints the table of docs/structured.md; ends with 1 where an output is invalid.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

import tinyllm
from tinyllm.constraints import Grammar, Vocabulary, form_of

DRAFTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}
LONGEST = 300  # tokens, after which an output counts as unfinished
ROWS = 16  # of refusals, that are printed one by one
HASTE = 30  # tokens, after which what ends something is likelier


def schemas(folder: Path) -> list[tuple[str, Any]]:
    """(draft, schema) of the suite, each once; those without "$schema" get their draft's."""
    found: dict[str, tuple[str, Any]] = {}
    for draft, address in DRAFTS.items():
        for path in sorted((folder / draft).rglob("*.json")):
            for case in json.loads(path.read_text(encoding="utf-8")):
                schema = case["schema"]
                if isinstance(schema, dict):
                    schema = {"$schema": address, **schema}
                found.setdefault(json.dumps(schema, sort_keys=True), (draft, schema))
    return list(found.values())


def output(grammar: Grammar, vocabulary: Vocabulary, ends: frozenset[int], seed: int) -> bytes | None:
    """A text of random tokens; None where it did not end."""
    constraint, random = grammar.start(forces=bool(seed % 2)), np.random.default_rng(seed)
    tokens: list[int] = []
    closing = np.array([0 < len(t) < 3 and t.strip() in (b'"', b"}", b"]", b"1") for t in vocabulary.tokens])
    while not constraint.is_over:
        if len(tokens) > LONGEST:
            return None
        if forced := constraint.forced():
            for token in forced:
                constraint.accept(token)
            tokens += forced
            continue
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[: vocabulary.vocab_size]
        if not bits.any():
            raise AssertionError("nothing is allowed, and it is not over")
        logits = random.normal(size=vocabulary.vocab_size)
        if len(tokens) > HASTE:
            logits[list(ends)] += 8
            logits[closing] += 4
        token = int(np.where(bits, logits, -np.inf).argmax())
        if token in ends:
            break
        constraint.accept(token)
        tokens.append(token)
    return b"".join(vocabulary.tokens[token] for token in tokens)


def reason(message: str) -> str:
    """What a refusal names: the keywords, or what it is about."""
    if keys := re.search(r"Unimplemented keys: (\[.*?\])", message):
        return ", ".join(f"`{key}`" for key in json.loads(keys[1]))
    if "oneOf" in message:
        return "`oneOf` of which two may match"
    if re.search(r"Unknown format", message):
        return "an unknown `format`"
    if re.search(r"registry|retriev|Resource|[Rr]esolv|ref", message):
        return "`$ref` to elsewhere"
    if re.search(r"regex|pattern", message):
        return "a regex of another notation"
    if re.search(r"unsatisf|false|empty|contradict|no (valid|possible)", message, re.IGNORECASE):
        return "no document can match"
    return re.sub(r"\s+", " ", message.split("enforced: ")[-1])[:60]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--outputs", type=int, default=8, help="of each accepted schema")
    args = parser.parse_args()
    llm = tinyllm.load("stories")
    assert llm.tokenizer is not None
    vocabulary = Vocabulary(llm.tokenizer, llm.config.vocab_size, llm.eos_ids)
    refused: Counter[str] = Counter()
    n_accepted = n_finished = n_open = n_unjudged = 0
    invalid: list[str] = []
    start = time.perf_counter()
    for _, schema in (all_schemas := schemas(args.folder)):
        try:
            grammar = Grammar(form_of(json_schema=json.dumps(schema)), vocabulary)  # type: ignore[arg-type]
        except tinyllm.ConstraintError as error:
            refused[reason(str(error))] += 1
            continue
        n_accepted += 1
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
        for seed in range(args.outputs):
            text = output(grammar, vocabulary, llm.eos_ids, seed)
            if text is None:
                n_open += 1
                continue
            n_finished += 1
            try:
                validator.validate(json.loads(text))
            except re.error:  # Python's regular expressions do not know the pattern, so nobody judges it
                n_unjudged += 1
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                invalid.append(f"{json.dumps(schema)}\n    {text!r}\n    {what}"[:900])
    print("| | |\n| --- | ---: |")
    print(f"| schemas | {len(all_schemas)} |")
    print(f"| accepted | {n_accepted} |")
    print(f"| outputs, finished | {n_finished} |")
    print(f"| outputs, longer than {LONGEST} tokens | {n_open} |")
    print(f"| outputs that `jsonschema` cannot judge (their pattern is none of Python's) | {n_unjudged} |")
    print(f"| **invalid** | **{len(invalid)}** |")
    print(f"| refused | {sum(refused.values())} |")
    for name, n in refused.most_common(ROWS):
        print(f"| refused: {name} | {n} |")
    others = sum(refused.values()) - sum(n for _, n in refused.most_common(ROWS))
    print(f"| refused: other keywords, or several | {others} |")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    for text in invalid:
        print(text, file=sys.stderr)
    return bool(invalid)


if __name__ == "__main__":
    sys.exit(main())
