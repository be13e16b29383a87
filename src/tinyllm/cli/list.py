"""tinyllm list: the models in the caches of Hugging Face, Ollama and llama.cpp, by names that run them.

Imports common.py; the caches once the options make sense.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from tinyllm.cli import prefix
from tinyllm.cli.common import EXIT_CODES, EXIT_OK, Parser, json_text, note, put, run_command, size, table

PROG = f"{prefix}list"

DESCRIPTION = """Shows the models that other programs fetched: Hugging Face's, Ollama's and llama.cpp's. A
name in the first column stands for the model in every command, as in `tinyllm run NAME`. Nothing is copied,
and no connection is opened."""

EPILOG = f"""examples:
  {PROG}
  {PROG} --json                names, bytes and paths, for a program

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    from tinyllm.hub.cached import cached_models

    models = cached_models()
    if args.json:
        put(json_text([asdict(model) | {"path": str(model.path)} for model in models], indent=2))
    elif models:
        put(table(("name", "size", "cache"), [(m.name, size(m.n_bytes), m.cache) for m in models]))
    else:
        note(
            "no models in the caches of Hugging Face, Ollama and llama.cpp; tinyllm pull ORG/REPO fetches one"
        )
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = Parser(PROG, "[--json]", DESCRIPTION, EPILOG)
    parser.add_argument("--json", action="store_true", help="JSON, with paths, to stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
