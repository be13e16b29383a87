"""Gated DeltaNet (Qwen 3.5) and its state slots: the same bits wherever calls are cut, whoever shares a
text's beginning, and whatever was guessed; what is refused. (transformers' logits: test_families.py; the
kernels' slow truth: tests/c/test_delta.c.)"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers_gguf import rewritten, write_gguf
from helpers_models import (
    Spec,
    golden_model,
    golden_specs,
    random_ids,
    random_weights,
    write_hf_directory,
    write_safetensors,
)

import tinyllm
from tinyllm import LLM, backends
from tinyllm.config import config_from_json
from tinyllm.engine.kvcache import PAGE
from tinyllm.engine.speculation import Costs, Guessing
from tinyllm.engine.states import BORDER, NONE, Slots
from tinyllm.errors import ArgumentError, FormatError, MemoryLimitError, UnsupportedError
from tinyllm.loading import cache_bytes

F32 = npt.NDArray[np.float32]
SPEC = next(spec for spec in golden_specs("families") if spec.name == "qwen3_5")
IDS = random_ids(SPEC.config, 5, 330)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model(SPEC, tmp_path_factory.mktemp("delta") / "model")


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with tinyllm.load(path, device="cpu", threads=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def truth(path: Path) -> Iterator[F32]:
    """The logits of IDS, [330, vocab_size], in one call of one thread that knows nothing of slots kept."""
    with tinyllm.load(path, device="cpu", threads=1) as llm:
        yield in_calls(llm, IDS, [len(IDS)])


@pytest.fixture
def fresh(path: Path) -> Iterator[LLM]:
    """Nothing of it is known to anybody."""
    with tinyllm.load(path, device="cpu", threads=2) as llm:
        yield llm


def in_calls(llm: LLM, ids: Sequence[int], lengths: Sequence[int]) -> F32:
    """Logits of one text, cut into calls of these lengths."""
    n_pages = -(-len(ids) // PAGE)
    pool = llm.model.cache("f16", n_pages)
    pool.grow(n_pages)
    states, rows, first = llm.model.state_pairs(pool), [], 0
    for n in lengths:
        rows.append(
            llm.model.forward(
                ids[first : first + n],
                range(first, first + n),
                [0] * n,
                [list(range(n_pages))],
                states=states.next([0], [n]),
                cache=pool,
            )
        )
        first += n
    pool.close()
    return np.concatenate(rows)


# ---- the same bits


@pytest.mark.parametrize("isa", backends.isa_names())
@pytest.mark.parametrize("threads", [1, 3])
def test_no_cut_thread_or_instruction_set_changes_a_bit(llm: LLM, truth: F32, isa: str, threads: int) -> None:
    before = backends.isa_name(), llm.model.threads
    random.seed(threads)
    cuts = sorted(random.sample(range(1, len(IDS)), 12))
    lengths = [end - start for start, end in zip([0, *cuts], [*cuts, len(IDS)], strict=True)]
    try:
        backends.select_isa(isa)
        llm.model.threads = threads
        for calls in ([len(IDS)], [1] * len(IDS), [63, 1, 1, 255, 10], [2, 1, 3, 324], lengths):
            np.testing.assert_array_equal(in_calls(llm, IDS, calls), truth)
    finally:
        backends.select_isa(before[0])
        llm.model.threads = before[1]


def test_texts_of_one_call_do_not_touch_each_other(llm: LLM) -> None:
    """Three texts in one call, at different positions, against each alone."""
    texts = [IDS[:70], IDS[100:103], IDS[7:140]]
    alone = [in_calls(llm, ids, [len(ids)]) for ids in texts]
    pool = llm.model.cache("f16", 9, max_slots=6)
    pool.grow(9)
    states, rows, done = llm.model.state_pairs(pool), [[] for _ in texts], [0, 0, 0]  # type: ignore[var-annotated]
    tables = np.arange(9).reshape(3, 3)
    for step in ([5, 1, 60], [64, 2, 1], [1, 0, 72]):
        here = [i for i in range(3) if step[i]]
        x = llm.model.forward(
            np.concatenate([texts[i][done[i] : done[i] + step[i]] for i in here]),
            np.concatenate([np.arange(done[i], done[i] + step[i]) for i in here]),
            np.repeat(np.arange(len(here)), [step[i] for i in here]),
            tables[here],
            states=states.next(here, [step[i] for i in here]),
            cache=pool,
        )
        end = 0
        for i in here:
            rows[i].append(x[end : end + step[i]])
            end, done[i] = end + step[i], done[i] + step[i]
    for got, expected in zip(rows, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(got), expected)


def test_a_state_kept_amid_a_call_is_that_of_a_call_that_ends_there(llm: LLM) -> None:
    pool = llm.model.cache("f16", 2, max_slots=5)
    pool.grow(2)
    pool.grow_slots(5)
    call: dict[str, Any] = {"cache": pool, "rows": []}
    llm.model.forward(
        IDS[:90], range(90), [0] * 90, [[0, 1]], states=([0], [(1, 0), (40, 1), (89, 2)]), **call
    )
    llm.model.forward(IDS[:41], range(41), [0] * 41, [[0, 1]], states=([0], [(40, 3)]), **call)
    np.testing.assert_array_equal(pool.read_slot(3), pool.read_slot(1))
    llm.model.forward(IDS[41:90], range(41, 90), [0] * 49, [[0, 1]], states=([3], [(48, 4)]), **call)
    np.testing.assert_array_equal(pool.read_slot(4), pool.read_slot(2))
    assert (pool.read_slot(0) != pool.read_slot(1)).any()
    pool.close()


def test_what_a_call_says_of_states_is_checked(llm: LLM) -> None:
    pool = llm.model.cache("f16", 1, max_slots=3)
    pool.grow(1)
    pool.grow_slots(2)

    def call(states: Any, first: int = 4, n: int = 2) -> None:
        llm.model.forward(IDS[:n], range(first, first + n), [0] * n, [[0]], states=states, cache=pool)

    for states, words in (
        (None, "keeps a state"),
        (([2], []), "slot 2 is not one of the 2"),
        (([-1], []), "slot -1"),
        (([0, 1], []), "a slot for each sequence"),
        (([0], [(0, 0)]), "read and written"),
        (([0], [(0, 1), (1, 1)]), "written twice"),
        (([0], [(1, 1), (0, 2)]), "not ascending"),
        (([0], [(2, 1)]), "token 2 of 2"),
        (([0], [(0, 2)]), "slot 2 is not one of the 2"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call(states)
    call(([7], [(1, 0)]), first=0)  # at position 0 there is nothing before
    with pytest.raises(ArgumentError, match="at most 3"):
        llm.model.cache("f16", 1, max_slots=3)._core.grow_slots(4)
    with pytest.raises(ArgumentError, match="bytes"):
        pool.write_slot(0, np.zeros(3, np.uint8))
    pool.close()
    with tinyllm.load("stories") as other:
        assert other.model.cache("f16", 1).slot_bytes == 0
        assert other._cache.slots is None


# ---- what sessions mean


def test_forks_share_a_state_and_part(fresh: LLM, truth: F32) -> None:
    slots = fresh._cache.slots
    assert slots is not None
    session = fresh.session()
    session.append(IDS[:100])
    np.testing.assert_array_equal(session.logits, truth[99])
    used = slots.n_used
    forks = [session.fork() for _ in range(5)]
    assert slots.n_used == used, "nothing is copied"
    for i, fork in enumerate(forks):
        fork.append([i, 3])
        np.testing.assert_array_equal(fork.logits, in_calls(fresh, [*IDS[:100], i, 3], [102])[-1])
    session.append(IDS[100:130])
    np.testing.assert_array_equal(session.logits, truth[129])
    for each in (session, *forks):
        each.close()
    assert fresh(IDS[:3], max_tokens=1).tokens
    with fresh._cache.lock:
        fresh._cache.collect()
        assert slots.n_used == 0


def adopted(llm: LLM, ids: Sequence[int]) -> tuple[int, F32]:
    """How many tokens of a text somebody had computed, and its last logits."""
    session = llm.session()
    session.append(ids)
    logits = session.logits
    n = session._sequence.n_adopted
    session.close()
    return n, logits


def test_known_beginnings_are_reused_at_borders(fresh: LLM, truth: F32) -> None:
    assert adopted(fresh, IDS[:300])[0] == 0
    for n, expected in ((330, 256), (300, 256), (270, 256), (256, 0)):  # the last token is computed anyway
        found, logits = adopted(fresh, IDS[:n])
        assert found == expected
        np.testing.assert_array_equal(logits, truth[n - 1])
    # a shorter prompt's last border, which is no multiple of 256
    other = [9, *IDS[1:150]]
    adopted(fresh, other)
    found, logits = adopted(fresh, [*other[:128], 4, 4])
    assert found == 128
    np.testing.assert_array_equal(logits, in_calls(fresh, [*other[:128], 4, 4], [130])[-1])
    assert adopted(fresh, [*other[:127], 4, 4])[0] == 0, "there is no state at 64"


def test_a_talk_goes_on_where_its_last_turn_ended(fresh: LLM) -> None:
    first = fresh(IDS[:70], max_tokens=100)
    tokens = [*IDS[:70], *first.tokens]
    n = len(tokens) // PAGE * PAGE
    found, logits = adopted(fresh, [*tokens, 5, 6])
    assert found >= n - PAGE
    np.testing.assert_array_equal(logits, in_calls(fresh, [*tokens, 5, 6], [len(tokens) + 2])[-1])


def test_a_session_in_a_file_goes_on(fresh: LLM, path: Path, truth: F32, tmp_path: Path) -> None:
    file = tmp_path / "a.session"
    session = fresh.session(seed=3)
    session.append(IDS[:200])
    session.save(file)
    text = session.generate(max_tokens=20)
    with tinyllm.load(path, device="cpu", threads=1) as other:
        restored = other.restore(file)
        np.testing.assert_array_equal(restored.logits, truth[199])
        assert restored.generate(max_tokens=20).tokens == text.tokens
        again = other.restore(file)
        again.append(IDS[200:210])
        np.testing.assert_array_equal(again.logits, truth[209])
    damaged = tmp_path / "b.session"
    damaged.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match="damaged"):
        fresh.restore(damaged)


def be_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guessing, "_fitting", lambda self, grade, most: most)
    monkeypatch.setattr(Guessing, "_left_s", lambda self, plain_s: 1.0)
    monkeypatch.setattr(Costs, "most", lambda self: 1000)


@pytest.mark.parametrize("right", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("max_slots", [2, 3, 64])
def test_guesses_change_no_bit(
    path: Path, right: float, max_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are right, and however few slots there are to go back to."""
    be_eager(monkeypatch)
    with tinyllm.load(path, device="cpu") as llm:
        prompt = IDS[:60]
        for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 4}):
            plain = llm(prompt, max_tokens=90, speculate=None, logprobs=True, **sampling)
            rng = random.Random(7)

            def guess(tokens: list[int], n: int, rng: random.Random = rng, plain: Any = plain) -> list[int]:
                coming = [*prompt, *plain.tokens][len(tokens) : len(tokens) + min(n, 6)]
                return [t if rng.random() < right else (t + 1) % 97 for t in coming]

            llm._cache.slots = Slots(llm._cache.pool, max_slots)  # type: ignore[arg-type]
            llm._cache._reset()
            guessed = llm(prompt, max_tokens=90, speculate=guess, logprobs=True, **sampling)
            assert guessed.tokens == plain.tokens
            assert guessed.logprobs == plain.logprobs


