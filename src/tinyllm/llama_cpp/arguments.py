"""What llama-cpp-python's arguments ask for, in tinyllm's words: of the constructor, and of sampling.

Invariant: an argument is obeyed, refused by name (where leaving it out would change what is computed), or
warned of by name, once in a process (where it only chooses how). Imports `tinyllm`, errors and what follows
from them.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm import SamplingParams
from tinyllm.errors import ArgumentError, ContextError, NotFoundError, UnsupportedError
from tinyllm.llama_cpp import constants
from tinyllm.llama_cpp.llama_grammar import LlamaGrammar

Processor = Callable[[npt.NDArray[np.intc], npt.NDArray[np.single]], Any]

# Arguments of the constructor that say how to compute, never what: name -> the default.
HOW: dict[str, Any] = {
    "split_mode": constants.LLAMA_SPLIT_MODE_LAYER,
    "tensor_split": None,
    "use_mmap": True,
    "use_mlock": False,
    "n_batch": 512,
    "n_ubatch": 512,
    "n_threads_batch": None,
    "offload_kqv": True,
    "flash_attn": False,
    "op_offload": None,
    "swa_full": None,
    "no_perf": False,
    "numa": False,
    "draft_model": None,
}
# Those that change the model, which is taken as its file says: name -> the defaults.
WHAT: dict[str, tuple[Any, ...]] = {
    "kv_overrides": (None, {}),
    "rope_scaling_type": (None, constants.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED),
    "attention_type": (constants.LLAMA_ATTENTION_TYPE_UNSPECIFIED,),
    "rope_freq_base": (0.0,),
    "rope_freq_scale": (0.0,),
    "yarn_ext_factor": (-1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_beta_fast": (32.0,),
    "yarn_beta_slow": (1.0,),
    "yarn_orig_ctx": (0,),
    "lora_base": (None,),
}
_CACHE_TYPES = {
    constants.GGML_TYPE_F32: "f32",
    constants.GGML_TYPE_F16: "f16",
    constants.GGML_TYPE_Q8_0: "q8_0",
}

_told: set[str] = set()  # what was warned of


class NoModelError(NotFoundError, ValueError):
    """The model's file does not exist; llama-cpp-python's word for it is ValueError."""


class PromptTooLongError(ContextError, ValueError):
    """The prompt leaves no room for an answer; llama-cpp-python's word for it is ValueError."""


def tell(names: Collection[str], message: str) -> None:
    """Warns of these names, of each once in a process. message: what is said of "{}", the names."""
    new = [name for name in names if name not in _told]
    _told.update(new)
    if new:
        warnings.warn(message.format(", ".join(new)), UserWarning, stacklevel=4)


def check_arguments(given: Mapping[str, Any], unknown: Collection[str]) -> None:
    """Refuses and warns. given: the constructor's arguments of HOW and WHAT, by name."""
    changed = [name for name, defaults in WHAT.items() if given[name] not in defaults]
    if changed:
        raise UnsupportedError(
            f"{', '.join(changed)}: not supported; tinyllm runs a model as its file describes it"
        )
    how = [name for name, default in HOW.items() if given[name] != default]
    if given["n_threads_batch"] == given["n_threads"]:
        how = [name for name in how if name != "n_threads_batch"]
    tell(how, "Llama: tinyllm has no use for {}, and does without; the answers are the same")
    tell(unknown, "Llama: there is no argument {}; it is not used")


def device_of(n_gpu_layers: int, main_gpu: int) -> str:
    """Layers on a GPU are all or none: any number but 0 lets the whole model onto one."""
    if n_gpu_layers == 0:
        return "cpu"
    return f"cuda:{main_gpu}" if main_gpu else "auto"


def cache_type_of(type_k: int | None, type_v: int | None) -> str:
    """The KV cache's type, of GGML's numbers."""
    k, v = (constants.GGML_TYPE_F16 if kind is None else kind for kind in (type_k, type_v))
    if k != v or k not in _CACHE_TYPES:
        raise UnsupportedError(
            f"type_k is {k} and type_v is {v}: keys and values have one type here, "
            "GGML_TYPE_F32 (0), GGML_TYPE_F16 (1) or GGML_TYPE_Q8_0 (8)"
        )
    return _CACHE_TYPES[k]


def seed_of(seed: int | None) -> int:
    """None, -1 and LLAMA_DEFAULT_SEED ask for a random one."""
    if seed is None or seed < 0 or seed == constants.LLAMA_DEFAULT_SEED:
        return secrets.randbits(32)
    return seed


def sampling_params(
    *,
    seed: int,
    penalty_window: int,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float,
    temperature: float,
    repeat_penalty: float,
    frequency_penalty: float,
    presence_penalty: float,
    tfs_z: float,
    mirostat_mode: int,
    processors: Sequence[Processor],
    grammar: LlamaGrammar | None,
    logit_bias: Mapping[Any, float] | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
) -> SamplingParams:
    """The same sampling for tinyllm, nothing of it left to the model's own advice.

    A negative temperature draws from the model's own probabilities, without filters. Raises UnsupportedError
    for mirostat, ArgumentError for what is out of range.
    """
    if mirostat_mode:
        raise UnsupportedError(
            f"mirostat_mode={mirostat_mode}: mirostat is not supported; temperature, top_k, top_p, min_p and "
            "typical_p are"
        )
    if tfs_z != 1.0:
        tell(["tfs_z"], "{} does nothing, as in llama.cpp since 2024")
    filters: dict[str, Any] = {"top_k": max(0, top_k), "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    if temperature < 0:
        temperature, filters = 1.0, {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    return SamplingParams(
        temperature=temperature,
        **filters,
        repetition_penalty=repeat_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        penalty_window=penalty_window,
        seed=seed,
        stop=tuple(stop),
        max_tokens=max_tokens,
        min_tokens=0,
        logprobs=logprobs is not None,
        top_logprobs=logprobs or 0,
        processors=[_as_ours(processor) for processor in processors],
        logit_bias={int(token): float(bias) for token, bias in (logit_bias or {}).items()},
        **(grammar.form if grammar is not None else {}),
    ).resolve()


def _as_ours(processor: Processor) -> Callable[[npt.NDArray[np.float32], Sequence[int]], Any]:
    """Their processors take the tokens first, as an array."""
    return lambda logits, tokens: processor(np.array(tokens, np.intc), logits)


def processors_of(given: Any) -> list[Processor]:
    """One processor, a list of them, or None."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def strings_of(stop: str | Sequence[str] | None) -> list[str]:
    """Stop strings; an empty one, which every text contains, stops nothing."""
    return [text for text in ([stop] if isinstance(stop, str) else stop or []) if text]


def schema_of(tool: Mapping[str, Any]) -> Any:
    """What the arguments of a tool have to look like."""
    try:
        return tool["function"].get("parameters") or {"type": "object"}
    except (KeyError, TypeError, AttributeError):
        raise ArgumentError(
            'a tool is {"type": "function", "function": {"name": ..., "parameters": ...}}'
        ) from None
