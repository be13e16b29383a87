"""Importance matrices: what a model's matrices meet, against the forward pass written out in numpy, and the
file, read by the gguf package."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import reference
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import (
    Spec,
    golden_model,
    golden_specs,
    random_ids,
    random_weights,
    write_hf_directory,
)

import tinyllm
from tinyllm import backends
from tinyllm.cli import perplexity
from tinyllm.cli.perplexity import main
from tinyllm.errors import ArgumentError, FormatError, UnsupportedError
from tinyllm.files.gguf import read_gguf
from tinyllm.measure import quality
from tinyllm.quantization import calibration

F64 = npt.NDArray[np.float64]
MASTER = Path(__file__).resolve().parents[1] / "benchmarks" / "stories-f16.gguf"
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 130, "hidden_size": 96,
    "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "hidden_act": "silu", "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def inputs(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], weights: dict[str, Any], ids: list[int]
) -> dict[str, F64]:
    """Hugging Face's name -> the activations that matrix meets, [n, k], from tests/reference.py: every matrix
    there is multiplied as `seen @ w.T`, so an array that says what it was multiplied with tells."""
    met: dict[str, F64] = {}

    class Watched(np.ndarray[Any, Any]):
        name = ""

        def __array_finalize__(self, source: Any) -> None:
            self.name = getattr(source, "name", "")

        def __rmatmul__(self, left: Any) -> Any:
            met[self.name] = np.asarray(left)
            return np.asarray(left) @ np.asarray(self)

    asarray = np.asarray

    def watched(value: Any, dtype: Any = None) -> Any:
        array = asarray(value, dtype)
        for name, w in weights.items():
            if value is w and w.ndim == 2 and name != "model.embed_tokens.weight":
                array = array.view(Watched)
                array.name = name.removesuffix(".weight")
        return array

    monkeypatch.setattr(reference.np, "asarray", watched)
    reference.logits(config, weights, ids)
    monkeypatch.setattr(reference.np, "asarray", asarray)
    return met


MIXTURE = {
    **CONFIG, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 5,
    "num_experts_per_tok": 2,
}  # fmt: skip
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3", "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip


def hugging_face(name: str) -> str:
    if name == "output.weight":
        return "lm_head"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}"


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["dense", "mixture"])
def test_every_matrix_sees_what_the_reference_feeds_it(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """float32 against float64: sums of squares agree to 1e-4 of a matrix's largest, as the logits do
    (docs/numbers.md)."""
    weights = random_weights(config, 3)
    ids = random_ids(config, 3, 40)
    expected = inputs(monkeypatch, config, weights, ids)
    with tinyllm.load(write_hf_directory(tmp_path / "m", config, weights), cache_type="f32") as llm:
        seen = calibration.observe(llm)
        llm.logits(ids)
    assert len(seen) == 7 * 2 + 1
    found = {hugging_face(name).format(i): sums for name, of in seen.items() for i, sums in enumerate(of)}
    assert set(expected) - {f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2)} == {
        name for name, sums in found.items() if sums[-1]
    }
    for name, sums in found.items():
        met = expected.get(name, np.zeros((0, len(sums) - 1)))
        want = (met**2).sum(axis=0)
        assert sums[-1] == len(met), name
        np.testing.assert_allclose(sums[:-1], want, rtol=0, atol=1e-4 * want.max(), err_msg=name)


@pytest.mark.parametrize("spec", golden_specs("families"), ids=lambda spec: spec.name)
def test_every_family_is_observed(spec: Spec, tmp_path: Path) -> None:
    """Every tensor of a layer that a GGUF file has in blocks meets every token, a stack of experts all of a
    token's visits, and something other than zeros."""
    path = tmp_path / "model.gguf"
    if spec.in_gguf:
        write_gguf(path, spec.config, random_weights(spec.config, spec.seed))
    with tinyllm.load(path if spec.in_gguf else golden_model(spec, tmp_path)) as llm:
        config = llm.config
        seen = calibration.observe(llm)
        llm.logits(random_ids(spec.config, 1, 7))
    if spec.in_gguf:
        tensors = read_gguf(path).tensors
        names = {name for name, info in tensors.items() if len(info.shape) > 1 and ".bias" not in name}
        unseen = {n for n in names if "_norm" in n or "ffn_gate_inp" in n or "ssm_conv1d" in n}
        unseen |= set() if config.tied else {"token_embd.weight"}
        assert set(seen) == names - unseen
    for name, sums in seen.items():
        assert len(sums) == (config.n_experts if "_exps" in name else 1)
        visits = 7 * (config.n_experts_used if "_exps" in name else 1)
        assert sum(of[-1] for of in sums) == visits, name
        assert all((of[:-1].sum() > 0) == (of[-1] > 0) for of in sums), name