def test_looked_up_guesses_change_no_bit(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    be_eager(monkeypatch)
    prompt = IDS[:30] * 3
    plain = llm(prompt, max_tokens=80, temperature=0, speculate=None)
    assert llm(prompt, max_tokens=80, temperature=0, speculate="lookup").tokens == plain.tokens


def test_right_guesses_save_calls(fresh: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states after guesses are kept, so that none that was right is computed again."""
    be_eager(monkeypatch)
    plain = fresh(IDS[:20], max_tokens=60, temperature=0, speculate=None)
    calls: list[int] = []
    forward = fresh.model.forward

    def counted(tokens: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(tokens))
        return forward(tokens, *rest, **options)

    monkeypatch.setattr(fresh.model, "forward", counted)

    def guess(tokens: list[int], n: int) -> list[int]:
        coming = [*IDS[:20], *plain.tokens][len(tokens) : len(tokens) + 4]
        return [*coming[:2], *((t + 1) % 97 for t in coming[2:])]  # two right, two wrong

    assert fresh(IDS[:20], max_tokens=60, temperature=0, speculate=guess).tokens == plain.tokens
    assert len(calls) <= 2 + 60 // 3, "three tokens a call"
    assert max(calls[1:]) == 5, "the token before, and its guesses"


def test_a_call_that_is_cancelled_spoils_nothing(fresh: LLM, truth: F32) -> None:
    session = fresh.session()
    session.append(IDS[:50])
    np.testing.assert_array_equal(session.logits, truth[49])
    forward = fresh.model.forward

    def stopped(*given: Any, **options: Any) -> Any:
        return forward(*given, **{**options, "should_stop": lambda: True})

    fresh.model.forward = stopped  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(tinyllm.CancelledError):
            session.append(IDS[len(session.tokens) : len(session.tokens) + 1])
    fresh.model.forward = forward  # type: ignore[method-assign]
    np.testing.assert_array_equal(session.logits, truth[len(session.tokens) - 1])
    assert fresh._cache.slots is not None
    assert fresh._cache.slots.n_used == 1


@pytest.mark.parametrize("seed", range(3))
def test_whatever_sessions_do_they_say_the_same(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appending, forking, guessing, closing and saving at random, with few pages and slots, against one call
    for the whole text."""
    be_eager(monkeypatch)
    rng = random.Random(seed)
    with tinyllm.load(path, device="cpu") as llm:
        cache = llm._cache
        cache.max_pages = 40
        cache.slots = Slots(cache.pool, 9, max_unused=4)  # type: ignore[arg-type]
        coming: list[int] = []

        def guess(tokens: list[int], n: int) -> list[int]:
            if coming[: len(tokens)] != tokens:
                return []
            return [t if rng.random() < 0.7 else 3 for t in coming[len(tokens) : len(tokens) + 5]]

        sessions = [llm.session(speculate=guess)]
        for _ in range(60):
            session = rng.choice(sessions)
            what = rng.choice(["append", "append", "fork", "generate", "close", "look"])
            if what == "append" and len(session.tokens) < 300:
                session.append([rng.randrange(3, 97) for _ in range(rng.choice([1, 2, 40, 90]))])
            elif what == "fork" and len(sessions) < 6 and session.tokens:
                sessions.append(session.fork())
            elif what == "generate" and 0 < len(session.tokens) < 300:
                plain = llm(session.tokens, max_tokens=9, temperature=0, speculate=None)
                coming[:] = [*session.tokens, *plain.tokens]
                assert session.generate(max_tokens=9, temperature=0).tokens == plain.tokens
            elif what == "close" and len(sessions) > 1:
                sessions.remove(session)
                session.close()
            elif session.tokens:
                n = len(session.tokens)
                np.testing.assert_array_equal(session.logits, in_calls(llm, session.tokens, [n])[-1])
        for session in sessions:
            session.close()
        with cache.lock:
            cache.collect()
            assert (cache.slots.n_used, cache.n_used) == (0, 0)


def test_many_texts_wait_for_slots(path: Path) -> None:
    with tinyllm.load(path, device="cpu") as llm:
        alone = [llm(IDS[i : i + 20], max_tokens=8, temperature=0).tokens for i in range(6)]
        llm._cache.slots = Slots(llm._cache.pool, 3)  # type: ignore[arg-type]
        llm._cache._reset()
        together = llm([IDS[i : i + 20] for i in range(6)], max_tokens=8, temperature=0)
        assert [one.tokens for one in together] == alone


def test_an_interrupt_amid_the_books_loses_no_slot(fresh: LLM, truth: F32) -> None:
    session = fresh.session()
    session.append(IDS[:70])
    _ = session.logits
    fresh._cache.is_torn = True
    session.append(IDS[70:80])
    np.testing.assert_array_equal(session.logits, truth[79])
    assert fresh._cache.slots is not None
    assert fresh._cache.slots.n_used == 1


# ---- slots by themselves


class Pool:
    """Slots of a byte."""

    def __init__(self, most: int = 1 << 20) -> None:
        self.n_slots, self.slot_bytes, self._most = 0, 1, most

    def grow_slots(self, n_slots: int) -> None:
        if n_slots > self._most:
            raise MemoryError
        self.n_slots = n_slots

    def read_slot(self, slot: int) -> npt.NDArray[np.uint8]:
        raise NotImplementedError

    def write_slot(self, slot: int, content: npt.NDArray[np.uint8]) -> None:
        raise NotImplementedError


def test_slots_without_an_owner_stay_known_until_there_is_need() -> None:
    slots = Slots(Pool(), 3)
    one, two = slots.take(), slots.take()
    slots.keep(b"one", one)
    slots.keep(b"one", two)  # known already
    slots.disown(one)
    slots.disown(two)
    assert slots.find(b"one") == one
    slots.own(one)
    three = slots.take()
    assert three == two, "nobody knew it"
    four = slots.take()
    assert sorted((one, three, four)) == [0, 1, 2]
    with pytest.raises(MemoryLimitError, match="3 are in use"):
        slots.take()
    assert slots.take_if_any() == NONE
    slots.disown(one)
    assert slots.take() == one
    assert slots.find(b"one") == NONE


def test_slots_obey_memory() -> None:
    free = [2]
    slots = Slots(Pool(), 8, free_bytes=lambda: free[0])
    slots.take()
    free[0] = 0
    assert slots.take_if_any() == NONE
    assert Slots(Pool(most=0), 8).take_if_any() == NONE


def test_few_unused_slots_are_kept() -> None:
    slots = Slots(Pool(), 8, max_unused=2)
    for key in (b"a", b"b", b"c"):
        slot = slots.take()
        slots.keep(key, slot)
        slots.disown(slot)
    assert [slots.find(key) == NONE for key in (b"a", b"b", b"c")] == [True, False, False]
    slots.forget(b"b")
    slots.forget(b"never")
    assert slots.find(b"b") == NONE
    assert slots.pool.n_slots == 3


# ---- files


def changed(**changes: Any) -> dict[str, Any]:
    return {**SPEC.config, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["linear_attention"] * 4}, "without a layer of full attention"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 3 + ["sliding_attention"]}, "layer_types"),
        ({"linear_key_head_dim": 24}, "multiples of 16"),
        ({"linear_value_head_dim": 512}, "up to 256"),
        ({"linear_conv_kernel_dim": 9}, "2 to 8"),
        ({"linear_num_value_heads": 5}, "evenly"),
        ({"linear_num_value_heads": -2}, "no sizes"),
        ({"layer_types": None, "full_attention_interval": 0}, "absurd"),
        ({"linear_new_feature": True}, "linear_new_feature"),
    ],
)
def test_what_no_model_has_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((FormatError, UnsupportedError), match=words):
        config_from_json(changed(**changes))


