"""What the names of quantizations stand for: which tensor gets which format. One table, that of llama.cpp.

Most names are one format for all matrices, with a better one for those where errors cost most: the output,
the values of attention, and what leads back into the residual stream. Imports `errors` and
files' table of formats. Used by `load(weights=...)` and by `quantize`, so both give the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tinyllm.errors import ArgumentError
from tinyllm.files import GGUF_FORMATS

IDS: dict[str, int] = {form.name.lower(): id for id, form in GGUF_FORMATS.items()}
# Where rows are no multiple of a format's block: the next best one with smaller blocks, and where those do
# not fit either, F16.
SMALLER_BLOCKS = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl",
    "tq1_0": "q4_0", "tq2_0": "q4_0", "q2_0": "q4_0", "nvfp4": "mxfp4", "iq3_xxs": "iq4_nl",
    "iq3_s": "iq4_nl", "iq2_xxs": "iq4_nl", "iq2_xs": "iq4_nl", "iq2_s": "iq4_nl", "iq1_s": "iq4_nl",
    "iq1_m": "iq4_nl",
}  # fmt: skip
# Without importance these leave a model that says nothing sensible.
NEED_IMATRIX = frozenset({"iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m"})


@dataclass(frozen=True)
class Facts:
    """What a choice may depend on beside the tensor's name."""

    n_layers: int
    n_experts: int
    heads_per_kv_head: int
    imatrix: bool


# The format of a tensor in a layer, or None for the type's own.
Choice = Callable[[int, Facts], "str | None"]


def _all(format: str) -> Choice:
    return lambda layer, facts: format


def _first(format: str, part: int) -> Choice:
    """In the first of `part` parts of the layers."""
    return lambda layer, facts: format if layer < facts.n_layers // part else None


def _spread(format: str) -> Choice:
    """In the first and last eighth of the layers and every third between."""

    def choose(layer: int, facts: Facts) -> str | None:
        eighth = facts.n_layers // 8
        outer = layer < eighth or layer >= 7 * facts.n_layers // 8
        return format if outer or (layer - eighth) % 3 == 2 else None

    return choose


def _shared(format: str, otherwise: str | None = None) -> Choice:
    """Where at least four heads share a key and value head, so that the matrix is small."""
    return lambda layer, facts: format if facts.heads_per_kv_head >= 4 else otherwise


def _until(format: str, n: int, otherwise: str | None = None) -> Choice:
    """In the first n layers."""
    return lambda layer, facts: format if layer < n else otherwise


def _without_imatrix(choice: Choice) -> Choice:
    return lambda layer, facts: None if facts.imatrix else choice(layer, facts)


def _middle(format: str) -> Choice:
    """In all layers but the first and the last eighth."""
    return lambda layer, facts: format if facts.n_layers // 8 <= layer < 7 * facts.n_layers // 8 else None


def _with_imatrix(choice: Choice) -> Choice:
    return lambda layer, facts: choice(layer, facts) if facts.imatrix else None


@dataclass(frozen=True)
class Mix:
    """One name. `base` holds where nothing else is said; `file_type` is its number in GGUF."""

    base: str
    file_type: int
    note: str
    values: Choice | None = None  # attn_v, and attn_qkv, which has it within
    down: Choice | None = None  # ffn_down
    attention_output: Choice | None = None  # attn_output
    query: Choice | None = None  # attn_q
    key: Choice | None = None  # attn_k
    gate_up: Choice | None = None  # ffn_gate, ffn_up
    embedding: str | None = None  # where it is not the output
    output: str = "q6_k"
    few_bits: bool = False  # what holds beside eight experts and in the 70B models does not here


def _few_bits(base: str, file_type: int, note: str, better: str, attention_output: str | None = None) -> Mix:
    """IQ2 and IQ1. better: of the embedding and of the matrices where errors cost most."""

    def values(layer: int, facts: Facts) -> str:  # small where heads share it, or beside experts
        return "q4_k" if facts.heads_per_kv_head >= 4 or facts.n_experts >= 4 else better

    def key(layer: int, facts: Facts) -> str | None:
        return "q4_k" if facts.n_experts == 8 else None

    def output(layer: int, facts: Facts) -> str | None:
        return "q5_k" if facts.n_experts == 8 else attention_output

    down = _first(better, 8)
    return Mix(base, file_type, note, values, down, output, key=key, embedding=better, output="q5_k",
               few_bits=True)  # fmt: skip