def test_observing_changes_nothing_and_does_not_depend_on_threads_or_calls() -> None:
    ids = list(range(3, 130))
    found: list[dict[str, bytes]] = []
    logits: list[bytes] = []
    for threads, isa in itertools.product((1, 2), (backends.info()["isa_usable"][0], "scalar")):
        before = backends.info()["isa"]
        backends.select_isa(isa)
        try:
            with tinyllm.load(MASTER, weights="q8_0", threads=threads) as llm:
                plain = llm.logits(ids)[-1].tobytes()
            with tinyllm.load(MASTER, weights="q8_0", threads=threads) as llm:
                seen = calibration.observe(llm)
                if threads == 1:
                    logits.append(llm.logits(ids)[-1].tobytes())
                else:  # the same tokens in calls of 50
                    with llm.session() as session:
                        for start in range(0, len(ids), 50):
                            session.append(ids[start : start + 50])
                        logits.append(session.logits.tobytes())
                assert logits[-1] == plain
                found.append(
                    {name: sums.tobytes() for name, (sums,) in seen.items() if name.startswith("blk")}
                )
        finally:
            backends.select_isa(before)
    assert all(other == found[0] for other in found[1:])
    assert len(set(logits)) == 1


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with tinyllm.load("stories") as llm:
        with pytest.raises(ArgumentError, match='there is no matrix "nosuch" in layer 0'):
            llm.model.observe("nosuch", 0)
        with pytest.raises(ArgumentError, match='there is no matrix "wq" in layer 4'):
            llm.model.observe("wq", 4)
        monkeypatch.setattr(llm.model, "device", "cuda:0")
        with pytest.raises(UnsupportedError, match="on the CPU only, not on cuda:0"):
            calibration.observe(llm)


def test_nothing_is_left_behind() -> None:
    before = backends.live_allocations()
    with tinyllm.load("stories") as llm:
        seen = calibration.observe(llm)
        llm.logits([1, 2, 3])
    assert seen["blk.0.attn_q.weight"][0][-1] == 3, "the numbers outlive the model"
    assert backends.live_allocations() == before


# --- the file -----------------------------------------------------------------------------------------------


def test_command_writes_what_gguf_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Once upon a time there was a mouse. The mouse had a red hat and a small house by the sea. " * 6
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "out.gguf"
    assert (
        main([str(MASTER), str(tmp_path / "text.txt"), "-c", "40", "--chunks", "3", "--imatrix", str(out)])
        == 0
    )
    assert capsys.readouterr().err == ""
    reader = gguf.GGUFReader(out)
    fields = {
        name: field.contents() for name, field in reader.fields.items() if "." in name and name[0] != "G"
    }
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["text.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (3, 40)
    held = {t.name: t for t in reader.tensors}
    with tinyllm.load(MASTER) as llm:
        seen = calibration.observe(llm)
        quality.measure([llm], quality.text_windows(llm, text, 40, most=3))
    assert len(held) == 2 * len(seen) == 2 * (4 * 7 + 1)
    for name, (sums,) in seen.items():
        np.testing.assert_array_equal(held[f"{name}.in_sum2"].data.ravel(), sums[:-1].astype(np.float32))
        # A window's last token predicts nothing here, and only scored tokens meet the output matrix.
        n_rows = 3 * (19 if name == "token_embd.weight" else 39)
        assert held[f"{name}.counts"].data.ravel().tolist() == [n_rows] == [sums[-1]]
    assert [int(n) for n in held["blk.0.ffn_down.weight.in_sum2"].shape] == [768, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "text.txt"], "no part is left"


def test_unseen_matrices_are_left_out(tmp_path: Path) -> None:
    calibration.write(tmp_path / "a.gguf", {"seen": [np.ones(4)], "unseen": [np.zeros(4)]})
    assert [t.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors] == ["seen.counts", "seen.in_sum2"]


def test_a_broken_model_is_noticed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One number of 10^19 leaves logits that are finite, but no sums of squares that float32 holds."""
    weights = random_weights(config := {**CONFIG, "vocab_size": 400}, 3)
    weights["model.layers.0.mlp.up_proj.weight"][5, 5] = 1e19
    write_gguf(tmp_path / "m.gguf", config, weights, tokenizer=small_tokenizer(400))
    (tmp_path / "text.txt").write_text("the cat sat on the mat and ate the rat " * 30)
    progress: list[int] = []
    monkeypatch.setattr(
        perplexity, "progress_bar", lambda _: nullcontext(lambda done, *_: progress.append(done))
    )
    args = [str(tmp_path / "m.gguf"), str(tmp_path / "text.txt"), "-c", "32"]
    assert main(args) == 0
    assert progress == [16, 26]
    progress.clear()
    capsys.readouterr()
    assert main([*args, "--imatrix", str(tmp_path / "out.gguf")]) == 1
    assert "the model computes numbers that are NaN or infinite" in capsys.readouterr().err
    assert not progress
    assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(FormatError, match="NaN or infinite"):
        calibration.write(tmp_path / "out.gguf", {"a": [np.array([1e50, 1.0])]})


def test_a_folder_that_is_not_there_is_noticed_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stories", "nowhere.txt", "--imatrix", str(tmp_path / "no" / "out.gguf")]) == 1
    assert "out.gguf: cannot be written: No such file or directory" in capsys.readouterr().err