def test_defaults_are_those_of_transformers() -> None:
    keys = ("layer_types", "full_attention_interval", "mtp_num_hidden_layers")
    config = config_from_json({k: v for k, v in SPEC.config.items() if k not in keys})
    assert config.mixers == ("delta", "delta", "delta", "attention")
    assert (config.rope_dim, config.rope_theta, config.gated_attention) == (8, 1e7, True)


def test_a_switched_off_gate_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config_from_json(changed(attn_output_gate=False))
    assert "attn_output_gate" in caplog.text


def vision_config() -> dict[str, Any]:
    text = {k: v for k, v in SPEC.config.items() if k not in ("architectures", "tie_word_embeddings")}
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {**text, "mtp_num_hidden_layers": 1},
        "vision_config": {"depth": 2},
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
        "tie_word_embeddings": False,
    }


def test_the_text_of_a_model_that_sees_loads(
    tmp_path: Path, truth: F32, caplog: pytest.LogCaptureFixture
) -> None:
    """Its towers are left out; its block that guesses tokens is named."""
    folder = write_hf_directory(tmp_path / "m", vision_config(), {})
    weights = {
        name.replace("model.", "model.language_model.", 1): w
        for name, w in random_weights(SPEC.config, SPEC.seed).items()
    }
    extra = {"model.visual.blocks.0.attn.qkv.weight": (8, 8), "mtp.fc.weight": (64, 128)}
    weights |= {name: np.ones(shape, np.float32) for name, shape in extra.items()}
    write_safetensors(folder / "model.safetensors", weights)
    with caplog.at_level(logging.WARNING), tinyllm.load(folder, device="cpu") as llm:
        np.testing.assert_array_equal(llm.logits(IDS[:80])[-1], truth[79])
    assert "mtp.fc.weight" in caplog.text


