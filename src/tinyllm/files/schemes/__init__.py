"""Weights that other libraries quantized, as one tensor each: the door through which all schemes come.

A scheme is a callable: it gets a module's name and tensors, takes those out that make its weight, and returns
the weight, or None where the module is not quantized. What config.json's quantization_config (or
hf_quant_config.json) says is obeyed, refused by its key, or warned of. `SCHEMES` is the one table of them.
Imports config's fields, `errors` and the rest of this package. Read next: reading.py and blocks.py, then
compressed_tensors.py."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyllm.config.fields import brief
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import TensorInfo, read_json_if_any, show, show_some
from tinyllm.files.schemes import awq, bitsandbytes, blocks, compressed_tensors, fp8, gptq, modelopt, torchao
from tinyllm.files.schemes.reading import Parts

_log = logging.getLogger(__name__)

Scheme = Callable[[str, Parts], "TensorInfo | None"]

# By quant_method: from quantization_config to the scheme. Raises UnsupportedError, FormatError.
SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "compressed-tensors": compressed_tensors.scheme,
    "fp8": fp8.scheme,
    "gptq": gptq.scheme,
    "awq": awq.scheme,
    "modelopt": modelopt.scheme,
    "bitsandbytes": bitsandbytes.scheme,
    "torchao": torchao.scheme,
}
_BUILT_IN = "mxfp4"  # gpt-oss: safetensors.py joins its two parts

# What stands beside weights for the activations or the cache of other programs.
_UNUSED = {
    "input_scale": "scales that inputs are divided by before they are rounded to 8 bits",
    "input_zero_point": "zero points of inputs rounded to 8 bits",
    "activation_scale": "scales that inputs are divided by before they are rounded to 8 bits",
    "input_global_scale": "scales that inputs are divided by before they are rounded to 4 bits",
    "k_scale": "scales for a cache of 8 bits",
    "v_scale": "scales for a cache of 8 bits",
}


def find_scheme(config: Mapping[str, Any], folder: Path) -> Scheme | None:
    """The scheme of a directory, from config.json's object; None: it has none, or one that the family's own
    code reads. Raises UnsupportedError for one that is not read here, FormatError."""
    said = config.get("quantization_config")
    if said is None:
        said = modelopt.of_hf_quant_config(read_json_if_any(folder / "hf_quant_config.json"))
    if said is None:
        return None
    if not isinstance(said, dict):
        raise FormatError(f"config.json: quantization_config must be an object, not {brief(said)}")
    method = said.get("quant_method")
    if method == _BUILT_IN:
        return None
    if not isinstance(method, str) or method not in SCHEMES:
        raise UnsupportedError(
            f"quantization_config: quant_method {brief(method)} is not supported; these are: "
            f"{', '.join(SCHEMES)}, {_BUILT_IN}"
        )
    return SCHEMES[method](said)


def join(tensors: Mapping[str, TensorInfo], scheme: Scheme) -> dict[str, TensorInfo]:
    """A file's tensors with one a quantized weight, named as in a file of floats. Raises FormatError,
    UnsupportedError."""
    modules: dict[str, Parts] = {}
    for name, info in fp8.with_own_scales(tensors).items():
        module, part = _split(name)
        modules.setdefault(module, Parts(module))[part] = info
    found: dict[str, TensorInfo] = {}
    unused: dict[str, str] = {}
    for module, parts in modules.items():
        weight = scheme(module, parts)
        for part in _UNUSED.keys() & parts.keys():
            unused[part] = module
            del parts[part]
        if weight is not None:
            found[f"{module}.weight"] = replace(weight, name=f"{module}.weight")
        found |= {info.name: info for info in parts.values()}
    for part, module in sorted(unused.items()):
        _log.warning(
            "%s.%s and its like, %s, are not used: nothing is rounded by them here",
            module,
            part,
            _UNUSED[part],
        )
    if wide := blocks.kept_wide(list(found.values())):
        _log.warning(
            "no format of fewer bits holds the numbers of some matrices, which take 4 bytes each (%d: %s)",
            len(wide),
            show_some([show(info.name) for info in wide], 3),
        )
    return found


def _split(name: str) -> tuple[str, str]:
    """A tensor's module and the rest. bitsandbytes writes names behind that of the weight."""
    match = re.fullmatch(r"(.*?)\.(weight\..*|[^.]*)", name)
    return (match[1], match[2]) if match else ("", name)
