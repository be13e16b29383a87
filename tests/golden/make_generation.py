"""Computes golden/generation.json: what transformers' `generate` makes of generation_config.json, key by key.

Run from anywhere, with an interpreter that has torch, transformers and sentencepiece (the tests need none):
    TINYLLM_TEST_DATA=... python tests/golden/make_generation.py

The model is stories260K-hf of the test data, in float32. The file holds `transformers`, its version; `keys`,
every key of its GenerationConfig; `prompt`, ids; and `cases`: by name `generation_config` (null: there is no
such file), `config` (what is added to config.json), `max_new_tokens` (null: not given to `generate`), `ids`
that came, with the one that ended the text."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

GOLDEN_DIR = Path(__file__).resolve().parent
MODEL = Path(os.environ["TINYLLM_TEST_DATA"]) / "models" / "stories260K-hf"
PROMPT = [1, 403, 407, 261, 378]  # Once upon a time


def generate(case: dict[str, Any]) -> list[int]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in MODEL.iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)
        config = json.loads((MODEL / "config.json").read_text()) | case["config"]
        (folder / "config.json").write_text(json.dumps(config))
        if case["generation_config"] is not None:
            (folder / "generation_config.json").write_text(json.dumps(case["generation_config"]))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        options: dict[str, Any] = {"tokenizer": AutoTokenizer.from_pretrained(folder)}
    if case["max_new_tokens"] is not None:
        options["max_new_tokens"] = case["max_new_tokens"]
    with torch.no_grad():
        return model.generate(torch.tensor([PROMPT]), **options)[0].tolist()[len(PROMPT) :]


def case(n: int | None = 40, config: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    own = {"eos_token_id": 2, "do_sample": False, **keys}
    return {"generation_config": None if config else own, "config": config or {}, "max_new_tokens": n}


def main() -> None:
    plain = generate(case(200))
    early = [2, plain[1]]  # would end the text at its second token
    cases = {
        "plain": case(200),
        "eos_token_id": case(eos_token_id=[2, plain[6]]),
        "suppress_tokens": case(suppress_tokens=[plain[3], plain[8]]),
        "begin_suppress_tokens": case(begin_suppress_tokens=[plain[0]]),
        "bad_words_ids": case(bad_words_ids=[[plain[3]], [plain[9], plain[10]]]),
        "bad_words_ids of a whole text": case(bad_words_ids=[[*PROMPT, plain[0]], [5, *PROMPT, plain[1]]]),
        "bad_words_ids with the end": case(bad_words_ids=[[plain[6]], [2]], eos_token_id=[2, plain[6]]),
        "no_repeat_ngram_size 1": case(no_repeat_ngram_size=1),
        "no_repeat_ngram_size 2": case(200, no_repeat_ngram_size=2),
        "no_repeat_ngram_size 3": case(200, no_repeat_ngram_size=3),
        "min_new_tokens": case(min_new_tokens=5, eos_token_id=early),
        "min_length": case(min_length=12, eos_token_id=early),
        "min_new_tokens and min_length": case(min_new_tokens=3, min_length=30, eos_token_id=early),
        "repetition_penalty": case(200, repetition_penalty=1.3),
        "repetition_penalty below 1": case(60, repetition_penalty=0.9),
        "stop_strings": case(stop_strings=["girl"]),
        "stop_strings, a string": case(stop_strings=" named L"),
        "max_new_tokens": case(None, max_new_tokens=5),
        "max_length": case(None, max_length=12),
        "max_length 20": case(None, max_length=20),
        "max_new_tokens and max_length": case(None, max_new_tokens=9, max_length=7),
        "several": case(
            200,
            repetition_penalty=1.2,
            no_repeat_ngram_size=4,
            suppress_tokens=[plain[8]],
            bad_words_ids=[[plain[3], plain[4]]],
            min_new_tokens=100,
        ),
        "config.json": case(
            200, {"repetition_penalty": 1.3, "suppress_tokens": [plain[8]], "no_repeat_ngram_size": 3}
        ),
        "harmless": case(
            early_stopping=True,
            length_penalty=2.0,
            renormalize_logits=True,
            remove_invalid_values=True,
            use_cache=False,
            prompt_lookup_num_tokens=None,
            num_assistant_tokens=3,
            assistant_confidence_threshold=0.1,
            pad_token_id=0,
            bos_token_id=7,
            decoder_start_token_id=7,
            output_scores=False,
            top_p=0.5,
            top_k=5,
            temperature=0.7,
            typical_p=0.5,
        ),
        "prompt_lookup_num_tokens": case(prompt_lookup_num_tokens=3),
    }
    for name, given in cases.items():
        given["ids"] = generate(given)
        print(name, "same as plain" if given["ids"] == plain[: len(given["ids"])] else "differs")
    keys = sorted({*vars(GenerationConfig()), *GenerationConfig().to_dict(), "_commit_hash"})
    about = {"transformers": transformers.__version__, "keys": keys, "prompt": PROMPT}
    lines = [f"{json.dumps(name)}: {json.dumps(made)}" for name, made in cases.items()]
    text = json.dumps(about)[:-1] + ',\n"cases": {\n' + ",\n".join(lines) + "\n}}\n"
    (GOLDEN_DIR / "generation.json").write_text(text)


if __name__ == "__main__":
    main()