def test_a_gguf_with_layers_that_guess(tmp_path: Path, truth: F32, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp's converter puts them behind the last layer and counts them."""
    file = tmp_path / "m.gguf"
    weights = random_weights(SPEC.config, SPEC.seed)
    write_gguf(
        file,
        changed(num_hidden_layers=5),
        weights,
        metadata={"qwen35.nextn_predict_layers": 1},
    )

    def add(tensors: dict[str, Any]) -> None:
        tensors["blk.4.nextn.eh_proj.weight"] = (np.ones((64, 128), np.float32), tensors["output.weight"][1])

    with caplog.at_level(logging.WARNING), tinyllm.load(rewritten(file, add), device="cpu") as llm:
        assert llm.config.n_layers == 4
        difference = np.abs(llm.logits(IDS[:80])[-1] - truth[79]).max()
        assert difference < 1e-4 * np.abs(truth[79]).max()
    assert "blk.4.nextn.eh_proj.weight" in caplog.text


def test_a_quantized_file_means_its_numbers(tmp_path: Path) -> None:
    """Q8_0, all heads in llama.cpp's order: near the floats."""
    spec = Spec("q8", 3, 90, changed(hidden_size=128, intermediate_size=128, num_hidden_layers=4))
    weights = random_weights(spec.config, spec.seed)
    write_gguf(tmp_path / "f32.gguf", spec.config, weights)
    write_gguf(tmp_path / "q8.gguf", spec.config, weights, format="Q8_0")
    found = []
    for name in ("f32", "q8"):
        with tinyllm.load(tmp_path / f"{name}.gguf", device="cpu") as llm:
            found.append(llm.logits(IDS[:90]))
    assert 0 < np.abs(found[0] - found[1]).max() < 0.15 * np.abs(found[0]).max()


def test_weights_are_quantized_while_loading(path: Path) -> None:
    with tinyllm.load(path, device="cpu", weights="q8_0") as llm:
        np.testing.assert_array_equal(llm.logits(IDS[:70])[-1], in_calls(llm, IDS[:70], [30, 40])[-1])


def test_adapters_are_refused_by_name(path: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]})
    )
    stem = "base_model.model.model.layers.3.self_attn.o_proj.lora_"
    pair = {stem + "A.weight": np.ones((2, 128), "f4"), stem + "B.weight": np.ones((64, 2), "f4")}
    write_safetensors(adapter / "adapter_model.safetensors", pair)
    with tinyllm.load(path, device="cpu") as llm, pytest.raises(UnsupportedError, match="Gated DeltaNet"):
        llm.add_adapter("one", adapter)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_gpus_are_refused_by_name(path: Path, device: str) -> None:
    with pytest.raises(UnsupportedError, match="Gated DeltaNet, which only the CPU"):
        tinyllm.load(path, device=device)


def test_writing_a_gguf_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    from tinyllm.quantization import quantize

    with pytest.raises(UnsupportedError, match="linear attention"):
        quantize(path, tmp_path / "out.gguf", "q8_0")


def test_memory_counts_states(llm: LLM) -> None:
    config, slots = llm.config, llm._cache.slots
    assert slots is not None
    assert slots.pool.slot_bytes == 4 * config.state_floats == llm._cache.pool.slot_bytes  # type: ignore[attr-defined]
    pages = cache_bytes(config, "f16", 512) - 2 * slots.pool.slot_bytes
    assert pages == 512 // PAGE * backends.page_bytes(config, "f16")
    assert BORDER % PAGE == 0
