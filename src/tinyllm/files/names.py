"""The one table of tensor names: what this project, GGUF and Hugging Face call each weight, and its shape.

`map_tensors` matches a file's tensors with the table and reports all that is missing, extra or wrongly shaped
at once. A new family adds rows. Imports `config`, `errors` and this package's shared part.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tinyllm.config import DeltaSizes, ModelConfig
from tinyllm.config.families import Mixer, Source, family
from tinyllm.config.model import MAX_EXPERTS
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import BF16, F16, F32, FORMATS, MXFP4, TensorInfo, adapter_text, same_numbers, show
from tinyllm.files.linear import QUERY_GATE, apart

_log = logging.getLogger(__name__)

Key = tuple[str, "int | None"]  # (canonical name, layer); of expert i the name ends with .i, as in w_gate.7
MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Name:
    """One row: the names of a weight, with {} where the number of the layer stands, and its shape (rows,
    k). One that every expert has is a tensor an expert with a second {} in Hugging Face's files, and in GGUF
    one tensor of all of them, (experts, rows, k).
    """

    canonical: str
    gguf: str
    hf: str
    shape: Callable[[ModelConfig], tuple[int, ...]]
    # Whether a model of this config has it; None: as the file has it, but in all layers or in none.
    present: Callable[[ModelConfig], bool | None] = lambda config: True
    rotated: Callable[[ModelConfig], int] | None = None  # number of heads, where the rows are rotated by RoPE
    per_expert: bool = False
    mixer: Mixer | None = None  # in layers of this kind alone; None: in all

    @property
    def per_layer(self) -> bool:
        return "{}" in self.gguf

    def tensors(self, config: ModelConfig, source: Source) -> Iterator[tuple[str, Iterator[Key]]]:
        """The tensors that a file holds of it, and what weights each of them is; one by one, since a config
        of a few bytes can ask for millions."""
        name = self.gguf if source == "gguf" else self.hf
        for old, new in family(config.architecture, source).renamed.get(source, {}).items():
            part, _, canonical = old.partition("@")
            name = name.replace(part, new) if canonical in ("", self.canonical) else name
        for layer in range(config.n_layers) if self.per_layer else (None,):
            if self.mixer is not None and layer is not None and config.mixer(layer) != self.mixer:
                continue
            if not self.per_expert:
                yield name.format(layer), iter([(self.canonical, layer)])
                continue
            keys: Iterator[Key] = zip(
                (f"{self.canonical}.{i}" for i in range(config.n_experts)), itertools.repeat(layer)
            )
            if source == "gguf":
                yield name.format(layer), keys
            else:
                yield from ((name.format(layer, i), iter([key])) for i, key in enumerate(keys))


def _q_dim(c: ModelConfig) -> int:
    return c.n_heads * c.head_dim


def _kv_dim(c: ModelConfig) -> int:
    return c.n_kv_heads * c.head_dim


def _linear(
    suffix: str,
    gguf: str,
    hf: str,
    rows: Callable[[ModelConfig], int],
    k: Callable[[ModelConfig], int],
    bias: Callable[[ModelConfig], bool | None],
    rotated: Callable[[ModelConfig], int] | None = None,
    present: Callable[[ModelConfig], bool] = lambda config: True,
) -> tuple[Name, Name]:
    """A matrix w<suffix> and its bias b<suffix>."""
    mixer: Mixer | None = "attention" if "attn_" in gguf else None
    gguf, hf = f"blk.{{}}.{gguf}", f"model.layers.{{}}.{hf}"
    matrix = Name(f"w{suffix}", f"{gguf}.weight", f"{hf}.weight", lambda c: (rows(c), k(c)), present, rotated)
    beside = Name(
        f"b{suffix}",
        f"{gguf}.bias",
        f"{hf}.bias",
        lambda c: (rows(c),),
        lambda c: present(c) and bias(c),
        rotated,
    )
    return replace(matrix, mixer=mixer), replace(beside, mixer=mixer)


def _expert(
    part: str, rows: Callable[[ModelConfig], int], k: Callable[[ModelConfig], int]
) -> tuple[Name, Name]:
    """A matrix that every expert has, and its bias."""
    gguf, hf = f"blk.{{}}.ffn_{part}_exps", f"model.layers.{{}}.mlp.experts.{{}}.{part}_proj"
    return (
        Name(
            f"w_{part}", f"{gguf}.weight", f"{hf}.weight", lambda c: (rows(c), k(c)), _sparse, per_expert=True
        ),
        Name(f"b_{part}", f"{gguf}.bias", f"{hf}.bias", lambda c: (rows(c),), _expert_bias, per_expert=True),
    )


def _expert_bias(c: ModelConfig) -> bool:
    return c.expert_bias


def _dense(c: ModelConfig) -> bool:
    return not c.n_experts


def _gated(c: ModelConfig) -> bool:
    return not c.n_experts and c.gated


def _sparse(c: ModelConfig) -> bool:
    return c.n_experts > 0


def _router(c: ModelConfig) -> tuple[int, ...]:
    return (c.n_experts, c.dim)


def _vector(c: ModelConfig) -> tuple[int, ...]:
    return (c.dim,)


def _vocabulary(c: ModelConfig) -> tuple[int, ...]:
    return (c.vocab_size, c.dim)


def _dim(c: ModelConfig) -> int:
    return c.dim


def _q_norm(c: ModelConfig) -> tuple[int, ...]:
    return _norm_of(c, c.n_heads)


def _k_norm(c: ModelConfig) -> tuple[int, ...]:
    return _norm_of(c, c.n_kv_heads)


def _norm_of(c: ModelConfig, n_heads: int) -> tuple[int, ...]:
    if c.qk_norm == "heads":
        return (n_heads, c.head_dim)
    return (c.head_dim,) if c.qk_norm == "head" else (n_heads * c.head_dim,)


def _ff_dim(c: ModelConfig) -> int:
    return c.ff_dim


def _attention_bias(c: ModelConfig) -> bool | None:
    return c.attention_bias


def _output_bias(c: ModelConfig) -> bool | None:
    return c.output_bias


def _ffn_bias(c: ModelConfig) -> bool | None:
    return c.ffn_bias


def _norm(
    canonical: str, gguf: str, hf: str, present: Callable[[ModelConfig], bool | None] = lambda c: True
) -> Name:
    """A norm of x in every layer."""
    return Name(canonical, f"blk.{{}}.{gguf}.weight", f"model.layers.{{}}.{hf}.weight", _vector, present)


def _norm_bias(canonical: str, gguf: str, hf: str) -> Name:
    gguf, hf = f"blk.{{}}.{gguf}.bias", f"model.layers.{{}}.{hf}.bias"
    return Name(f"{canonical}_bias", gguf, hf, _vector, lambda c: c.norm_bias)


def _qk_norm(
    of: str, shape: Callable[[ModelConfig], tuple[int, ...]], rotated: Callable[[ModelConfig], int]
) -> Name:
    return Name(
        f"{of}_norm",
        f"blk.{{}}.attn_{of}_norm.weight",
        f"model.layers.{{}}.self_attn.{of}_norm.weight",
        shape,
        lambda c: c.qk_norm is not None,
        lambda c: 1 if c.qk_norm == "head" else rotated(c),
        mixer="attention",
    )


def _sizes(c: ModelConfig) -> DeltaSizes:
    assert c.delta is not None
    return c.delta


def _delta(canonical: str, gguf: str, hf: str, shape: Callable[[ModelConfig], tuple[int, ...]]) -> Name:
    """A weight of a layer of Gated DeltaNet."""
    return Name(
        canonical,
        f"blk.{{}}.{gguf}",
        f"model.layers.{{}}.linear_attn.{hf}",
        shape,
        lambda c: c.delta is not None,
        mixer="delta",
    )


def _v_heads(c: ModelConfig) -> tuple[int, ...]:
    return (_sizes(c).v_heads,)


# A canonical name has several rows where its file's name depends on the family; one of them is present.
TABLE: tuple[Name, ...] = (
    Name("embedding", "token_embd.weight", "model.embed_tokens.weight", _vocabulary),
    Name("output_norm", "output_norm.weight", "model.norm.weight", _vector, lambda c: c.norm_kind != "plain"),
    Name("output_norm_bias", "output_norm.bias", "model.norm.bias", _vector, lambda c: c.norm_bias),
    Name("output", "output.weight", "lm_head.weight", _vocabulary, lambda c: not c.tied),
    _norm(
        "attention_norm",
        "attn_norm",
        "input_layernorm",
        lambda c: c.norm_place != "after" and c.norm_kind != "plain",
    ),
    _norm_bias("attention_norm", "attn_norm", "input_layernorm"),
    *_linear("q", "attn_q", "self_attn.q_proj", _q_dim, _dim, _attention_bias, lambda c: c.n_heads),
    *_linear("k", "attn_k", "self_attn.k_proj", _kv_dim, _dim, _attention_bias, lambda c: c.n_kv_heads),
    *_linear("v", "attn_v", "self_attn.v_proj", _kv_dim, _dim, _attention_bias),
    _qk_norm("q", _q_norm, lambda c: c.n_heads),
    _qk_norm("k", _k_norm, lambda c: c.n_kv_heads),
    Name(
        "sinks",
        "blk.{}.attn_sinks.weight",
        "model.layers.{}.self_attn.sinks",
        lambda c: (c.n_heads,),
        lambda c: c.sinks,
    ),
    *_linear("o", "attn_output", "self_attn.o_proj", _dim, _q_dim, _output_bias),
    Name(
        "w_attention_gate",
        f"blk.{{}}.{QUERY_GATE['gguf']}",
        f"model.layers.{{}}.{QUERY_GATE['hf']}",
        lambda c: (_q_dim(c), c.dim),
        lambda c: c.gated_attention,
        mixer="attention",
    ),
    _delta("w_qkv", "attn_qkv.weight", "in_proj_qkv.weight", lambda c: (_sizes(c).channels, c.dim)),
    _delta("w_z", "attn_gate.weight", "in_proj_z.weight", lambda c: (_sizes(c).v_width, c.dim)),
    _delta("w_a", "ssm_alpha.weight", "in_proj_a.weight", lambda c: (_sizes(c).v_heads, c.dim)),
    _delta("w_b", "ssm_beta.weight", "in_proj_b.weight", lambda c: (_sizes(c).v_heads, c.dim)),
    _delta("conv", "ssm_conv1d.weight", "conv1d.weight", lambda c: (_sizes(c).channels * _sizes(c).kernel,)),
    _delta("dt_bias", "ssm_dt.bias", "dt_bias", _v_heads),
    _delta("a", "ssm_a", "A_log", _v_heads),
    _delta("delta_norm", "ssm_norm.weight", "norm.weight", lambda c: (_sizes(c).v_dim,)),
    _delta("wo", "ssm_out.weight", "out_proj.weight", lambda c: (c.dim, _sizes(c).v_width)),
    _norm(
        "attention_post_norm",
        "post_attention_norm",
        "post_attention_layernorm",
        lambda c: c.norm_place != "before",
    ),
    _norm(
        "ffn_norm",
        "ffn_norm",
        "post_attention_layernorm",
        lambda c: c.norm_place == "before" and not c.parallel and c.norm_kind != "plain",
    ),
    _norm_bias("ffn_norm", "ffn_norm", "post_attention_layernorm"),
    _norm("ffn_norm", "ffn_norm", "pre_feedforward_layernorm", lambda c: c.norm_place == "both"),
    _norm("ffn_norm", "attn_norm", "input_layernorm", lambda c: c.parallel),  # both halves read the same
    *_linear("_gate", "ffn_gate", "mlp.gate_proj", _ff_dim, _dim, _ffn_bias, present=_gated),
    *_linear("_up", "ffn_up", "mlp.up_proj", _ff_dim, _dim, _ffn_bias, present=_dense),
    *_linear("_down", "ffn_down", "mlp.down_proj", _dim, _ff_dim, _ffn_bias, present=_dense),
    Name("router", "blk.{}.ffn_gate_inp.weight", "model.layers.{}.mlp.gate.weight", _router, _sparse),
    Name(
        "b_router",
        "blk.{}.ffn_gate_inp.bias",
        "model.layers.{}.mlp.gate.bias",
        lambda c: (c.n_experts,),
        _expert_bias,
    ),
    *_expert("gate", _ff_dim, _dim),
    *_expert("up", _ff_dim, _dim),
    *_expert("down", _dim, _ff_dim),
    _norm("ffn_post_norm", "post_ffw_norm", "post_feedforward_layernorm", lambda c: c.norm_place != "before"),
)

# Matrices that lie on top of each other in one tensor: (its name, {the name of a part: its rows}).
_Parts = tuple[tuple[str, Callable[[ModelConfig], int]], ...]
_QKV: _Parts = (
    ("attn_q", lambda c: _q_dim(c) * (1 + c.gated_attention)),
    ("attn_k", _kv_dim),
    ("attn_v", _kv_dim),
)
# llama.cpp's converter writes these for any family where it is asked to (--fuse-qkv, --fuse-gate-up-exps).
_FUSED_ANYWHERE: tuple[tuple[str, _Parts], ...] = (
    ("attn_qkv", _QKV),
    ("ffn_gate_up_exps", (("ffn_gate_exps", _ff_dim), ("ffn_up_exps", _ff_dim))),
)
_FUSED: dict[Source, dict[str, tuple[str, _Parts]]] = {
    "gguf": {
        "qkv": ("attn_qkv", _QKV),
        "gate_up": ("ffn_up", (("ffn_gate", _ff_dim), ("ffn_up", _ff_dim))),
    },
    "hf": {
        "qkv": (
            "self_attn.qkv_proj",
            (("self_attn.q_proj", _q_dim), ("self_attn.k_proj", _kv_dim), ("self_attn.v_proj", _kv_dim)),
        ),
        "gate_up": ("mlp.gate_up_proj", (("mlp.gate_proj", _ff_dim), ("mlp.up_proj", _ff_dim))),
    },
}


def _fused_of(config: ModelConfig, source: Source) -> list[tuple[str, _Parts]]:
    """What a family's files hold as one, under its names."""
    row = family(config.architecture, source)
    renamed = row.renamed.get(source, {})
    return [
        (renamed.get(name, name), parts)
        for name, parts in (_FUSED[source][kind] for kind in row.fused.get(source, ()))
    ]


