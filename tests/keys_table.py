"""docs/keys.md: what becomes of each key of config.json, by family, and of GGUF metadata.

`python tests/keys_table.py` writes its two sections anew and leaves the others; test_keys.py checks that the
page has them. config.json's is made of golden/keys.json and of families.py, GGUF's by setting each key."""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helpers_gguf import ARCHITECTURES, write_gguf
from helpers_keys import BASES, found_cases
from helpers_models import GOLDEN_DIR, golden_specs, random_weights

import tinyllm
from tinyllm.config import config_from_gguf
from tinyllm.config.families import FAMILIES, JSON_HARMLESS, OUTER_HARMLESS
from tinyllm.config.from_gguf import GGUF_HARMLESS
from tinyllm.files.gguf import read_gguf

PAGE = Path(__file__).parents[1] / "docs" / "keys.md"


def _keys(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _row(keys: Iterable[str], what: str, why: str = "") -> str:
    return f"| {_keys(keys)} | {what} | {why} |"


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    return [
        _row((key for key, of in reasons.items() if of == why), "harmless", why)
        for why in dict.fromkeys(reasons.values())
    ]


TABLE = ["| key | | because |", "| --- | --- | --- |"]


def _verdicts(kind: str) -> dict[str, set[str]]:
    """By key of a family what became of its values."""
    found: dict[str, set[str]] = {}
    for case in found_cases(kind):
        found.setdefault(case.key, set()).add(case.verdict)
    return found


def config_json() -> str:
    verdicts = {kind: _verdicts(kind) for kind in BASES}
    known = [key for key in verdicts["llama"] if key not in JSON_HARMLESS]
    everywhere = [k for k in known if all("obeyed" in found.get(k, ()) for found in verdicts.values())]
    nowhere = [
        k for k in known if not any({"obeyed", "warned"} & found.get(k, set()) for found in verdicts.values())
    ]
    nowhere = [k for k in nowhere if all("refused" in found.get(k, ()) for found in verdicts.values())]
    nowhere = [k for k in nowhere if not any(k in row.json_defaults for row in FAMILIES.values())]
    lines = [
        "Each key of each family's class in transformers, and each that older files have, was set to other",
        "values, and left out, in a small random model; its logits were compared with transformers'",
        "(tests/golden/sweep_keys.py, golden/keys.json). What transformers does not read is not applied, and",
        "a warning names it where it asks for something else than is computed. Every key that is not here is",
        "refused where it is set, as is what only other families read; `null`, `false`, 0 and empty count as",
        "not set.",
        "",
        "### In every family",
        "",
        *TABLE,
        _row(everywhere, "obeyed"),
        _row(
            ["max_position_embeddings"], "obeyed", "the context, where none is asked for; more is warned of"
        ),
        *_by_reason(JSON_HARMLESS),
        _row(
            [k for k in OUTER_HARMLESS if k not in ("text_config", "vision_config")],
            "harmless",
            "about images, beside a `text_config`",
        ),
        _row(
            ["tie_word_embeddings"],
            "obeyed",
            "beside a `text_config`; inside of it transformers does not read it, and a warning says so",
        ),
        _row(nowhere, "refused", "no family has it here"),
    ]
    shown = {*everywhere, *nowhere, *JSON_HARMLESS, "max_position_embeddings"}
    for kind, found in verdicts.items():
        row = FAMILIES[kind]
        rest = {k: v for k, v in found.items() if k not in shown}
        obeyed = [k for k, v in rest.items() if "obeyed" in v]
        warned = [k for k, v in rest.items() if "warned" in v and k not in (*obeyed, *row.json_twice)]
        refused = [k for k, v in rest.items() if k in row.json_defaults and v <= {"refused", "harmless"}]
        refused = [k for k in refused if "refused" in rest[k]]
        lines += ["", f"### {kind}: {row.title}", "", *TABLE, _row(obeyed, "obeyed")]
        if warned:
            lines.append(_row(warned, "warned", "its class does not read it"))
        if row.json_twice:
            twice = ", ".join(f"`{other}` says it" for other in row.json_twice.values())
            lines.append(_row(row.json_twice, "warned", f"its class does not read it; {twice}"))
        if refused:
            lines.append(_row(refused, "refused", "other values than the family's own"))
        none = [k for k, v in rest.items() if v <= {"harmless", "only ours"} and k not in row.json_twice]
        if none:
            lines.append(
                _row(
                    none,
                    "harmless",
                    "its class does not read it, or there is nothing that it could change here",
                )
            )
    return "\n".join(lines)


# Keys of GGUF metadata, and another value than the golden models' for each, or several.
GGUF_VALUES: dict[str, Any] = {
    "block_count": 1, "context_length": 64, "embedding_length": 96, "feed_forward_length": 24,
    "attention.head_count": 8, "attention.head_count_kv": 1, "attention.key_length": 8,
    "attention.value_length": 8, "attention.layer_norm_rms_epsilon": 0.5, "attention.layer_norm_epsilon": 0.5,
    "attention.causal": False, "attention.sliding_window": 8, "attention.sliding_window_pattern": 3,
    "attention.scale": 0.7, "attention.temperature_scale": 0.5, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0, "embedding_scale": 3.0, "residual_scale": 3.0, "logit_scale": 0.37,
    "rope.dimension_count": 8, "rope.freq_base": 777.0, "rope.freq_base_swa": 777.0,
    "rope.scale_linear": 2.0, "rope.scaling.type": ("yarn", "none"), "rope.scaling.factor": 3.0,
    "rope.scaling.attn_factor": 1.5, "rope.scaling.original_context_length": (32, 48),
    "rope.scaling.yarn_beta_fast": (7.0, 1.5), "rope.scaling.yarn_beta_slow": 0.5,
    "rope.scaling.yarn_attn_factor": 1.5, "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_log_multiplier": 0.5, "rope.scaling.finetuned": False, "expert_count": 4,
    "expert_used_count": 1, "expert_feed_forward_length": 24, "expert_weights_norm": (False, True),
    "vocab_size": 53, "tensor_data_layout": "x", "pooling_type": 1,
}  # fmt: skip
# Models by the architecture that GGUF calls them, and those whose RoPE is scaled.
GGUF_MODELS = (
    "llama2", "yarn", "mixtral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "phi3", "phi3_long",
    "smollm3", "granite", "olmo2", "olmo3", "gemma", "gemma2", "gemma3", "cohere", "cohere2",
)  # fmt: skip


def gguf_metadata() -> str:
    specs = {spec.name: spec for file in ("specs", "families") for spec in golden_specs(file)}
    obeyed: dict[str, set[str]] = {key: set() for key in GGUF_VALUES}
    refused: dict[str, set[str]] = {key: set() for key in GGUF_VALUES}
    names = set()
    with tempfile.TemporaryDirectory() as folder:
        for name in GGUF_MODELS:
            spec, path = specs[name], Path(folder) / f"{name}.gguf"
            prefix = ARCHITECTURES[spec.config["model_type"]].name
            names.add(prefix)
            write_gguf(path, spec.config, random_weights(spec.config, spec.seed))
            file = read_gguf(path)
            before = config_from_gguf(file.metadata, file.tensors)
            for key, values in GGUF_VALUES.items():
                for value in values if isinstance(values, tuple) else (values,):
                    try:
                        after = config_from_gguf({**file.metadata, f"{prefix}.{key}": value}, file.tensors)
                    except tinyllm.Error as error:  # by name, or it is read and the rest contradicts it
                        by_name = key.rsplit(".", 1)[-1] in str(error)
                        (refused if by_name else obeyed)[key].add(prefix)
                        continue
                    if after != before:
                        obeyed[key].add(prefix)
    keys = [key for key in GGUF_VALUES if key not in GGUF_HARMLESS]
    lines = [
        "The keys are written here without the architecture's name, which opens each in the file. Each was",
        "set to another value in a small file of every architecture. Others are refused where they are set.",
        "",
        *TABLE,
        _row((k for k in keys if obeyed[k] == names), "obeyed"),
    ]
    for key in keys:
        if obeyed[key] and obeyed[key] != names:
            where = f"in {_keys(sorted(obeyed[key]))}"
            if ".yarn_" in key and key not in FAMILIES["ministral3"].gguf_defaults:
                where = "where `rope.scaling.type` is `yarn`"
            rest = "elsewhere refused" if refused[key] else "elsewhere without effect"
            lines.append(_row([key], "obeyed", f"{where}; {rest}"))
    never = [k for k in keys if not obeyed[k] and refused[k]]
    lines.append(_row(never, "refused", "other values than those of a model as it is computed here"))
    return "\n".join([*lines, *_by_reason(GGUF_HARMLESS)])


def sections() -> dict[str, str]:
    """By its title the text of each of the page's sections that are made here."""
    logging.getLogger("tinyllm").setLevel(logging.ERROR)
    try:
        return {"## config.json, by family": config_json(), "## GGUF metadata": gguf_metadata()}
    finally:
        logging.getLogger("tinyllm").setLevel(logging.NOTSET)


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    for title, section in sections().items():
        pattern = re.compile(rf"^{re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
        text = pattern.sub("", text)
        before, sampling, after = text.partition("## Sampling and generation\n")
        text = f"{before}{title}\n\n{section}\n\n{sampling}{after}"
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    assert json.loads((GOLDEN_DIR / "keys.json").read_text(encoding="utf-8"))
    sys.exit(main())
