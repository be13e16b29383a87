"""Options of llama.cpp's and Ollama's commands: those that mean the same here, and those that mean nothing.

`translate` puts our options in place of theirs before a command line is read. What would change the text and
is not done here (--mirostat, say) is in no table: it is refused as an unknown option. Imports nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence

# Their name: ours, of the same meaning.
SAME = {
    "-m": "--model",
    "-p": "--prompt",
    "-s": "--seed",
    "-sys": "--system",
    "--system-prompt": "--system",
    "--ctx-size": "--context",
    "--predict": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--temperature": "--temp",
    "--typical-p": "--typical",
    "-l": "--logit-bias",
    "-j": "--json-schema",
    "-jf": "--json-schema-file",
    "-cnv": "--conversation",
    "-no-cnv": "--no-chat",
    "--no-conversation": "--no-chat",
    "--chat-template-file": "--chat-template",
    "--hidethinking": "--no-reasoning",
    "--nowordwrap": "--no-wrap",
}

_DEVICE = "a model is on one device as a whole, see --device"
_MEMORY = "weights are copied into memory while they are loaded"
_PLACES = "taskset and numactl say where threads run"
_PAGES = "the cache grows in pages, as texts need them"
_LOG = "there is no log; figures go to stderr"
_SWITCH = re.compile(r"on|off|auto|true|false|[01](,[01])*")

# Their names, how many values they have (None: one, if it is on, off or auto), and why they mean nothing.
_ROWS: tuple[tuple[str, int | None, str], ...] = (
    ("-fa --flash-attn", None, "there is one attention, which keeps no table of scores"),
    ("-b --batch-size -ub --ubatch-size", 1, "how a prompt is cut into calls changes no result"),
    ("-tb --threads-batch", 1, "prompts have the threads of --threads"),
    ("--mlock --mmap --no-mmap", 0, _MEMORY),
    ("-lm --load-mode", 1, _MEMORY),
    ("--numa -C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll", 1, _PLACES),
    ("-sm --split-mode -ts --tensor-split -mg --main-gpu", 1, _DEVICE),
    ("-ot --override-tensor -ncmoe --n-cpu-moe", 1, _DEVICE),
    ("-cmoe --cpu-moe -kvo --kv-offload -nkvo --no-kv-offload", 0, _DEVICE),
    ("--op-offload -nopo --no-op-offload --no-host", 0, _DEVICE),
    ("-kvu --kv-unified -no-kvu --no-kv-unified --swa-full", 0, _PAGES),
    ("-dt --defrag-thold -cram --cache-ram", 1, _PAGES),
    ("--no-context-shift", 0, "nothing is shifted out of a full context anyway"),
    ("--keep", 1, "nothing is shifted out of a full context"),
    ("--jinja", 0, "chat templates are always rendered"),
    ("-co --color", None, "terminals that have colours show them; --plain and NO_COLOR turn them off"),
    ("--display-prompt --no-display-prompt", 0, "only a terminal shows a prompt again, of a base model"),
    ("--warmup --no-warmup", 0, "a model is ready when it is loaded"),
    ("--perf --no-perf --show-timings --no-show-timings", 0, "figures go to stderr"),
    ("--repack -nr --no-repack", 0, "weights are always packed"),
    ("-st --single-turn", 0, "a PROMPT is answered once"),
    ("-i --interactive -if --interactive-first", 0, "without PROMPT there is a conversation"),
    ("-mli --multiline-input", 0, "pasted lines are one message, and triple quotes begin and end one"),
    ("--no-escape", 0, "escapes are read with -e alone"),
    ("--simple-io", 0, "what is no terminal gets plain text"),
    ("--log-disable --log-prefix --log-timestamps", 0, _LOG),
    ("--log-file --log-colors -lv --verbosity --log-verbosity", 1, _LOG),
    ("--keepalive", 1, "the model goes when the command ends"),
    ("--insecure", 0, "certificates are always checked"),
)
NOTHING = {name: (n_values, why) for names, n_values, why in _ROWS for name in names.split()}

_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers")
_CACHE = ("-ctk", "--cache-type-k", "-ctv", "--cache-type-v")


def _format(value: str) -> list[str]:
    """Ollama's: the word json, or a schema."""
    return ["--json-schema", '{"type": "object"}' if value == "json" else value]


def _variables(value: str) -> list[str]:
    variables = json.loads(value)
    if not isinstance(variables, dict):
        raise ValueError
    return [f"--template-arg={name}={json.dumps(inner)}" for name, inner in variables.items()]


# Their name: what its value becomes. A ValueError: the value makes no sense.
WRITTEN_ANEW: dict[str, Callable[[str], list[str]]] = {
    **dict.fromkeys(("-hf", "-hfr", "--hf-repo"), lambda value: ["--model", f"hf:{value}"]),
    **dict.fromkeys(_LAYERS, lambda value: ["--device", "cpu"] if value == "0" else []),
    **dict.fromkeys(_CACHE, lambda value: ["--cache-type", value]),
    "--format": _format,
    "--chat-template-kwargs": _variables,
}


class Untranslated(Exception):
    """What is wrong with one of their options."""


def translate(argv: Sequence[str], own: Collection[str], say: Callable[[str], object]) -> list[str]:
    """`argv` with our options in place of theirs. own: the options that the command has, which stay as they
    are. say: gets a line for each option that means nothing. Raises Untranslated."""
    out: list[str] = []
    rest, cache_types = list(argv), set[str]()
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            return [*out, arg, *rest]
        name, sign, value = arg.partition("=")
        if name in own or not name.startswith("-"):
            out.append(arg)
        elif SAME.get(name) in own:
            out.append(SAME[name] + sign + value)
        elif name in WRITTEN_ANEW:
            new = _written_anew(name, value if sign else _value(name, rest))
            out += new
            if name in _LAYERS and not new:
                say(f"{name} means nothing here unless it is 0: {_DEVICE}")
            if name in _CACHE and len(cache_types := cache_types | {new[-1]}) > 1:
                raise Untranslated(f"keys and values have one type here: {' and '.join(sorted(cache_types))}")
        elif name in NOTHING:
            n_values, why = NOTHING[name]
            if not sign and (n_values == 1 or (n_values is None and rest and _SWITCH.fullmatch(rest[0]))):
                _value(name, rest)
            say(f"{name} means nothing here: {why}")
        else:
            out.append(arg)
    return out


def _value(name: str, rest: list[str]) -> str:
    if not rest:
        raise Untranslated(f"{name} needs a value")
    return rest.pop(0)


def _written_anew(name: str, value: str) -> list[str]:
    try:
        return WRITTEN_ANEW[name](value)
    except ValueError:
        raise Untranslated(f"{name}: {value!r} is no JSON object") from None


def hint(arg: str, own: Collection[str]) -> str:
    """What somebody may have meant by an unknown option; "" where nothing is like it."""
    import difflib

    if arg[:2] in own and arg[2:3].isdigit():
        return f"; {arg[:2]} {arg[2:]} has a space between"
    known = [name for name in (*own, *SAME) if name.startswith("--")]
    near = difflib.get_close_matches(arg.partition("=")[0], known, 1)
    return f"; {near[0]} is one" if near else ""
