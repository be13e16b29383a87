"""A real Ray cluster on this machine: the same bits on it as in one process, whatever is killed meanwhile.
Skipped where ray is not installed."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import in_process

import tinyllm
import tinyllm.ray
from tinyllm.batch import row_seed
from tinyllm.cli import batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[data,serve]'")

# What Ray and its packages warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = "llamacpp:tokens_predicted_total"
PROMPT = "Once upon a time there was a little dog who lived in a house. " * 6


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One node, with a home of its own: a start writes a token there."""
    home = tmp_path_factory.mktemp("home")
    changed = {
        "HOME": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(Path(tinyllm.__file__).parents[1]), os.environ.get("PYTHONPATH")))
        ),
        "PYTHONWARNINGS": "ignore",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine takes longer than the usual 5
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    settings = {"include_dashboard": False, "log_to_driver": False}
    try:
        ray.init(address="local", num_cpus=4, object_store_memory=200 << 20, **settings)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@pytest.fixture(scope="module")
def whole() -> tinyllm.LLM:
    return tinyllm.load("stories", device="cpu", threads=1)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers_here(title: str) -> list[int]:
    """Processes of this cluster whose title has that word; Ray's own list takes a dashboard."""
    parents, found = {}, []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "stat").read_text().rsplit(")", 1)[1].split()
                name = (process / "cmdline").read_bytes().decode("utf-8", "replace")
            except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                continue
            parents[int(process.name)] = int(words[1])
            if name.startswith("ray::") and title in name:
                found.append(int(process.name))

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid in found if is_ours(pid)]


# One model in stages


def test_stages_in_actors(whole: tinyllm.LLM) -> None:
    with tinyllm.ray.load("stories", stages=2, threads=1, patience_s=60) as llm:
        facts = llm.model.facts  # type: ignore[attr-defined]
        assert len({fact["pid"] for fact in facts} | {os.getpid()}) == 3
        one = whole(PROMPT, seed=1, max_tokens=30, logprobs=True)
        other = llm(PROMPT, seed=1, max_tokens=30, logprobs=True)
        assert (one.text, one.logprobs) == (other.text, other.logprobs)

        stream = llm.stream(PROMPT, max_tokens=250, seed=2)
        for _ in range(5):
            next(stream)
        os.kill(facts[1]["pid"], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(tinyllm.LostError, match=r"stage 1 of 2 \(layers 2 to 3\) is gone"):
            list(stream)
        assert time.monotonic() - started < 15
        again = llm(PROMPT, seed=1, max_tokens=30, logprobs=True)  # waits for the stage, and computes anew
        assert (one.text, one.logprobs) == (again.text, again.logprobs)
        assert llm.model.facts[1]["pid"] != facts[1]["pid"]  # type: ignore[attr-defined]


def test_what_is_wrong_is_said_before_places_are_asked_for() -> None:
    """More than the cluster has: with a place asked for first, each would wait for minutes."""
    started = time.monotonic()
    with pytest.raises(tinyllm.NotFoundError):
        tinyllm.ray.load("/no/such/model.gguf", stages=2, cpus=64)
    with pytest.raises(tinyllm.ArgumentError, match="4 layers"):
        tinyllm.ray.load("stories", stages=5, cpus=64)
    with pytest.raises(tinyllm.ArgumentError, match=r"1 \+ 2 layers, the model 4"):
        tinyllm.ray.load("stories", layers=[1, 2], cpus=64)
    assert time.monotonic() - started < 60


# Many prompts


def rows(n: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "prompt": f"{i} dogs", "max_tokens": 20, "temperature": None, **more}
        for i in range(n)
    ]


def expected(whole: tinyllm.LLM, n: int) -> dict[str, str]:
    made = (whole(f"{i} dogs", max_tokens=20, seed=row_seed(3, f"r{i}")) for i in range(n))
    return {f"r{i}": completion.text for i, completion in enumerate(made)}


