"""Goes through every key of every family's config.json and writes golden/keys.json: what tinyllm does with it
beside what Hugging Face transformers does.

Run from anywhere, with an interpreter that has torch, transformers and what tinyllm needs:
    python tests/golden/sweep_keys.py [FAMILY...] [--key KEY...]
With names only these families and keys; the others stay as they are.

The keys are those of the family's class in transformers (with the names it maps to others), those of
families.py, and those of LEGACY, which older files have. Each is set to other values (helpers_keys.py), one
at a time, and left out. Of what tinyllm takes, its logits are compared with transformers' of the same random
weights. What transformers reads differently, or what is refused without its name, is printed and ends the run
with 1."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from families_table import relative
from helpers_gguf import write_gguf
from helpers_keys import BASES, N_TOKENS, VERDICTS, Case, bases, case, others, swept
from helpers_models import GOLDEN_DIR, Spec, random_ids, random_weights

import tinyllm
from tinyllm.config import config_from_json
from tinyllm.config.families import FAMILIES, JSON_HARMLESS
from tinyllm.modelfiles import read_model

TOLERANCE = 1e-4  # of the largest logit: the promise
# Keys of files that the classes take without naming them among their fields.
LEGACY = (
    "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor",
    "original_max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "sliding_window_pattern", "_sliding_window_pattern", "head_dim", "hidden_act",
    "hidden_activation", "attention_bias", "mlp_bias", "norm_topk_prob", "num_experts", "num_local_experts",
    "no_rope_layers", "no_rope_layer_interval", "attn_logit_softcapping", "final_logit_softcapping",
    "query_pre_attn_scalar", "logit_scale", "use_qk_norm", "rms_norm_eps", "layer_norm_eps", "is_decoder",
    "add_cross_attention", "rope_interleaved", "num_labels", "pruned_heads", "use_bidirectional_attention",
    "is_causal", "per_layer_config", "quantization_config", "tie_last_hidden_states", "num_hidden_layers",
    "vocab_size",
)  # fmt: skip


# Never set here: it chooses the class.
NOT_SWEPT = ("model_type",)
# Keys that say which tensors there are, and of what shape.
IN_TENSORS = (
    "tie_word_embeddings", "attention_bias", "num_hidden_layers", "hidden_size", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "num_local_experts",
)  # fmt: skip
# What messages call a key.
ALSO = {"num_key_value_heads": "n_kv_heads", "num_local_experts": "num_experts"}


def keys_of(kind: str) -> list[str]:
    """Every key that the family's class, families.py or an old file knows."""
    class_ = CONFIG_MAPPING[kind]
    row = FAMILIES[kind]
    named = [field.name for field in fields(class_)]
    found = (
        *named,
        *class_.attribute_map,
        *row.json_defaults,
        *row.json_ignored,
        *row.json_twice,
        *JSON_HARMLESS,
        *LEGACY,
    )
    return [key for key in dict.fromkeys(found) if key not in NOT_SWEPT]


