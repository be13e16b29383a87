"""Hypothesis strategies: whole models as GGUF files, as safetensors files and as directories, and what breaks
them: a field that lies, a piece that is cut, doubled or overwritten. Used by test_hostile.py."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

from helpers_hostile import (
    F32,
    FORMATS,
    I32,
    STRING,
    TINY_TOKENIZER_JSON,
    U32,
    U64,
    T,
    array,
    decode,
    encode,
    miniatures,
    pack_directory,
    safetensors_bytes,
    scalar,
    tiny_directory,
    tiny_gguf,
    tiny_sentencepiece_model,
)
from hypothesis import strategies as st

EDGES = [0, 1, 2, 31, 32, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
numbers = st.one_of(st.integers(0, 70), st.sampled_from(EDGES))
large = st.one_of(numbers, st.sampled_from([2**32, 2**40, 2**62, 2**63, 2**64 - 1]))
texts = st.one_of(st.text(max_size=8), st.sampled_from(["", "llama", "gpt2", "none", "yarn", "<s>", "\x00"]))
values = st.one_of(
    st.builds(lambda v: scalar(U32, v), numbers),
    st.builds(lambda v: scalar(U64, v), large),
    st.builds(lambda v: scalar(F32, v), st.floats(width=32)),
    st.builds(lambda v: scalar(STRING, v), texts),
    st.builds(lambda v: scalar(7, v), st.integers(0, 2)),
    st.builds(lambda v: array(I32, v), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=7)),
    st.builds(lambda v: array(F32, v), st.lists(st.floats(width=32), max_size=7)),
    st.builds(lambda v: array(STRING, v), st.lists(texts, max_size=7)),
    st.builds(lambda kind, count: struct.pack("<IIQ", 9, kind, count), st.integers(0, 13), large),
)
KEYS = [  # FAMILY: the file's own
    "general.alignment", "general.architecture", "split.count", "split.no", "split.tensors.count",
    "tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.add_bos_token",
    "FAMILY.attention.head_count_kv", "FAMILY.attention.key_length", "FAMILY.rope.dimension_count",
    "FAMILY.rope.freq_base", "FAMILY.rope.scaling.type", "FAMILY.rope.scaling.factor", "FAMILY.expert_count",
    "FAMILY.expert_used_count", "FAMILY.attention.sliding_window", "FAMILY.vocab_size",
    "FAMILY.rope.scaling.original_context_length", "FAMILY.rope.scaling.attn_factor", "FAMILY.logit_scale",
    "FAMILY.attention.scale", "FAMILY.embedding_scale", "FAMILY.residual_scale", "FAMILY.context_length",
    "FAMILY.attn_logit_softcapping", "FAMILY.final_logit_softcapping", "general.sampling.temp",
]  # fmt: skip


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    """A whole model, of whose fields up to three lie."""
    name = draw(st.sampled_from(["", "", *sorted(name for name, (raw, _) in miniatures().items() if raw)]))
    file = decode(miniatures()[name][0] or b"") if name else tiny_gguf()
    family = next(raw[12:] for key, raw in file.pairs if key == "general.architecture").decode()
    for _ in range(draw(st.integers(0, 3))):
        what = draw(st.sampled_from(["old key", "new key", "tensor", "tensor again", "no tensor", "file"]))
        if what == "old key":
            at = draw(st.integers(0, len(file.pairs) - 1))
            file.pairs[at] = (file.pairs[at][0], draw(values))
        elif what == "new key":
            key = draw(st.one_of(st.sampled_from(KEYS), texts)).replace("FAMILY", family)
            file.pairs = [pair for pair in file.pairs if pair[0] != key or draw(st.booleans())]
            file.pairs.append((key, draw(values)))
        elif what == "tensor":
            tensor = draw(st.sampled_from(file.tensors))
            lie: dict[str, st.SearchStrategy[Any]] = {
                "dims": st.lists(large, max_size=5).map(tuple),
                "type": st.one_of(st.sampled_from(sorted(FORMATS)), st.integers(0, 50)),
                "offset": large,
                "n_dims": numbers,
                "name": texts,
            }
            field = draw(st.sampled_from(sorted(lie)))
            setattr(tensor, field, draw(lie[field]))
        elif what == "tensor again":
            file.tensors.append(T(str(draw(st.sampled_from(file.tensors)).name) + draw(texts), (4,)))
        elif what == "no tensor" and len(file.tensors) > 1:
            file.tensors.pop(draw(st.integers(0, len(file.tensors) - 1)))
        else:
            field = draw(st.sampled_from(["n_tensors", "n_pairs", "version"]))
            setattr(file, field, draw(large))
    return encode(file)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), large, st.floats(), texts,
    st.sampled_from([10**400, [], {}, [[]], [1], {"a": 1}, ["sliding_attention"], {"rope_type": "yarn"}]),
)  # fmt: skip
CONFIG_KEYS = [
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "attention_bias", "hidden_act", "model_type", "architectures",
    "sliding_window", "layer_types", "use_sliding_window", "num_experts", "num_local_experts", "eos_token_id",
    "text_config", "partial_rotary_factor", "original_max_position_embeddings", "quantization_config",
]  # fmt: skip
FAMILIES = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3_moe",
    "phi3",
    "gemma3_text",
    "cohere2",
    "gpt_oss",
    "olmo3",
]


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """A file of up to four tensors, in whose header up to two entries lie."""
    shapes = draw(st.dictionaries(texts, st.lists(st.integers(1, 3), max_size=3), max_size=4))
    raw = safetensors_bytes(shapes)
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*header, "new", "__metadata__"]))
        fields = ["dtype", "shape", "data_offsets"]
        if isinstance(header.get(name), dict) and draw(st.booleans()):
            header[name][draw(st.sampled_from(fields))] = draw(st.one_of(leaves, st.lists(large, max_size=3)))
        else:
            header[name] = copy.deepcopy(draw(leaves))  # else the next step may change what all draw from
    changed = json.dumps(header).encode()
    length = draw(st.sampled_from([len(changed), len(changed), len(changed), draw(large)]))
    return length.to_bytes(8, "little") + changed + raw[8 + n :]


STEPS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "ab"},
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "NFKD"},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
    {"type": "BertProcessing", "cls": ["<s>", 4], "sep": ["<s>", 7]},
    {"type": "WordLevel", "vocab": {"a": 5}, "unk_token": "b"},
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", 0.0]], "byte_fallback": True},
]


def others_like(value: Any) -> st.SearchStrategy[Any]:
    """What a reader takes for a value of the same kind."""
    if isinstance(value, dict) and "type" in value:
        return st.sampled_from([*STEPS, None])
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return large
    if isinstance(value, str):
        return st.one_of(texts, st.sampled_from(["a", "A", "B", "[ab]+c", "Removed"]))
    if isinstance(value, list):
        return st.sampled_from([[], value * 2, value[::-1]])
    return leaves


@st.composite
def tokenizer_jsons(draw: st.DrawFn) -> bytes:
    """A tokenizer.json, which says other things in up to three places."""
    whole = copy.deepcopy(TINY_TOKENIZER_JSON)
    for _ in range(draw(st.integers(0, 3))):
        place: Any = whole
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or not place[key] or not draw(st.integers(0, 3)):
                break
            place = place[key]
        place[key] = copy.deepcopy(draw(others_like(place[key]) if draw(st.integers(0, 7)) else leaves))
    return json.dumps(whole).encode()


pieces = st.tuples(texts, st.floats(width=32), st.integers(0, 8))
tokenizers = st.one_of(
    st.just({}),
    tokenizer_jsons().map(lambda raw: {"tokenizer.json": raw}),
    st.lists(pieces, max_size=3).map(lambda some: {"tokenizer.model": tiny_sentencepiece_model(*some)}),
)


@st.composite
def directories(draw: st.DrawFn) -> bytes:
    """The packed files of a whole model, whose config.json, tokenizer and others say up to three other
    things."""
    name = draw(st.sampled_from(["", *sorted(name for name, (_, files) in miniatures().items() if files)]))
    files = (miniatures()[name][1] or {} if name else tiny_directory()) | draw(tokenizers)
    config = json.loads(files["config.json"])
    if draw(st.integers(0, 3)) == 0:
        config["model_type"] = draw(st.sampled_from(FAMILIES))
    for _ in range(draw(st.integers(0, 3))):
        config[draw(st.sampled_from(CONFIG_KEYS))] = draw(leaves)
    files["config.json"] = json.dumps(config).encode()
    for name in ("generation_config.json", "tokenizer_config.json"):
        if draw(st.integers(0, 3)) == 0:
            keys = ["eos_token_id", "top_k", "top_p", "chat_template", "eos_token", "added_tokens_decoder"]
            files[name] = json.dumps({draw(st.sampled_from(keys)): draw(leaves)}).encode()
    return pack_directory(files)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A file, into which up to four bytes or pieces are put, cut or moved."""
    raw = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        piece = bytes(raw[at : at + draw(st.integers(1, 40))])
        how = draw(st.sampled_from(["number", "cut", "double", "end", "bytes"]))
        if how == "number":
            width = draw(st.sampled_from([1, 4, 8]))
            raw[at : at + width] = (draw(large) % 2 ** (8 * width)).to_bytes(width, "little")
        elif how == "cut":
            del raw[at : at + len(piece)]
        elif how == "double":
            raw[at:at] = piece
        elif how == "end":
            del raw[at:]
        else:
            raw[at : at + len(piece)] = draw(st.binary(max_size=40))
    return bytes(raw)
