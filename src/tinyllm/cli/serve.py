"""tinyllm-serve: the models of the command line over HTTP, for the clients that people have.

Imports common.py; the server and its packages (the extra `serve`) only once the command line is read.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli import prefix
from tinyllm.cli.common import (
    EXIT_CODES,
    EXIT_OK,
    Parser,
    UsageError,
    add_model_argument,
    add_model_options,
    add_speculation_options,
    counted,
    note,
    positive,
    progress_bar,
    read_text,
    run_command,
    seconds,
)

if TYPE_CHECKING:
    from tinyllm import LLM

PROG = f"{prefix}serve"

DESCRIPTION = """Serves models over HTTP, to the clients of OpenAI, Anthropic, Ollama and llama.cpp, and to a
browser."""

EPILOG = f"""examples:
  {PROG} stories                      then: curl http://127.0.0.1:8080/v1/models
  {PROG} model.gguf --name llama      the name that clients ask for
  {PROG} --models ~/models            every model in a folder, each loaded when first asked for
  {PROG} small.gguf --model big=~/big.gguf --memory-limit 16GB --keep-alive 10m
  {PROG} model.gguf --name llama --lora law=law-lora   also llama:law, with an adapter
  {PROG} model.gguf --stages 4 --ray auto   larger than a machine: on four nodes of a Ray cluster
  TINYLLM_API_KEY=... {PROG} model.gguf --host 0.0.0.0

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    key = _key(args)
    start = _start(args)
    paths = _paths(args)
    try:
        from tinyllm.server.app import Server, application
        from tinyllm.server.dialects import DIALECTS
        from tinyllm.server.guard import Access, is_loopback
        from tinyllm.server.listen import Listener, bind, url_of
        from tinyllm.server.models import Loader, Models
        from tinyllm.server.turns import Turns
    except ModuleNotFoundError as error:
        from tinyllm.errors import UnsupportedError, install_text

        package = str(error.name).partition(".")[0]
        raise UnsupportedError(f"the server needs {package}: {install_text('serve')}") from None

    loopback = is_loopback(args.host)
    if not (loopback or key or args.no_auth):
        raise UsageError(
            f"whoever reaches {args.host} could use this server: give --api-key KEY (or TINYLLM_API_KEY), or "
            "--no-auth if they may"
        )
    _check_paths(paths)
    _show_log()
    names = ("device", "threads", "context", "cache_type", "weights", "speculate")
    templates = {args.model: args.chat_template} if args.chat_template is not None else {}
    drafts = {args.model: args.draft} if args.draft is not None else {}
    settings = {name: getattr(args, name) for name in names}
    loader = Loader(templates, drafts, start=start, **settings)
    models = Models(
        paths,
        loader,
        adapters=_adapters(args, paths),
        needed=loader.needed,
        memory_limit=args.memory_limit,
        keep_alive_s=args.keep_alive,
    )
    access = Access(key, (args.host, *args.allowed_host), not loopback, args.cors)
    server = Server(
        models,
        Turns(args.parallel, args.queue),
        access=access,
        allows_templates=args.allow_templates,
        logs_prompts=args.log_prompts,
        weights=args.weights,
    )
    with bind(args.host, args.port) as listener:
        if args.model is not None or args.more:
            with progress_bar("loading") as progress:
                models.load_now(None, progress=progress)
        note(f"{_listed(list(paths))} on {url_of(listener, args.host)}")

        def on_end() -> None:
            if n := server.metrics.open_requests:
                note(f"ending: {counted(n, 'request')} may go on for {seconds(args.grace)}; Ctrl-C ends now")

        runner = Listener(server, application(server, DIALECTS), grace_s=args.grace, on_end=on_end)
        runner.run(sockets=[listener])
    return EXIT_OK


