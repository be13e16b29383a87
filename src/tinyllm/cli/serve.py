"""tinyllm-serve: the models of the command line over HTTP, for the clients that people have.

Imports common.py; the server and its packages (the extra `serve`) only once the command line is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllm.cli.common import (
    EXIT_CODES,
    EXIT_OK,
    Parser,
    UsageError,
    add_model_argument,
    add_model_options,
    note,
    positive,
    run_command,
)

if TYPE_CHECKING:
    from tinyllm import LLM

PROG = "tinyllm-serve"
LOOPBACK = ("127.0.0.1", "::1", "localhost")

DESCRIPTION = """Serves models over HTTP, to the clients of OpenAI, Anthropic, Ollama and llama.cpp, and to a
browser."""

EPILOG = f"""examples:
  {PROG} stories                      then: curl http://127.0.0.1:8080/v1/models
  {PROG} model.gguf --name llama      the name that clients ask for
  {PROG} --models ~/models            every model in a folder, each loaded when first asked for

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    paths = _paths(args)
    try:
        import uvicorn

        from tinyllm.server.app import Limits, Server, application
        from tinyllm.server.dialects import DIALECTS
        from tinyllm.server.models import Models
        from tinyllm.server.turns import Turns
    except ModuleNotFoundError as error:
        raise UsageError(f"the server needs {error.name}: pip install '.[serve]' in the clone") from None

    def load(path: str) -> LLM:
        import tinyllm

        names = ("device", "threads", "context", "cache_type", "weights")
        return tinyllm.load(path, **{name: getattr(args, name) for name in names})

    models = Models(paths, load)
    server = Server(models, Turns(args.parallel, args.queue), Limits())
    config = uvicorn.Config(
        application(server, DIALECTS), host=args.host, port=args.port, log_level="warning"
    )
    note(f"{', '.join(paths)} on http://{args.host}:{args.port}")
    uvicorn.Server(config).run()
    return EXIT_OK


def _paths(args: argparse.Namespace) -> dict[str, str]:
    """{name: path} of what is served."""
    if args.model is None:
        raise UsageError("which model? give a file, a folder, or stories")
    name = args.name or (args.model if args.model == "stories" else Path(args.model).stem)
    return {name: args.model}


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser, nargs="?")
    parser.add_argument("--name", metavar="NAME", help="what clients call it (default: the file's name)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="where to listen (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="(default: 8080)")
    parser.add_argument(
        "--parallel", type=positive, default=8, metavar="N", help="texts at once (default: 8)"
    )
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)"
    )
    add_model_options(parser)
    return parser