MIXES: dict[str, Mix] = {
    "f32": Mix("f32", 0, "32-bit floats"),
    "bf16": Mix("bf16", 32, "16-bit floats with the range of F32"),
    "f16": Mix("f16", 1, "16-bit floats"),
    "q8_0": Mix("q8_0", 7, "8.5 bits a weight"),
    "q6_k": Mix("q6_k", 18, "6.6 bits"),
    "q5_k_m": Mix("q5_k", 17, "Q5_K, half of the attention's values and of the feed-forward's outputs Q6_K",
                  values=_spread("q6_k"), down=_spread("q6_k")),
    "q5_k_s": Mix("q5_k", 16, "Q5_K"),
    "q5_1": Mix("q5_1", 9, "6 bits"),
    "q5_0": Mix("q5_0", 8, "5.5 bits", down=_with_imatrix(_first("q5_1", 8))),
    "q4_k_m": Mix("q4_k", 15, "Q4_K, half of the attention's values and of the feed-forward's outputs Q6_K",
                  values=_spread("q6_k"), down=_spread("q6_k")),
    "q4_k_s": Mix("q4_k", 14, "Q4_K, those of the first layers Q5_K",
                  values=_until("q5_k", 4), down=_first("q5_k", 8)),
    "q4_1": Mix("q4_1", 3, "5 bits"),
    "q4_0": Mix("q4_0", 2, "4.5 bits", down=_with_imatrix(_first("q4_1", 8))),
    "iq4_nl": Mix("iq4_nl", 25, "4.5 bits, on an uneven grid",
                  values=_shared("q5_k"), down=_without_imatrix(_first("q5_k", 8))),
    "iq4_xs": Mix("iq4_xs", 30, "4.25 bits, on an uneven grid",
                  values=_shared("q5_k"), down=_without_imatrix(_first("q5_k", 8))),
    # llama.cpp gives a model without experts nothing but Q8_0 under this name.
    "mxfp4": Mix("mxfp4", 38, "4.25 bits, tiny floats with a shared power of two; beside experts Q8_0"),
    "q3_k_l": Mix("q3_k", 13, "Q3_K, attention's values and outputs and the feed-forward's outputs Q5_K",
                  values=_all("q5_k"), down=_all("q5_k"), attention_output=_all("q5_k")),
    "q3_k_m": Mix("q3_k", 12, "Q3_K, the same three Q4_K, some Q5_K",
                  values=_until("q5_k", 2, "q4_k"), attention_output=_all("q4_k"),
                  down=lambda layer, facts: "q5_k" if layer < facts.n_layers // 16 else "q4_k"),
    "q3_k_s": Mix("q3_k", 11, "Q3_K"),
    "q2_k": Mix("q2_k", 10, "Q2_K, the same three Q3_K or Q4_K",
                values=_shared("q4_k", "q3_k"), down=_all("q3_k"), attention_output=_all("q3_k")),
    # llama.cpp reads it, and its own program does not write it.
    "nvfp4": Mix("nvfp4", 39, "4.5 bits, tiny floats, of each 16 an 8-bit float scale"),
    "iq3_m": Mix("iq3_s", 27, "IQ3_S, attention's values and outputs and some of the feed-forward's Q4_K",
                 values=_all("q4_k"), attention_output=_all("q4_k"),
                 down=lambda layer, facts: _first("q4_k", 8)(layer, facts)
                 or (_spread("q4_k")(layer, facts) if facts.n_experts == 8 else None)),
    "iq3_s": Mix("iq3_s", 26, "3.4 bits, from a code book", values=_shared("q4_k")),
    "iq3_xs": Mix("iq3_s", 22, "IQ3_S, half of the matrices IQ3_XXS", values=_shared("q4_k"),
                  query=_all("iq3_xxs"), key=_all("iq3_xxs"), gate_up=_middle("iq3_xxs")),
    "iq3_xxs": Mix("iq3_xxs", 23, "3.1 bits, from a code book; attention's queries and keys IQ2_S",
                   values=_shared("q4_k"), query=_all("iq2_s"), key=_all("iq2_s"),
                   attention_output=_all("iq3_s"), embedding="iq3_s", output="q5_k"),
    "iq2_m": _few_bits("iq2_s", 29, "2.6 bits, from a code book; some matrices more", "iq3_s", "iq3_s"),
    "iq2_s": _few_bits("iq2_xs", 28, "IQ2_XS, some matrices IQ3_S or Q4_K", "iq3_s", "iq3_s"),
    "iq2_xs": _few_bits("iq2_xs", 20, "2.3 bits, from a code book; some matrices Q2_K or Q4_K", "q2_k"),
    "iq2_xxs": _few_bits("iq2_xxs", 19, "2.1 bits, from a code book; some matrices Q2_K or Q4_K", "q2_k"),
    "iq1_m": _few_bits("iq1_m", 31, "1.75 bits, from a code book; some matrices more", "q2_k", "iq2_xxs"),
    "iq1_s": _few_bits("iq1_s", 24, "1.6 bits, from a code book; some matrices more", "q2_k", "iq2_xxs"),
    "q2_0": Mix("q2_0", 41, "2.25 bits: -1, 0, 1, 2 times a scale", embedding="q4_k"),
    "tq2_0": Mix("tq2_0", 37, "2.1 bits: -1, 0, 1 times a scale, for models trained so", embedding="q4_k"),
    "tq1_0": Mix("tq1_0", 36, "1.7 bits: the same, packed tighter", embedding="q4_k"),
    "q1_0": Mix("q1_0", 40, "1.1 bits: the sign times a scale, for models trained so"),
}  # fmt: skip


_LAYER = re.compile(r"blk\.(\d+)\.(\w+?)(_exps|_shexp)?\.weight")
_NEVER = re.compile(
    r".*(_norm\.weight|ffn_gate_inp\.weight)|cls\.output\.weight"
)  # norms, the router, whose errors choose experts, and the two rows of a reranker


# Other names: a format's own stands for the middle of its mixes.
ALIASES = {"q5_k": "q5_k_m", "q4_k": "q4_k_m", "q3_k": "q3_k_m"}


def key_of(type: str) -> str:
    """The key in MIXES of what somebody calls a quantization ("Q4_K" is "q4_k_m"). Raises ArgumentError with
    the names that there are."""
    if not isinstance(type, str):
        raise TypeError(f"a quantization is named by a str such as 'q4_k_m', not {type!r}")
    key = ALIASES.get(type.lower(), type.lower())
    if key not in MIXES:
        raise ArgumentError(f"{type!r} is no quantization; there are {', '.join(MIXES)}")
    return key


def tensor_formats(
    shapes: Mapping[str, tuple[int, ...]], type: str, *, imatrix: bool = False
) -> dict[str, int]:
    """The format id of each tensor of a model, by its GGUF name, in a quantization.

    shapes: of all tensors, in numpy's order. imatrix: whether importance is known, which makes some
    exceptions needless. Vectors (norms, biases) and routers are F32. Raises ArgumentError.
    """
    return {name: IDS[got] for name, (_, got) in wanted_and_got(shapes, type, imatrix=imatrix).items()}


def wanted_and_got(
    shapes: Mapping[str, tuple[int, ...]],
    type: str,
    *,
    imatrix: bool = False,
    pure: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, tuple[str, str]]:
    """As `tensor_formats`, the names of two formats: the one that the quantization has for a tensor, and the
    one it gets, another where its rows are no multiple of the first one's block.

    pure: every matrix gets the quantization's own format. overrides: (pattern, format); a matrix whose name
    has the pattern (a regular expression) in it gets this format, of several the first's. Raises
    ArgumentError, also for a pattern that no matrix has and for a format that needs importance where there
    is none.
    """
    mix = MIXES[key_of(type)]
    facts, chosen = _facts(shapes, imatrix), _overridden(shapes, overrides)
    wanted = {
        name: chosen.get(name)
        or (mix.base if pure and _is_matrix(name, shape) else None)
        or _wanted(name, shape, mix, facts, "output.weight" in shapes)
        for name, shape in shapes.items()
    }
    both = {name: (format, _fitting(format, shapes[name][-1])) for name, format in wanted.items()}
    for name, (_, got) in both.items():
        if got in NEED_IMATRIX and not imatrix and name not in ("token_embd.weight", "output.weight"):
            raise ArgumentError(
                f"{type} makes {name} {got.upper()}, which needs importance: pass an imatrix "
                "(tinyllm-quantize --imatrix FILE, which tinyllm-perplexity MODEL TEXT --imatrix FILE makes)"
            )
    return both


def _overridden(
    shapes: Mapping[str, tuple[int, ...]], overrides: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """{name: format} of the matrices that somebody has chosen one for."""
    found: dict[str, str] = {}
    for pattern, format in overrides:
        if format.lower() not in IDS:
            raise ArgumentError(f"{format!r} is no format of a tensor; there are {', '.join(IDS)}")
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ArgumentError(f"{pattern!r} is no regular expression: {error}") from None
        names = [name for name, shape in shapes.items() if regex.search(name) and _is_matrix(name, shape)]
        if not names:
            raise ArgumentError(f"no matrix has {pattern!r} in its name; norms, biases and routers stay F32")
        found = {name: format.lower() for name in names} | found
    return found


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is one that may be quantized."""
    return len(shape) >= 2 and name.endswith(".weight") and not _NEVER.fullmatch(name)


def _facts(shapes: Mapping[str, tuple[int, ...]], imatrix: bool) -> Facts:
    layers = [int(match[1]) for name in shapes if (match := re.match(r"blk\.(\d+)\.", name))]
    experts = [shape[0] for shape in shapes.values() if len(shape) == 3]
    q = shapes.get("blk.0.attn_output.weight", (0, 1))[-1]  # as many columns as all heads have
    k = shapes.get("blk.0.attn_k.weight", (q,))[0]
    if "blk.0.attn_qkv.weight" in shapes:
        k = (shapes["blk.0.attn_qkv.weight"][0] - q) // 2
    return Facts(max(layers, default=-1) + 1, max(experts, default=0), q // max(k, 1), imatrix)


def _wanted(name: str, shape: tuple[int, ...], mix: Mix, facts: Facts, has_output: bool) -> str:
    if not _is_matrix(name, shape):
        return "f32"
    if mix.base in ("f32", "f16", "bf16"):
        return mix.base
    if name == "output.weight" or (name == "token_embd.weight" and not has_output):
        if mix.output != "q6_k" and shape[-1] % GGUF_FORMATS[IDS[mix.base]].block:
            return "q8_0"
        return "q8_0" if mix.base in ("q8_0", "mxfp4") else mix.output
    if mix.base == "mxfp4" and len(shape) == 2 and facts.n_experts:
        return "q8_0"
    if name == "token_embd.weight":
        return mix.embedding or mix.base
    return _in_layer(name, mix, facts) or mix.base


def _in_layer(name: str, mix: Mix, facts: Facts) -> str | None:
    match = _LAYER.fullmatch(name)
    if not match:
        return None
    layer, part = int(match[1]), "attn_v" if match[2] == "attn_qkv" else match[2]
    choice = {
        "attn_v": mix.values, "attn_q": mix.query, "attn_k": mix.key, "attn_output": mix.attention_output,
        "ffn_gate": mix.gate_up, "ffn_up": mix.gate_up, "ffn_down": mix.down,
    }.get(part)  # fmt: skip
    format = choice(layer, facts) if choice else None
    if mix.few_bits:
        return format
    if part == "attn_v" and facts.n_layers == 80 and (format or mix.base) in ("q3_k", "q4_k"):
        format = "q5_k"  # the 70B models: eight heads share each
    if facts.n_experts == 8 and part in ("attn_v", "attn_k"):
        format = "q8_0"  # small beside eight experts
    beside_eight = facts.n_experts == 8 and part == "attn_output"
    if beside_eight and mix.base in ("q2_k", "q3_k", "q4_k", "iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs"):
        format = None if mix is MIXES["q3_k_l"] else "q5_k"
    return format


def _fitting(format: str, k: int) -> str:
    if k % GGUF_FORMATS[IDS[format]].block:
        format = SMALLER_BLOCKS.get(format, "f16")
    return format if k % GGUF_FORMATS[IDS[format]].block == 0 else "f16"