_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # Hugging Face's
# What stands before a language model's names: none where the model was saved without its head, several inside
# a model that also reads images or where a wrapper was saved.
_WRAPPED = re.compile(r"(?:model\.|language_model\.)*((?:layers|embed_tokens|norm)\..*|lm_head\..*)")
_ADAPTER = re.compile(
    r".*\.(lora_(A|B|magnitude|embedding)|hada_|lokr_|ia3_|oft_|base_layer\.).*|.*\.lora_[ab]"
)

# Tensors that say nothing new: tables of rotary frequencies, and what reads images. Factors of RoPE are read
# into the config.
_HARMLESS = {
    "gguf": re.compile(
        r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd\.weight"
    ),
    "hf": re.compile(
        r"(.*\.)?rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector|visual)\..*"
    ),
}


class Weights(Mapping[Key, TensorInfo]):
    """The tensors of a model by (canonical name, layer), layer None for those outside the layers. `config` is
    the model's, `tied` as its tensors have it.

    `weights.get(("bq", 3))` is None where a model has no such bias; "output" is absent where the embedding
    serves.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[Key, TensorInfo],
        row_orders: dict[str, npt.NDArray[np.int32]],
        norms_minus_one: bool = False,
        fused: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """fused: tensors of a GGUF file that hold several matrices of the table, and which."""
        self.config = config
        self.fused = fused or {}
        self._tensors = tensors
        self._row_orders = row_orders
        self._norms_minus_one = norms_minus_one

    def __getitem__(self, key: Key) -> TensorInfo:
        return self._tensors[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def row_order(self, canonical: str) -> npt.NDArray[np.int32] | None:
        """For each row as the model wants it (half-split order), the row of the file; None: as they are.

        int32 [rows]; the same in every layer.
        """
        return self._row_orders.get(canonical)

    def plus(self, canonical: str) -> float:
        """What is to be added to a vector's numbers: 1 for norms that the file holds minus 1."""
        is_minus_one = self._norms_minus_one and canonical.endswith("norm") and canonical != "delta_norm"
        return 1.0 if is_minus_one else 0.0


