"""tinyllm pull: fetch a model from Hugging Face into its cache. The path goes to stdout, progress to stderr.

Imports common.py; the hub once the options make sense.
"""

from __future__ import annotations

import sys

from tinyllm.cli import prefix
from tinyllm.cli.common import EXIT_CODES, EXIT_OK, Parser, note, put, run_command

PROG = f"{prefix}pull"

DESCRIPTION = """Fetches a model from Hugging Face into the cache that its own tools use, and writes its path.
What is there already is not fetched again, and what was begun goes on where it ended."""

EPILOG = f"""examples:
  {PROG} Qwen/Qwen3-0.6B-GGUF:Q8_0          one quantization, in capitals or not
  {PROG} HuggingFaceTB/SmolLM2-135M-Instruct   safetensors, where there is no GGUF
  {PROG} org/repo@v1:model-q4_k_m.gguf      a file of a revision

Then: tinyllm run hf:Qwen/Qwen3-0.6B-GGUF:Q8_0 "What is a llama?"

HF_TOKEN or `hf auth login` opens models that ask for an account, HF_HOME moves the cache, HF_ENDPOINT names
another hub, HF_HUB_OFFLINE=1 forbids connections, HF_HUB_DISABLE_PROGRESS_BARS=1 draws no bars.

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    from tinyllm import hub

    path = hub.pull(args.name)
    name = args.name if args.name.startswith("hf:") else f"hf:{args.name}"
    note(f"run it: tinyllm run {name}")
    put(str(path))
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(PROG, "ORG/REPO[@REVISION][:FILE or QUANTIZATION]", DESCRIPTION, EPILOG)
    parser.add_argument("name", metavar="ORG/REPO", help="what, as the page of the model names it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
