"""tinyllm-inspect: the facts and where they come from, the memory it foretells, what it warns of, and how it
shows tokens and probabilities."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from conftest import ReadCount
from helpers_cli import Cli, in_process
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import golden_spec, random_weights, write_hf_directory
from test_sampling import random_logits, reference

import tinyllm
from tinyllm import backends
from tinyllm.chat.templates import without_template
from tinyllm.cli.inspect import main, visible
from tinyllm.engine.next_token import look
from tinyllm.engine.sampling import SamplingParams
from tinyllm.files import FORMATS
from tinyllm.files.gguf import OTHER_FORMATS
from tinyllm.measure.inspection import _tokenizer_warnings, inspect_model
from tinyllm.modelfiles import read_model

CONFIG = {**golden_spec("llama3").config, "vocab_size": 400}
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.setenv("COLUMNS", "100")
    return in_process(main, monkeypatch, capsys)


def write(path: Path, tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
    changed = {**CONFIG, **config}
    write_gguf(path, changed, random_weights(changed, seed=3), tokenizer=tokenizer or small_tokenizer(400))
    return path


def with_special(*texts: str, **more: Any) -> dict[str, Any]:
    """A tokenizer whose last tokens are these control tokens."""
    tokenizer = small_tokenizer(400)
    for i, text in enumerate(texts, 400 - len(texts)):
        tokenizer["tokens"][i], tokenizer["types"][i] = text, 3
    return {**tokenizer, **more}


# --- facts --------------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_loaded_model() -> None:
    found = inspect_model("stories")
    with tinyllm.load("stories") as llm:
        assert found.config == llm.config
        assert found.tokenizer is not None
        assert llm.tokenizer is not None
        assert found.tokenizer["vocab_size"] == llm.tokenizer.vocab_size
        assert set(found.tokenizer["ends"].values()) == set(llm.eos_ids)
    assert found.kind == "GGUF"
    assert found.file_bytes == Path(found.path).stat().st_size
    assert found.n_parameters == sum(math.prod(t.shape) for t in found.tensors) == 3_672_320
    assert sum(t.n_bytes for t in found.tensors) == sum(share.n_bytes for share in found.formats)
    assert sum(share.n_tensors for share in found.formats) == len(found.tensors)
    assert {share.format: share.bits for share in found.formats} == {"Q8_0": 8.5, "F32": 32.0}
    assert found.template is None
    assert found.warnings == []


def test_a_directory(tmp_path: Path) -> None:
    spec = golden_spec("llama2")
    write_hf_directory(tmp_path, spec.config, random_weights(spec.config, 1), dtype="BF16", n_shards=3)
    found = inspect_model(tmp_path)
    assert (found.kind, found.n_files) == ("safetensors", 3)
    assert {share.format for share in found.formats} == {"BF16"}
    assert found.warnings == ["no tokenizer: this model takes and gives ids, not text"]


def test_sliding_windows(cli: Cli, tmp_path: Path) -> None:
    config = {**golden_spec("mistral").config, "sliding_window": 16}
    write_hf_directory(tmp_path, config, random_weights(config, 1))
    n_layers = config["num_hidden_layers"]
    assert f"; the last 16 tokens only in {n_layers} layers" in cli(tmp_path).out


def test_a_mixture_of_experts_says_what_a_token_uses(cli: Cli, tmp_path: Path) -> None:
    config = golden_spec("mixtral").config
    weights = random_weights(config, 1)
    write_hf_directory(tmp_path, config, weights)
    n, used = config["num_local_experts"], config["num_experts_per_tok"]
    of_experts = sum(w.size for name, w in weights.items() if ".experts." in name)
    total = sum(w.size for w in weights.values())
    found = inspect_model(tmp_path)
    assert (found.n_parameters, found.n_active_parameters) == (
        total,
        total - of_experts * (n - used) // n,
    )
    out = " ".join(cli(tmp_path).out.split())
    assert f"in {used} of {n} experts" in out
    assert f"parameters {total}, of which a token uses {found.n_active_parameters}" in out
    assert inspect_model("stories").n_active_parameters == 3_672_320


def test_one_of_a_thing_is_no_plural(cli: Cli) -> None:
    assert "2 tokens for 1 character, 0.5 a token" in cli("stories", "--tokens", "a").out
    assert "1 token for 0 characters" in cli("stories", "--tokens", "").out


def test_only_the_header_is_read(tmp_path: Path, reads: ReadCount, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "head_dim": 64}
    path = write(tmp_path / "big.gguf", **config)
    folder = write_hf_directory(
        tmp_path / "hf", {**CONFIG, **config}, random_weights({**CONFIG, **config}, 3)
    )
    monkeypatch.setattr(backends, "Model", None)
    for model in (path, folder):
        before = reads.n_bytes
        inspect_model(model)
        assert reads.n_bytes - before < 2_200_000  # two chunks and the header
        assert inspect_model(model).file_bytes > 25_000_000


def test_lines(cli: Cli) -> None:
    result = cli("stories")
    assert result.code == 0
    assert result.err == ""
    for line in (
        r"architecture +llama: 4 layers of width 256, feed-forward 768",
        r"attention +4 heads of 64, sharing 2 for keys and values",
        r"parameters +3\.67 million \(3672320\)",
        r"formats +Q8_0 +29 tensors +3\.9 MB +8\.5 bits a number\n +F32 +9 tensors",
        r"tokenizer +SentencePiece, 2048 tokens, 3 special; texts begin with <s> \(1\); </s> \(2\) ends",
        r"chat template +none: a base model",
        r"memory +weights 3\.91 MB \+ cache 1\.05 MB \+ scratch [\d.]+ MB = [\d.]+ MB for a context of 512",
        r"\| w_down +\| 256 x 768 +\| Q8_0 +\| +4 \| +836 kB \|",
    ):
        assert re.search(line, result.out), line
    assert "blk.3.ffn_down.weight" not in result.out
    assert re.search(
        r"blk\.3\.ffn_down\.weight +\| 256 x 768 +\| Q8_0 +\| +209 kB", cli("stories", "--tensors").out
    )


def test_json_holds_what_the_lines_say(cli: Cli) -> None:
    value = json.loads(cli("stories", "-o", "json").out)
    assert value["config"]["n_layers"] == 4
    assert value["formats"][0]["bits"] == 8.5
    assert len(value["tensors"]) == 38
    assert value["memory"]["total"] == sum(value["memory"][part] for part in ("weights", "cache", "scratch"))
    assert value["warnings"] == []


def test_a_template_and_what_it_takes(cli: Cli, tmp_path: Path) -> None:
    template = CHATML + "{% if enable_thinking is defined and tools %}<think>{% endif %}"
    path = write(tmp_path / "chat.gguf", with_special("<|im_start|>", "<|im_end|>", chat_template=template))
    facts = inspect_model(path).template
    assert facts is not None
    assert facts["variables"] == ["enable_thinking"]
    assert facts["takes_tools"] is True
    assert facts["reasoning"] == ["<think>"]
    assert facts["example"].startswith("<s><|im_start|>user\nWhat")
    out = cli(path).out
    assert "takes --template-arg enable_thinking" in out
    assert "tools and reasoning (<think>)" in out


# --- any file -----------------------------------------------------------------------------------------------


def test_raw_is_what_the_file_says(cli: Cli) -> None:
    path = Path(tinyllm.__file__).parent / "data/stories.gguf"
    reader = gguf.GGUFReader(path)
    value = json.loads(cli("stories", "--raw", "--json").out)
    theirs = {field.name: field.contents() for field in reader.fields.values() if field.name[:4] != "GGUF"}
    assert value["keys"].keys() == theirs.keys()
    for key, expected in theirs.items():
        assert value["keys"][key] == pytest.approx(expected), key
    assert [(t["name"], t["shape"], t["type"], t["offset"], t["n_bytes"]) for t in value["tensors"]] == [
        (t.name, t.shape[::-1].tolist(), t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    assert value["unsupported"] is None
    text = cli("stories", "--raw").out
    assert re.search(r'general\.architecture +"llama"', text)
    assert re.search(r"tokenizer\.ggml\.tokens .*\n?.*\(2048 of them\)", text)
    assert re.search(r"\| blk\.3\.ffn_down\.weight +\| 256 x 768 +\| Q8_0 +\| +209 kB \| +\d+ \|", text)
    assert json.loads(cli("stories", "--json").out)["formats"][0]["bits"] == 8.5


def test_a_gguf_that_is_not_run_is_listed(cli: Cli, tmp_path: Path) -> None:
    """Another architecture, and types of tensors that no kernel reads or nobody knows."""
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_uint32("mamba.block_count", 3)
    writer.add_tensor("a.weight", np.zeros((2, 256), np.float32))
    blocks = np.zeros((2, 292), np.uint8)
    writer.add_tensor("b.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = cli(path)
    assert result.code == 0
    assert re.search(r"mamba\.block_count +3", result.out)
    assert re.search(r"\| b\.weight \| 2 x 256 \| Q8_K \| +584 B \|", result.out)
    assert "warning: tinyllm does not run this: " in result.out
    value = json.loads(cli(path, "--json").out)
    assert "Q8_K" in value["unsupported"]
    raw = bytearray(path.read_bytes())
    at = raw.index(b"b.weight") + 8 + 4 + 16
    assert raw[at] == gguf.GGMLQuantizationType.Q8_K
    raw[at] = 99
    path.write_bytes(raw)
    tensor = json.loads(cli(path, "--raw", "--json").out)["tensors"][1]
    assert (tensor["type"], tensor["n_bytes"]) == ("type 99", None)


def test_sizes_of_types_that_no_kernel_reads() -> None:
    """As the reference reader has them, but for Q8_1 (findings/gguf_q8_1_block.sh)."""
    theirs = {type.name: sizes for type, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {form.name: (form.block, form.block_bytes) for form in OTHER_FORMATS.values()}
    assert ours == {name: theirs[name] for name in ours} | {"Q8_1": (32, 36)}
    assert all(gguf.GGMLQuantizationType[form.name] == number for number, form in OTHER_FORMATS.items())
    assert {*ours, *(form.name for form in FORMATS.values())} >= set(theirs)


def test_safetensors_that_are_no_model(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    values = {"w": np.zeros((2, 3), np.int64), "b": np.zeros(4, np.float16)}
    safetensors.numpy.save_file(values, path, metadata={"made by": "a test"})
    assert "--raw lists what it holds" in cli(path).err
    text = cli(path, "--raw").out
    assert re.search(r'made by +"a test"', text)
    assert re.search(r"\| w +\| 2 x 3 +\| I64 +\| +48 B \|", text)
    (tmp_path / "config.json").write_text('{"model_type": "unknown"}')
    folder = json.loads(cli(tmp_path, "--raw", "--json").out)
    assert folder["keys"] == {"model_type": "unknown"}
    assert {t["name"] for t in folder["tensors"]} == {"w", "b"}


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF" + b"\x03\0\0\0" + b"\xff" * 16, b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]",
     b'\x0c\0\0\0\0\0\0\0{"a": "xyz"}'],
)  # fmt: skip
def test_what_is_neither_is_refused(cli: Cli, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    result = cli(path, "--raw")
    assert result.code == 1
    assert str(path) in result.err
    assert result.err.count("\n") == 1


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_the_memory_foretold_is_what_is_taken(cache_type: backends.CacheType) -> None:
    plan = inspect_model("stories", context=300, cache_type=cache_type).memory
    with tinyllm.load("stories", context=300, cache_type=cache_type, threads=1) as llm:
        _, before = backends.live_allocations()
        llm([5] * 299, max_tokens=1)
        _, after = backends.live_allocations()
        pages = -(-300 // backends.PAGE) * llm._cache.pool.page_bytes
        assert plan.cache == pages
        assert abs(plan.weights / llm.model.weight_bytes - 1) < 0.01
        # Scratch: what the call took beyond the pages, which come in slabs of their own.
        scratch = after - before - llm._cache.pool.n_pages * llm._cache.pool.page_bytes
        logits = 4 * llm.config.vocab_size  # numpy's
        assert scratch + logits == pytest.approx(plan.scratch, rel=0.1)


def test_quantizing_while_loading_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "float.gguf")
    assert inspect_model(path, weights="q8_0").memory.weights < 0.4 * inspect_model(path).memory.weights


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr(backends, "free_memory", lambda: 14_800_000)
    found = inspect_model("stories")
    assert 0 < found.memory.fitting_context < 512
    assert found.warnings == ["a context of 512 does not fit into this machine's free memory"]
    assert f"enough for a context of {found.memory.fitting_context}" in cli("stories").out
    monkeypatch.setattr(backends, "free_memory", lambda: 1_000_000)
    assert inspect_model("stories").warnings == ["the weights do not fit into this machine's free memory"]


# --- warnings -----------------------------------------------------------------------------------------------

MARKS = ("<|im_start|>", "<|im_end|>")
TWICE = "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("tokenizer", "warning"),
    [
        (
            with_special(*MARKS),
            r"no chat template: taken for a base model.* its vocabulary has <\|im_start\|>",
        ),
        (with_special(chat_template=TWICE), "the chat template writes <s> twice"),
        (with_special(chat_template="{{ messages[0].nothing.here }}"), "a plain question does not render"),
        (
            with_special(
                *("<|turn|>", "<|over|>"),
                chat_template=CHATML.replace("im_start", "turn").replace("im_end", "over"),
            ),
            r"ends an answer with <\|over\|>, which does not end generation here",
        ),
    ],
)
def test_warnings(tmp_path: Path, cli: Cli, tokenizer: dict[str, Any], warning: str) -> None:
    path = write(tmp_path / "model.gguf", tokenizer)
    (text,) = inspect_model(path).warnings
    assert re.search(warning, text)
    assert "warning: " in cli(path).out


def test_run_says_the_same_of_a_model_without_a_template(cli: Cli, tmp_path: Path) -> None:
    for tokenizer in (with_special(*MARKS), with_special()):
        path = write(tmp_path / "model.gguf", tokenizer)
        with tinyllm.load(path) as llm:
            assert llm.tokenizer is not None
            what = without_template(llm.tokenizer.special_tokens)
            with pytest.raises(tinyllm.TemplateError, match=re.escape(f"it is {what}. Give it a prompt")):
                llm.chat([{"role": "user", "content": "Hi"}])
        warned = [text for text in inspect_model(path).warnings if what in text]
        assert len(warned) == ("<|im_start|>" in llm.tokenizer.special_tokens)
        assert "chat template  none: a base model, which continues a text" in cli(path).out


def test_nothing_is_wrong_with_a_chat_model(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", with_special(*MARKS, chat_template=CHATML))
    assert inspect_model(path).warnings == []


def test_a_vocabulary_of_another_size(tmp_path: Path) -> None:
    files = read_model(write(tmp_path / "model.gguf"))

    def warnings(n: int) -> list[str]:
        return list(_tokenizer_warnings(replace(files, config=replace(files.config, vocab_size=n))))

    assert warnings(2000) == ["the model has 2000 tokens, its tokenizer only 400: is it another model's?"]
    assert warnings(448) == []
    assert warnings(390) == ["the tokenizer has 400 tokens, the model 390: ids from 390 on cannot be used"]


# --- tokens -------------------------------------------------------------------------------------------------


def test_tokens_with_their_ids(cli: Cli) -> None:
    result = cli("stories", "--tokens", "Once upon a\ntime é")
    with tinyllm.load("stories") as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode("Once upon a\ntime é")
    pieces, below, _, count = result.out.splitlines()
    assert [int(cell) for cell in below.split("│")] == ids
    assert [cell.strip() for cell in pieces.split("│")][:4] == ["<s>", "·Once", "·upon", "·a"]
    assert "⏎" in pieces
    assert "<c3>│<a9>" in pieces
    assert count.startswith(f"{len(ids)} tokens for 18 characters")
    value = json.loads(cli("stories", "--tokens", "Once upon a\ntime é", "-o", "json").out)
    assert [token["id"] for token in value] == ids
    assert bytes.fromhex("".join(token["bytes"] for token in value[1:])).decode() == " Once upon a\ntime é"


def test_long_texts_take_several_rows(cli: Cli) -> None:
    lines = cli("stories", "--tokens", "The dog saw a cat. " * 20).out.splitlines()
    assert len(lines) > 6
    assert max(map(len, lines)) <= 100


def test_tokens_of_a_message_in_its_template(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.gguf", with_special(*MARKS, chat_template=CHATML))
    out = cli(path, "--tokens", "Hi", "--chat").out
    assert out.startswith("<s>│<|im_start|>│")
    assert "<|im_end|>" in out


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b" a", "·a"),
        (b"\n\t", "⏎⇥"),
        (b"\xe2\x82", "<e2><82>"),
        (b"\x1b[1m", "<1b>[1m"),
        ("é".encode(), "é"),
        ("\u200d".encode(), "<e2><80><8d>"),  # a joiner, which nobody would see
    ],
)
def test_visible(data: bytes, text: str) -> None:
    assert visible(data) == text


# --- the next token -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 10_000, "top_p": 0.0},
    ],
)
def test_what_is_kept_is_what_sampling_keeps(settings: dict[str, Any]) -> None:
    logits = random_logits(3, 100, 3.0)
    params = SamplingParams(
        **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 0.7, **settings}
    ).resolve()
    found = look(logits, [1.0, 0.7, 0.0], params)
    survivors, p = reference(logits, params, [])
    kept = [i for rank, i in enumerate(found.ids) if found.dropped_by(rank) is None]
    assert kept == survivors.tolist()
    mine = found.probabilities[1][: len(kept)]
    np.testing.assert_allclose(mine / mine.sum(), p, rtol=1e-6)
    assert found.probabilities[2].tolist() == [1.0] + [0.0] * 99
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)


def test_next_as_lines_and_json(cli: Cli) -> None:
    options = ("stories", "--next", "The dog was", "--temp", "0.5,2", "--top-k", "4", "-n", "6")
    result = cli(*options)
    assert result.code == 0
    head, *rows = result.out.splitlines()
    assert re.fullmatch(r" +temperature 0\.5 +temperature 2", head)
    assert re.match(r"·very +█+[▏▎▍▌▋▊▉]? +[\d.]+ % +[█▏▎▍▌▋▊▉]+ +[\d.]+ %  kept", rows[0])
    assert [row.split("  ")[-1] for row in rows[:6]] == ["kept"] * 4 + ["dropped by top-k"] * 2
    assert rows[6].startswith("others")
    assert "of 2048 tokens top-k 4 keeps 4, then top-p 0.95 keeps 4" in result.out
    assert max(map(len, result.out.splitlines())) <= 100
    value = json.loads(cli(*options, "-o", "json").out)
    assert value["temperatures"] == [0.5, 2.0]
    assert [token["dropped_by"] for token in value["tokens"]] == [None] * 4 + ["top-k 4"] * 2
    with tinyllm.load("stories") as llm:
        logits = llm.logits("The dog was")[-1].astype(np.float64) / 2.0
    p = np.exp(logits - logits.max())
    assert value["tokens"][0]["probabilities"][1] == pytest.approx(p.max() / p.sum(), rel=1e-5)


def test_plot(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "next.png"
    assert cli("stories", "--next", "It cost $5 and $", "--plot", path).code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_plot_without_matplotlib(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("stories", "--next", "x", "--plot", tmp_path / "next.png")
    assert result.code == 2
    assert "needs matplotlib: pip install matplotlib" in result.err
    assert not result.out


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ("", 2, "MODEL"),
        ("stories --tokens x --next y", 2, "cannot be used together"),
        ("stories --raw --next y", 2, "--next and --raw cannot be used together"),
        ("stories --plot x.png", 2, "it needs --next"),
        ("stories --next x --temp hot", 2, "not a list of numbers"),
        ("stories --next x --temp -1", 2, "0 to 1000"),
        ("stories --next x --top-p 2", 2, "top_p is 2"),
        ("stories --cache-type q1", 2, "q1"),
        ("stories --weights q8_0", 2, "quantized already"),
        ("stories --tokens x --chat", 1, "has no chat template"),
        ("no-such-model", 1, "no such file"),
    ],
)
def test_errors_are_one_line(cli: Cli, argv: str, code: int, words: str) -> None:
    result = cli(*argv.split())
    assert result.code == code
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not result.out


def test_help_teaches(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("--help")
    text = capsys.readouterr().out
    assert "examples:" in text
    assert max(map(len, text.splitlines())) <= 120