def _start(args: argparse.Namespace) -> Callable[..., LLM] | None:
    """What loads MODEL in stages, None where it is in one process."""
    if args.stages is None:
        if args.ray is not None:
            raise UsageError("--ray is the cluster of --stages: say how many")
        return None
    if args.model is None or args.more or args.models is not None:
        raise UsageError("--stages are of one MODEL: serve others by themselves")
    for option, value in (
        ("--draft", args.draft),
        ("--lora", args.lora),
        ("--memory-limit", args.memory_limit),
    ):
        if value:
            raise UsageError(f"{option} is not for a model in stages yet")
    from tinyllm.ray import load

    def start(path: Any, **settings: Any) -> LLM:
        del settings["draft"], settings["speculate"]
        device = settings.pop("device")
        settings["device"] = "cpu" if device == "auto" else device
        llm = load(
            path, stages=args.stages, address=args.ray, gpus=device != "cpu" and device != "auto", **settings
        )
        if args.speculate is None:
            llm.speculate = None
        return llm

    return start


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _show_log() -> None:
    """What the server says of its work, on stderr: models that come and go, and its own faults."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    log = logging.getLogger("tinyllm.server")
    log.handlers, log.propagate = [Notes()], False
    log.setLevel(logging.INFO)


def _key(args: argparse.Namespace) -> str | None:
    key: str | None = args.api_key if args.api_key is not None else os.environ.get("TINYLLM_API_KEY")
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UsageError("a key is one or more characters of ASCII, without spaces")
    return key


# Models


def _paths(args: argparse.Namespace) -> dict[str, str]:
    """{name: path} of what is served, the first one is the default."""
    found: dict[str, str] = {}
    for name, path in _named(args):
        if name in found:
            raise UsageError(
                f"two models are called {name}, {found[name]} and {path}: --model NAME=PATH names one"
            )
        found[name] = path
    if not found:
        raise UsageError("which model? give a file, a folder, stories, or --models FOLDER")
    own = (("--name", args.name), ("--chat-template", args.chat_template), ("--draft", args.draft))
    for option, value in own:
        if value is not None and args.model is None:
            raise UsageError(f"{option} is for MODEL, and there is none")
    return found


def _adapters(args: argparse.Namespace, paths: dict[str, str]) -> dict[str, dict[str, str]]:
    """{model: {adapter: path}}; an adapter that names no model is the first one's."""
    found: dict[str, dict[str, str]] = {}
    for name, path in args.lora:
        base, colon, adapter = name.rpartition(":")
        model = base if colon else next(iter(paths))
        if model not in paths:
            raise UsageError(f"--lora {name}: there is no model {model}, only {', '.join(paths)}")
        if adapter in found.setdefault(model, {}) or f"{model}:{adapter}" in paths:
            raise UsageError(f"--lora {name}: two are called {model}:{adapter}")
        if not Path(path).expanduser().exists():
            raise UsageError(f"--lora {name}: {path} is not there")
        found[model][adapter] = path
    return found