@cache
def fill(name: str, shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    """Weights at which every part of the model matters, float32, the same for a name and a shape."""
    rng = np.random.default_rng([seed, *name.encode()])
    u = rng.uniform(-1, 1, shape)
    if "norm" in name:
        u = 0.5 * u + (0.0 if kind.startswith("gemma") else 1.0)
    elif name.endswith(("bias", "sinks")):
        u = 0.8 * u
    else:
        sharp = ("q_proj", "k_proj", "qkv_proj", "lm_head", "embed", "gate.weight", "router.weight")
        u = u * (3.0**0.5) * (1.5 if any(part in name for part in sharp) else 1.0) / shape[-1] ** 0.5
    return torch.tensor(u, dtype=torch.float32)


class Refused(Exception):
    """By one of the two."""


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def measured(spec: Spec, config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The shapes of the weights, transformers' logits in float64, and tinyllm's from a file of the same
    weights. Raises Refused where transformers has no such model."""
    kind, ids = config["model_type"], random_ids({"vocab_size": 53}, spec.seed, N_TOKENS)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        (folder / "config.json").write_text(json.dumps(config))
        try:
            read = AutoConfig.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_config(
                read,
                dtype=torch.float64,
                attn_implementation="eager",
                experts_implementation="eager",
            ).eval()
            weights = dict(model.named_parameters())
            found = {name: tuple(weight.shape) for name, weight in weights.items()}
            said = {key: getattr(read, key) for key in IN_TENSORS} if kind == "gpt_oss" else {}
            in_gguf = {**spec.config, **said} if said else {}
            own = random_weights(in_gguf, spec.seed) if in_gguf else {}
            with torch.no_grad():
                for name, weight in weights.items():
                    value = own.get(name)
                    weight.copy_(
                        fill(name, found[name], kind, spec.seed) if value is None else torch.tensor(value)
                    )
                theirs = model(torch.tensor([ids]), use_cache=False, return_dict=True).logits[0].numpy()
        except Exception as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        files: Any = folder
        if in_gguf:  # floats of its experts are in no Hugging Face file
            write_gguf(folder / "model.gguf", in_gguf, own)
            files = replace(read_model(folder / "model.gguf"), config=config_from_json(config))
        else:
            model.float().save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
            (folder / "config.json").write_text(json.dumps(config))
        with tinyllm.load(files, device="cpu", cache_type="f32", context=N_TOKENS, threads=1) as llm:
            return found, theirs, logits_of(llm, ids)


def logits_of(llm: tinyllm.LLM, ids: list[int]) -> Any:
    """Also of a model that attends to both sides, which the library gives vectors of alone."""
    if not llm.config.bidirectional:
        return llm.logits(ids)
    n, tables = len(ids), len(llm.model.cache_groups)
    pages = -(-n // 64)
    pool = llm.model.cache("f32", tables * pages)
    pool.grow(tables * pages)
    llm.model.has_output = True
    table = np.arange(tables * pages).reshape(1, tables, pages)
    return llm.model.forward(ids, np.arange(n), np.zeros(n, np.int32), table, cache=pool)


def named(case: Case, message: str) -> bool:
    """Whether a message says which key is meant, which part of its value, or which it does not agree with."""
    inner = [name for value in case.config.values() if isinstance(value, dict) for name in value]
    also = (case.key, ALSO.get(case.key, case.key), *["RoPE"] * ("rope" in case.key))
    return any(name in message for name in (*case.config, *also, *inner))


def verdict(case: Case, known: Any, listener: Warnings) -> tuple[str, str]:
    """(what tinyllm does with the key, why it is wrong or what was said). known: of the model, `measured`."""
    spec, config = case.base, case.config
    listener.said.clear()
    try:
        config_from_json(config)
    except tinyllm.Error as error:
        return "refused", str(error)
    warned = [said for said in listener.said if f" {case.key} is " in said]
    try:
        found, theirs, ours = measured(spec, config)
    except Refused as error:
        return "only ours", str(error)
    except tinyllm.Error as error:
        return "does not fit", str(error)
    error = relative(ours, theirs)
    if not error < TOLERANCE:
        return "differs", f"{error:.1e} {warned}"
    if found != known[0] or relative(theirs, known[1]) > 1e-9:
        return ("differs", f"obeyed, but {warned}") if warned else ("obeyed", "")
    return ("warned", warned[0]) if warned else ("harmless", "")


def main() -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    listener = Warnings()
    logging.getLogger("tinyllm").addHandler(listener)
    out = GOLDEN_DIR / "keys.json"
    letters = {name: letter for letter, name in VERDICTS.items()}
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    wrong = 0
    parser = argparse.ArgumentParser()
    parser.add_argument("family", nargs="*")
    parser.add_argument("--key", nargs="*")
    asked = parser.parse_args()
    for kind in asked.family or BASES:
        models = bases(kind)
        before = results.get(kind, [{}] * len(models))
        results[kind] = []
        for i, (base, changes) in enumerate(models):
            known = measured(base, base.config)
            found = dict.fromkeys(swept(keys_of(kind), changes, first=i == 0), "")
            for key in found:
                if asked.key and key not in asked.key and key in before[i]:
                    found[key] = before[i][key]
                    continue
                for value in others(key, base.config):
                    one = case(base, key, value)
                    what, why = verdict(one, known, listener)
                    bad = what not in letters or (what == "refused" and not named(one, why))
                    wrong += bad
                    if bad or what == "only ours":
                        where = f"{base.name} {json.dumps(changes)}: {key} = {json.dumps(value)}"
                        print(f"{where}: {what}: {why[:300]}", flush=True)
                    found[key] += letters.get(what, "?")
            results[kind].append(found)
        n = sum(len(values) for found in results[kind] for values in found.values())
        print(f"{kind}: {n} values", flush=True)
        lines = (json.dumps(k) + ": [\n" + ",\n".join(map(json.dumps, v)) + "\n]" for k, v in results.items())
        out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