def map_tensors(tensors: Mapping[str, TensorInfo], config: ModelConfig, source: Source) -> Weights:
    """Match a file's tensors with the table.

    A fused tensor counts as its parts; an output matrix of its own counts, whatever the config says of tied
    ones. Raises one FormatError that lists the tensors that are missing, unexpected, wrongly shaped, or a
    norm or bias in blocks, and looks for no more than it shows; UnsupportedError for an adapter's tensors and
    for matrices with a factor beside them.
    """
    row_of_family = family(config.architecture, source)
    _refuse_adapter(tensors)
    if source == "hf":
        bare: dict[str, TensorInfo] = {}
        for name, info in tensors.items():
            _add(bare, unwrapped(name), info)
        config, tensors = _own_head(bare, config)
    else:
        tensors = _with_factors(tensors)
    tensors, fused = _split_fused(tensors, config, source)
    if row_of_family.guessing:
        tensors = apart(tensors, config, source)
    if row_of_family.stacked and source == "hf":
        tensors = _split_stacks(tensors, config)
    if config.activation == "xielu" and source == "hf":
        config, tensors = _own_xielu(tensors, config)
    found: dict[Key, TensorInfo] = {}
    problems: list[str] = []
    expected: set[str] = set()
    for row in TABLE:
        present = row.present(config)
        if present is None:
            present = any(name in tensors for name, _ in row.tensors(config, source))
        if not present:
            continue
        shape = row.shape(config)
        if row.per_expert and source == "gguf":
            shape = (config.n_experts, *shape)
        for name, keys in row.tensors(config, source):
            if len(problems) > MAX_PROBLEMS:
                break
            expected.add(name)
            if name not in tensors:
                problems.append(f"{name} is missing, expected with shape {shape}")
            elif tensors[name].shape != shape:
                problems.append(f"{name} has shape {tensors[name].shape}, expected {shape}")
            elif len(row.shape(config)) == 1 and tensors[name].format not in (F32, F16, BF16):
                stored = FORMATS[tensors[name].format].name
                problems.append(f"{name} is {stored}; a norm or bias must be F32, F16 or BF16")
            else:
                stack = row.per_expert and source == "gguf"
                parts = tensors[name].parts() if stack else [tensors[name]]
                found.update(zip(keys, parts, strict=True))
    if len(problems) <= MAX_PROBLEMS:
        harmless = _HARMLESS[source]
        extra = [name for name in tensors if name not in expected and not harmless.fullmatch(name)]
        problems += [f"{show(name)} of shape {tensors[name].shape} is not expected" for name in sorted(extra)]
    if problems:
        more = "\n  and more" if len(problems) > MAX_PROBLEMS else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:MAX_PROBLEMS])
        model = f"{config.architecture}, {config.n_layers} layers"
        raise FormatError(f"the tensors do not fit the config ({model}):{listed}{more}")
    minus_one = source == "hf" and row_of_family.norms_minus_one
    fused = fused if source == "gguf" else dict(fused_in_gguf(config))
    if source == "gguf" and config.gated_attention:
        for queries, gated in fused_in_gguf(config):  # which may be part of a larger one
            whole = next((name for name, of in fused.items() if queries in of), queries)
            fused[whole] = list(dict.fromkeys([*fused.get(whole, []), *gated]))
    return Weights(config, found, row_orders(config, source), minus_one, fused)