def _named(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    if args.model is not None:
        yield args.name or _stem(Path(args.model)), args.model
    yield from args.more
    if args.models is not None:
        yield from _in_folder(Path(args.models).expanduser())


def _stem(path: Path) -> str:
    """A model's name: its file's or folder's, without the number of a part."""
    name = path.name if path.suffix not in (".gguf", ".safetensors") else path.stem
    return re.sub(r"-00001-of-\d{5}$", "", name) or str(path)


def _in_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """The models in a folder: GGUF files, of a split set the first, and folders with a config.json."""
    if not folder.is_dir():
        raise UsageError(f"--models {folder}: no such folder")
    n = 0
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            is_model = (path / "config.json").is_file()
        else:
            is_model = path.suffix == ".gguf" and not re.search(r"-(?!00001)\d{5}-of-\d{5}$", path.stem)
            if is_model and "mmproj" in path.name.lower():
                note(f"{path.name} is left out: it reads images for a model, which is not supported")
                is_model = False
        if is_model:
            n += 1
            yield _stem(path), str(path)
    if n == 0:
        raise UsageError(f"--models {folder}: no .gguf file and no folder with a config.json is there")


def _check_paths(paths: dict[str, str]) -> None:
    """Raises NotFoundError."""
    from tinyllm.modelfiles import model_path

    for path in paths.values():
        model_path(path)


# Options


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser, nargs="?")

    models = parser.add_argument_group("several models")
    models.add_argument("--name", metavar="NAME", help="what clients call MODEL (default: its file's name)")
    models.add_argument(
        "--model",
        dest="more",
        type=_name_and_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="one more, loaded when first asked for; may be given several times",
    )
    models.add_argument("--models", metavar="FOLDER", help="all that are in a folder, likewise")
    models.add_argument(
        "--memory-limit",
        type=_bytes,
        metavar="SIZE",
        help="what all may hold, weights and caches, such as 16GB: the one that was asked for least recently "
        "goes first (default: what the machine has)",
    )
    models.add_argument(
        "--keep-alive",
        type=_duration,
        default=math.inf,
        metavar="TIME",
        help="after which a model that nobody asks for goes: 5m, 1h30m, 0, or -1 for never (default: -1)",
    )
    models.add_argument(
        "--chat-template",
        type=read_text,
        metavar="FILE",
        help="chat with this Jinja template in place of MODEL's own; so a base model chats, too",
    )
    models.add_argument(
        "--lora",
        type=_name_and_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter (LoRA) of MODEL, which clients ask for as MODEL:NAME; of another model "
        "OTHER:NAME=PATH. May be given several times",
    )
    add_model_options(parser)
    add_speculation_options(parser)

    stages = parser.add_argument_group(
        "stages", "One model in several processes (pip install 'ray[data,serve]')."
    )
    stages.add_argument(
        "--stages",
        type=positive,
        metavar="N",
        help="cut MODEL's layers in N parts, each on a node of a cluster",
    )
    stages.add_argument(
        "--ray", metavar="ADDRESS", help="of that Ray cluster; auto, or local for one here (default: local)"
    )

    clients = parser.add_argument_group("clients")
    clients.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="where to listen (default: 127.0.0.1)"
    )
    clients.add_argument(
        "--port", type=_port, default=8080, metavar="N", help="0 for a free one (default: 8080)"
    )
    clients.add_argument(
        "--parallel",
        type=positive,
        default=8,
        metavar="N",
        help="texts that are computed at once (default: 8)",
    )
    clients.add_argument(
        "--queue", type=_whole, default=64, metavar="N", help="requests that may wait (default: 64)"
    )
    clients.add_argument(
        "--grace",
        type=_duration,
        default=30.0,
        metavar="TIME",
        help="how long answers may go on when the server is asked to end (default: 30s)",
    )

    safety = parser.add_argument_group("safety")
    safety.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients must send (better: in the variable TINYLLM_API_KEY, which other users do not see)",
    )
    safety.add_argument("--no-auth", action="store_true", help="let whoever reaches --host in without a key")
    safety.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name of this server, as clients write it; may be given several times",
    )
    safety.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let the pages of https://this.example ask, * for all; may be given several times",
    )
    safety.add_argument("--allow-templates", action="store_true", help="let requests bring a chat template")
    safety.add_argument("--log-prompts", action="store_true", help="write what clients ask to stderr")
    return parser


def _name_and_path(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def _whole(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, 0 to 65535")
    return int(text)


UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
UNITS_BYTES = {
    "": 1,
    **{f"{letter}{end}": 1000**i for i, letter in enumerate("KMGT", 1) for end in ("", "B")},
}
UNITS_BYTES |= {f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)}
_NUMBER = r"\d+(?:\.\d+)?"


def _duration(text: str) -> float:
    """Seconds of "5m", "1h30m" or "300"; a negative one is for ever."""
    if re.fullmatch(rf"-{_NUMBER}[a-z]*", text):
        return math.inf
    if not re.fullmatch(rf"(?:{_NUMBER}(?:ms|s|m|h))+|{_NUMBER}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 30s, 5m or 1h30m")
    return sum(float(n) * UNITS_S[unit] for n, unit in re.findall(rf"({_NUMBER})(ms|s|m|h|)", text))


def _bytes(text: str) -> int:
    """Of "16GB", "16G", "512MiB" or "1000000"."""
    match = re.fullmatch(rf"({_NUMBER}) ?([A-Z]*)", text.upper())
    if (
        match is None
        or match[2] not in UNITS_BYTES
        or not (n := int(float(match[1]) * UNITS_BYTES[match[2]]))
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 16GB or 512MB")
    return n


if __name__ == "__main__":
    sys.exit(main())