def test_a_dataset_with_a_worker_that_is_killed(whole: tinyllm.LLM, tmp_path: Path) -> None:
    """Each worker says its process; one is killed when its first rows are there."""
    items = [*rows(40), {"id": "bad", "prompt": "x", "max_tokens": -1, "temperature": None}]
    dataset = tinyllm.ray.generate(
        ray.data.from_items(items), "stories", workers=2, seed=3, at_once=2, device="cpu", threads=1
    )
    found: dict[str, dict[str, Any]] = {}
    killed = False
    for row in dataset.iter_rows():
        assert row["id"] not in found
        found[row["id"]] = row
        if not killed:
            killed = True
            os.kill(workers_here("MapWorker")[0], signal.SIGKILL)
    assert killed
    bad = found.pop("bad")
    assert "max_tokens is -1" in bad["error"]
    assert bad["text"] is None
    assert {key: row["text"] for key, row in found.items()} == expected(whole, 40)
    assert all(row["error"] is None and row["seed"] == row_seed(3, row["id"]) for row in found.values())


def test_the_command_on_the_cluster(
    whole: tinyllm.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, outs = tmp_path / "in.jsonl", [tmp_path / "here.jsonl", tmp_path / "there.jsonl"]
    lines = [*rows(12), {"id": "bad"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    cli = in_process(batch.main, monkeypatch, capsys, "stories", str(source))
    common = ("--seed", "3", "--device", "cpu", "-t", "1")
    assert cli(outs[0], *common).code == 1
    assert cli(outs[1], *common, "--ray", "auto", "--workers", "2", "--at-once", "2").code == 1
    made = [
        {line["id"]: line for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
        for out in outs
    ]
    assert made[0] == made[1]
    assert {key: line["text"] for key, line in made[1].items() if key != "bad"} == expected(whole, 12)
    outs[1].write_bytes(b"".join(outs[1].read_bytes().splitlines(keepends=True)[:7]))
    done = cli(outs[1], *common, "--ray", "auto")
    assert "6 of 13 rows done, 7 were there before" in done.err


# Many users


def test_replicas_answer_as_one_server(whole: tinyllm.LLM) -> None:
    httpx = pytest.importorskip("httpx")
    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": 8719})
    try:
        serve.run(
            tinyllm.ray.application("stories", name="m", replicas=2, api_key="k", device="cpu", threads=1),
            name="llm",
        )
        with httpx.Client(
            base_url="http://127.0.0.1:8719",
            headers={"authorization": "Bearer k"},
            timeout=60,
            trust_env=False,
        ) as client:
            asked = {"model": "m", "prompt": PROMPT, "max_tokens": 20, "seed": 4}
            text = whole(PROMPT, max_tokens=20, seed=4).text
            for _ in range(3):
                assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == text
            with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
                events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
            assert events[-1] == "[DONE]"
            parts = [json.loads(event)["choices"] for event in events[:-1]]
            assert "".join(choices[0]["text"] for choices in parts if choices) == text
            assert len(parts) > 3
            assert client.post("/v1/completions", json={**asked, "model": "x"}).status_code == 404
            assert client.get("/v1/models", headers={"authorization": "Bearer z"}).status_code == 401
            # What begins alike goes to one replica: the second time it has the beginning, whichever it is.
            for i in range(6):
                body = {**asked, "prompt": f"{i} cats. {PROMPT}"}
                done = [client.post("/v1/completions", json=body).json()["usage"] for _ in range(2)]
                assert done[1]["prompt_tokens_details"]["cached_tokens"] >= 64

            # A client that leaves ends its texts, on the replica that its request, and one for metrics with
            # the same beginning, go to.
            n, most = 8, 300
            long = {**asked, "n": n, "max_tokens": most, "min_tokens": most, "stream": True}

            def written() -> float:
                """Tokens of texts that are over."""
                lines = client.request("GET", "/metrics", json=long).text.splitlines()
                return sum(float(line.split()[-1]) for line in lines if line.startswith(TOKENS))

            before = written()
            with client.stream("POST", "/v1/completions", json=long) as answer:
                assert answer.status_code == 200
                next(answer.iter_lines())
            until(lambda: written() > before)
            assert written() - before < n * most
    finally:
        serve.shutdown()