def _add(found: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
    """Refuses what a file holds twice, whole and as a part or under two names."""
    if name in found:
        raise FormatError(f"{show(info.name)} and {show(found[name].name)} both hold {show(name)}")
    found[name] = info


def unwrapped(name: str) -> str:
    """A tensor's name in Hugging Face's files without what may stand around the language model."""
    match = _WRAPPED.fullmatch(name)
    if not match:
        return name
    return match[1] if match[1].startswith("lm_head.") else f"model.{match[1]}"


def _refuse_adapter(tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        if _ADAPTER.fullmatch(name):
            raise UnsupportedError(adapter_text(f"{info.path.name} has {show(name)}"))


def _own_head(
    tensors: dict[str, TensorInfo], config: ModelConfig
) -> tuple[ModelConfig, dict[str, TensorInfo]]:
    """As transformers has it where config.json says that the output matrix is the embedding: one of other
    numbers is the output all the same, and one alone is both."""
    head, embedding = tensors.get(_HEAD), tensors.get(_EMBEDDING)
    if not config.tied or head is None:
        return config, tensors
    if embedding is not None and not same_numbers(head, embedding):
        _log.warning(
            "config.json says tie_word_embeddings, but %s differs from the embedding, so it is the output",
            _HEAD,
        )
        return replace(config, tied=False), tensors
    return config, {_EMBEDDING: head, **{name: info for name, info in tensors.items() if name != _HEAD}}


def _own_xielu(
    tensors: dict[str, TensorInfo], config: ModelConfig
) -> tuple[ModelConfig, dict[str, TensorInfo]]:
    """The numbers of xIELU, which a directory holds as tensors of one number a layer, in the config."""
    rest, numbers = dict(tensors), []
    for layer in range(config.n_layers):
        found = []
        for part in ("alpha_p", "alpha_n", "beta", "eps"):
            name = f"model.layers.{layer}.mlp.act_fn.{part}"
            info = rest.pop(name, None)
            if info is None or math.prod(info.shape) != 1 or info.format not in (F32, F16, BF16):
                what = "is missing" if info is None else f"has shape {info.shape}"
                raise FormatError(f"{name} {what}, expected one number")
            found.append(float(info.read_f32().ravel()[0]))
        numbers.append((found[0], found[1], found[2], found[3]))
    return replace(config, xielu=tuple(numbers)), rest


def _with_factors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """GGUF files with NVFP4 have a factor beside a matrix, NAME.scale, or one a matrix of a stack; and what
    its inputs were divided by when it was calibrated, NAME.input_scale, which nothing here needs."""
    found = dict(tensors)
    for name, info in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind not in ("scale", "input_scale") or f"{stem}.weight" not in tensors:
            continue
        del found[name]
        if kind == "input_scale":
            continue
        weight = tensors[f"{stem}.weight"]
        n_matrices = weight.shape[0] if len(weight.shape) == 3 else 1
        n_factors = math.prod(info.shape)
        if len(weight.shape) < 2 or n_factors != n_matrices or n_matrices > MAX_EXPERTS:
            raise FormatError(
                f"{show(name)} has {n_factors} numbers beside {show(weight.name)} of shape {weight.shape}; "
                "expected a factor a matrix"
            )
        values = info.read_f32().ravel()
        if not np.isfinite(values).all() or not values.all():
            raise FormatError(f"{show(name)} holds a factor that is 0, infinite or no number")
        if (values != 1).any():
            found[weight.name] = replace(weight, factors=tuple(values.tolist()))
    return found


def _split_fused(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, source: Source
) -> tuple[dict[str, TensorInfo], dict[str, list[str]]]:
    """Fused tensors as their parts: rows of the file one after another, of a stack in each matrix, under the
    parts' names; and which were fused. One of another height stays whole, and so does not fit the table."""
    found, names = dict(tensors), {}
    tables = _fused_of(config, source)
    for table, kind in itertools.product(
        {**dict(tables), **dict(_FUSED_ANYWHERE if source == "gguf" else ())}.items(), ("weight", "bias")
    ):
        heights = [rows(config) for _, rows in table[1]]
        for i in range(config.n_layers):
            if config.mixer(i) == "delta":  # whose three are one weight
                continue
            layer = f"blk.{i}." if source == "gguf" else f"model.layers.{i}."
            whole = found.get(name := f"{layer}{table[0]}.{kind}")
            axis = int(table[0].endswith("_exps"))
            if whole is None or len(whole.shape) != axis + 1 + (kind == "weight"):
                continue
            if whole.shape[axis] != sum(heights):
                continue
            del found[name]
            n_matrices = whole.shape[0] if axis else 1
            matrix_bytes, first = whole.n_bytes // n_matrices, 0
            row_bytes = matrix_bytes // sum(heights)
            names[name] = [f"{layer}{part}.{kind}" for part, _ in table[1]]
            for part, n in zip(names[name], heights, strict=True):
                rows = replace(
                    whole,
                    shape=(*whole.shape[:axis], n, *whole.shape[axis + 1 :]),
                    offset=whole.offset + first * row_bytes,
                    n_bytes=n_matrices * n * row_bytes,
                    stack_stride=matrix_bytes if axis else 0,
                )
                _add(found, part, rows)
                first += n
    return found, names


def fused_in_gguf(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """The tensors of a GGUF file that always hold several matrices of the table, and those of which they
    do."""
    for layer in range(config.n_layers):
        if config.gated_attention and config.mixer(layer) == "attention":
            queries = f"blk.{layer}.attn_q.weight"
            yield queries, [queries, f"blk.{layer}.{QUERY_GATE['gguf']}"]
        for fused, parts in _fused_of(config, "gguf"):
            yield f"blk.{layer}.{fused}.weight", [f"blk.{layer}.{part}.weight" for part, _ in parts]


def fused_tensors(config: ModelConfig, source: Source) -> dict[str, list[tuple[str, int]]]:
    """Tensors that may hold several matrices of the table on top of each other: the parts' names, and their
    rows (in each matrix of a stack)."""
    tables = _fused_of(config, source)
    both = dict(_FUSED_ANYWHERE if source == "gguf" else ()) | dict(tables)
    prefixes = (f"blk.{i}." if source == "gguf" else f"model.layers.{i}." for i in range(config.n_layers))
    return {
        f"{layer}{name}.weight": [(f"{layer}{part}.weight", rows(config)) for part, rows in parts]
        for layer in prefixes
        for name, parts in both.items()
    }


def in_gguf(weights: Weights) -> dict[Key, tuple[str, tuple[int, ...]]]:
    """The tensor of a GGUF file that each weight is or is a part of, and the tensor's shape."""
    config = weights.config
    names = {(row.canonical, row.mixer): row.gguf for row in TABLE}  # of norms with several, one
    whole = {part: name for name, parts in weights.fused.items() for part in parts}
    found: dict[Key, tuple[str, tuple[int, ...]]] = {}
    n_rows: dict[str, int] = {}
    for (canonical, layer), info in weights.items():
        stem, _, expert = canonical.partition(".")
        mixer = None if layer is None else config.mixer(layer)
        part = (names.get((stem, mixer)) or names[stem, None]).format(layer)
        name = whole.get(part, part)
        if expert in ("", "0"):
            n_rows[name] = n_rows.get(name, 0) + info.shape[0]
        found[canonical, layer] = name, ((config.n_experts,) if expert else ()) + info.shape
    return {
        key: (name, (*shape[: -len(weights[key].shape)], n_rows[name], *weights[key].shape[1:]))
        for key, (name, shape) in found.items()
    }


def _split_stacks(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """gpt-oss's stacks of experts as a tensor an expert: of gate_up_proj even rows are gate's, odd ones up's.
    Stacks of floats lie transposed, [experts, k, rows], those in MXFP4 do not. What is no stack of them stays
    whole, and so does not fit the table."""
    found: dict[str, TensorInfo] = {}
    for name, stack in tensors.items():
        match = re.fullmatch(r"(.*\.mlp\.experts\.)(gate_up|down)_proj(_bias)?", name)
        if not match or len(stack.shape) != 3 - bool(match[3]) or stack.shape[0] != config.n_experts:
            _add(found, name, stack)
            continue
        prefix, part, bias = match.groups()
        kind = "bias" if bias else "weight"
        lies_transposed = not bias and stack.format != MXFP4
        for i, expert in enumerate(stack.parts()):
            for at, of in enumerate(("down",) if part == "down" else ("gate", "up")):
                if lies_transposed:
                    rows = expert.transposed(at, 1 if part == "down" else 2)
                else:
                    rows = expert if part == "down" else expert.every_other(at)
                _add(found, f"{prefix}{i}.{of}_proj.{kind}", rows)
    return found


def row_orders(config: ModelConfig, source: Source) -> dict[str, npt.NDArray[np.int32]]:
    """Of the weights whose rows such files hold in another order than the model: see `Weights.row_order`."""
    if source not in family(config.architecture, source).interleaved:
        return {}
    present = [row for row in TABLE if row.rotated and row.present(config) is not False]
    return {row.canonical: half_split_order(config, row.rotated(config)) for row in present if row.rotated}


def half_split_order(config: ModelConfig, n_heads: int) -> npt.NDArray[np.int32]:
    """Source rows, int32 [n_heads * head_dim], that bring interleaved rotary pairs (2i, 2i + 1) to (i, i +
    rope_dim/2).

    Dimensions of a head past rope_dim stay where they are. q.k does not change, as q and k move alike.
    """
    head = np.arange(config.head_dim, dtype=np.int32)
    head[: config.rope_dim] = np.arange(config.rope_dim, dtype=np.int32).reshape(-1, 2).T.ravel()
    starts = np.arange(n_heads, dtype=np.int32) * config.head_dim
    return np.asarray((starts[:, None] + head).ravel(), np.int32)
