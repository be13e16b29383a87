"""tinyllm-serve, the command; which models are loaded when; and who is computed when.

What an answer looks like is for the tests of the dialects.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_cli import Cli, in_process
from helpers_serve import TEMPLATE, write_chat_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import tinyllm
from tinyllm import backends
from tinyllm.cli import serve
from tinyllm.errors import ArgumentError, MemoryLimitError, ModelClosedError
from tinyllm.loading import needed_bytes
from tinyllm.modelfiles import read_model
from tinyllm.server import models as server_models
from tinyllm.server.ask import Refusal
from tinyllm.server.listen import BindError, bind, url_of
from tinyllm.server.models import Loader, Models, held_bytes
from tinyllm.server.turns import Turns

SERVE = [sys.executable, "-W", "error", "-m", "tinyllm.cli.serve"]
CHAT = "/v1/chat/completions"
HTTP = httpx.Client(verify=False, timeout=60)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.delenv("TINYLLM_API_KEY", raising=False)
    return in_process(serve.main, monkeypatch, capsys)


# --- the command


class Process:
    """tinyllm-serve on a free port."""

    def __init__(self, *options: str, **env: str) -> None:
        self.popen = subprocess.Popen(
            [*SERVE, *options, "--port", "0"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | env,
            text=True,
        )
        self.lines: list[str] = []
        assert self.popen.stderr is not None
        while not (match := re.search(r" on (http://\S+)$", line := self.popen.stderr.readline())):
            assert line, self.lines
            self.lines.append(line)
        self.url = match[1]

    def ended(self) -> tuple[int, str]:
        """Its exit code and the rest of what it says."""
        out, err = self.popen.communicate(timeout=60)
        assert out == "", "everything about the work goes to stderr"
        return self.popen.returncode, err


@contextmanager
def process(*options: str, **env: str) -> Iterator[Process]:
    it = Process(*options, **env)
    try:
        yield it
    finally:
        if it.popen.poll() is None:
            it.popen.kill()
            it.popen.communicate()


def test_stories_at_once(tmp_path: Path) -> None:
    """Under -W error: a warning would be an exception, and an exception a line."""
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    hello = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "model": "stories"}
    with (
        process("stories", "--chat-template", str(template)) as it,
        httpx.Client(base_url=it.url, verify=False) as client,
    ):
        assert client.get("/v1/models").json()["data"][0]["id"] == "stories"
        assert client.post(CHAT, json=hello).json()["usage"]["completion_tokens"] == 5
        assert client.post(CHAT, json=hello | {"stream": True}).text.endswith("data: [DONE]\n\n")
        with client.stream("POST", CHAT, json=hello | {"stream": True, "max_tokens": 400}) as stream:
            next(stream.iter_lines())
        assert client.post(CHAT, content=b"rubbish").status_code == 400
        it.popen.send_signal(signal.SIGTERM)
        code, err = it.ended()
    assert code == 0
    assert re.fullmatch(r"(ending: 1 request may .*\n)?", err), "nothing but that one was still ending"


@contextmanager
def reading(url: str, key: str = "") -> Iterator[bytearray]:
    """What comes of a long stream, which has begun; all of it at the end."""
    data, begun = bytearray(), threading.Event()
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 600,
        "min_tokens": 600,
        "stream": True,
    }

    def read() -> None:
        headers = {"x-api-key": key}
        with (
            suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", url + CHAT, json=body, timeout=60, headers=headers) as response,
        ):
            for part in response.iter_bytes():
                data.extend(part)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    yield data
    reader.join(60)


def test_a_folder_is_served_and_its_answers_finish_at_the_end(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_chat_model(tmp_path / f"{name}.gguf")
    with process("--models", str(tmp_path), "--keep-alive", "0", "--context", "2048") as it:
        assert it.lines == [], "nothing is loaded"
        assert [m["id"] for m in HTTP.get(it.url + "/v1/models").json()["data"]] == ["one", "two"]
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "model": "two"}
        assert HTTP.post(it.url + CHAT, json=body).json()["model"] == "two"
        with reading(it.url) as data:
            it.popen.send_signal(signal.SIGTERM)
            code, err = it.ended()
    assert code == 0
    assert '"finish_reason":"length"' in data.decode()
    said = [line for line in err.splitlines() if not line.startswith("context 2048 is more than")]
    assert re.fullmatch("loaded two", said[0].partition(" in ")[0])
    assert set(said[1:]) >= {"ending: 1 request may go on for 30.0 s; Ctrl-C ends now"}
    assert "Traceback" not in err


def test_another_host_needs_a_key_and_the_end_cuts_answers_off(tmp_path: Path) -> None:
    model, key = write_chat_model(tmp_path / "chat.gguf"), {"TINYLLM_API_KEY": "k-123"}
    with process(str(model), "--host", "0.0.0.0", "--grace", "0.1", "--context", "2048", **key) as it:
        url = it.url.replace("0.0.0.0", "127.0.0.1")
        assert HTTP.get(url + "/v1/models").status_code == 401
        assert HTTP.get(url + "/v1/models", headers={"x-api-key": "k-123"}).status_code == 200
        assert "k-123" not in Path(f"/proc/{it.popen.pid}/cmdline").read_text()
        with reading(url, "k-123") as data:
            it.popen.send_signal(signal.SIGTERM)
            code, err = it.ended()
    assert code == 0
    assert '"code":"closing"' in data.decode()
    assert "Traceback" not in err


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "chat.gguf")
    with process(str(model), "--context", "2048") as it, reading(it.url):
        it.popen.send_signal(signal.SIGINT)
        assert it.popen.stderr is not None
        assert "ending: 1 request may go on for" in it.popen.stderr.readline()
        it.popen.send_signal(signal.SIGINT)
        assert it.ended() == (130, "tinyllm-serve: interrupted\n")


def test_help_is_instant_and_names_every_option(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys\nfrom tinyllm.cli.serve import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'starlette', 'uvicorn', 'tinyllm.llm') if m in sys.modules])"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert text.endswith("[]\n")
    options = """--name --model --models --memory-limit --keep-alive --chat-template -c -t --device
        --cache-type --weights --host --port --parallel --queue --grace --api-key --no-auth
        --allowed-host --cors --allow-templates --log-prompts --stages --ray"""
    for option in options.split():
        assert re.search(rf"(?m)^  .*{option}\b", text), option
    for n in ("0", "1", "2", "130"):
        assert re.search(rf"(?m)^  {n} +\w", text)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "which model"),
        ("--name x", "which model"),
        ("stories --model x", "'x' is not NAME=PATH"),
        ("stories --model =x", "is not NAME=PATH"),
        ("stories --model stories=stories", "two models are called stories, stories and stories"),
        ("--model a=stories --name x", "--name is for MODEL"),
        ("stories --models /nowhere", "/nowhere: no such folder"),
        ("stories --port 70000", "'70000' is no port"),
        ("stories --port -1", "port"),
        ("stories --parallel 0", "1 or more"),
        ("stories --queue -1", "queue"),
        ("stories --keep-alive soon", "is no time such as"),
        ("stories --memory-limit lots", "is no size such as"),
        ("stories --memory-limit 0", "is no size such as"),
        ("stories --api-key=", "a key is one or more characters of ASCII"),
        ("stories --api-key ä", "a key is one or more characters of ASCII"),
        ("stories --host 0.0.0.0", "whoever reaches 0.0.0.0 could use this server: give --api-key"),
        ("stories --bogus", "unrecognized arguments: --bogus"),
        ("stories --ray auto", "--ray is the cluster of --stages: say how many"),
        ("stories --stages 0", "--stages"),
        ("stories --stages 2 --model a=stories", "--stages are of one MODEL"),
        ("--models /tmp --stages 2", "--stages are of one MODEL"),
        ("stories --stages 2 --draft stories", "--draft is not for a model in stages"),
        ("stories --stages 2 --memory-limit 1GB", "--memory-limit is not for a model in stages"),
        ("stories --stages 2 --name m --lora a=x", "--lora is not for a model in stages"),
    ],
)
def test_usage_errors_are_one_line_and_2(cli: Cli, argv: str, words: str) -> None:
    result = cli(*argv.split())
    assert (result.code, result.out) == (2, "")
    assert words in result.err
    assert result.err.count("\n") == 1


def test_stages_without_ray_say_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = cli("stories", "--stages", "2", "--port", "0")
    assert (result.code, result.out) == (1, "")
    assert "more than one machine needs ray: " in result.err
    assert "pip install" in result.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("/nowhere.gguf", "/nowhere.gguf: no such file"),
        ("stories --model a=/nowhere.gguf", "/nowhere.gguf: no such file"),
        ("stories --host no.such.host.invalid --no-auth", "no.such.host.invalid port 8080"),
        ("stories --memory-limit 1MB --port 0", "more than the 1.00 MB that this server may hold"),
    ],
)
def test_other_errors_are_one_line_and_1(cli: Cli, argv: str, words: str) -> None:
    result = cli(*argv.split())
    assert (result.code, result.out) == (1, "")
    assert words in result.err
    assert result.err.count("\n") == 1


def test_a_port_in_use_is_told_before_the_model_is_loaded(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_models.tinyllm, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cli("stories", "--port", str(port))
    assert result.code == 1
    assert result.err == f"tinyllm-serve: 127.0.0.1 port {port}: Address already in use\n"


def test_a_model_that_is_none_is_told_at_start(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("<html>")
    result = cli(str(tmp_path / "x.gguf"), "--port", "0")
    assert result.code == 1
    assert "it is a web page" in result.err


@pytest.mark.parametrize("name", ["uvicorn", "starlette", "prometheus_client"])
def test_without_the_extra_one_line_says_what_to_install(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in [m for m in sys.modules if m.startswith("tinyllm.server") or m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    result = cli("stories", "--port", "0")
    assert result.code == 1
    assert "--help" not in result.err, "the command was typed well"
    assert f"the server needs {name}: pip install starlette uvicorn" in result.err
    assert result.err.count("\n") == 1


def test_another_host_without_a_key_takes_a_word(cli: Cli) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        result = cli("stories", "--host", "0.0.0.0", "--no-auth", "--port", str(taken.getsockname()[1]))
    assert "already in use" in result.err, "it came as far as that"


@pytest.mark.parametrize(
    ("host", "address", "url"),
    [
        ("localhost", "127.0.0.1", "http://localhost:"),
        ("::1", "::1", "http://[::1]:"),
        ("127.0.0.1", "127.0.0.1", "http://127.0.0.1:"),
    ],
)
def test_where_it_listens(host: str, address: str, url: str) -> None:
    try:
        listener = bind(host, 0)
    except BindError:
        pytest.skip(f"this machine has no {host}")
    with listener, socket.create_connection(listener.getsockname()[:2]) as client:
        assert client.getpeername()[0] in (address, "::1")
        assert url_of(listener, host) == f"{url}{listener.getsockname()[1]}"
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("0", 0), ("90", 90), ("1.5s", 1.5), ("250ms", 0.25), ("-1", math.inf)],
)
def test_durations(text: str, seconds: float) -> None:
    assert serve._duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "n"),
    [("1000", 1000), ("2k", 2000), ("16GB", 16 * 10**9), ("1.5g", 15 * 10**8), ("1MiB", 1 << 20)],
)
def test_sizes(text: str, n: int) -> None:
    assert serve._bytes(text) == n


def test_a_folder_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "b.gguf",
        "a-00001-of-00002.gguf",
        "a-00002-of-00002.gguf",
        "mmproj-b-f16.gguf",
        "readme.txt",
        "hf/config.json",
        "other/file",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    args = serve._parser().parse_args(["--models", str(tmp_path), "--model", "c=stories"])
    assert serve._paths(args) == {
        "c": "stories",
        "a": str(tmp_path / "a-00001-of-00002.gguf"),
        "b": str(tmp_path / "b.gguf"),
        "hf": str(tmp_path / "hf"),
    }
    assert capsys.readouterr().err == (
        "mmproj-b-f16.gguf is left out: it reads images for a model, which is not supported\n"
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").touch()
    with pytest.raises(serve.UsageError, match=r"two models are called b, .*b and .*b\.gguf"):
        serve._paths(args)
    with pytest.raises(serve.UsageError, match=r"no \.gguf file and no folder"):
        serve._paths(serve._parser().parse_args(["--models", str(tmp_path / "other")]))


# --- models


class Loads:
    """A load that notes what is loaded, closed, and how much all have at most."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, path: str, **options: Any) -> tinyllm.LLM:
        self.log.append(f"+{Path(path).stem}")
        llm = tinyllm.load(path, context=512, **options)
        close = llm.close

        def noted() -> None:
            self.log.append(f"-{Path(path).stem}")
            close()

        llm.close = noted  # type: ignore[method-assign]
        return llm

    def needed(self, path: str) -> int:
        return needed_bytes(read_model(path), context=512)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: str(write_chat_model(folder / f"{name}.gguf")) for name in "abc"}


STEP = 64 << 20


def limited(files: dict[str, str], loads: Loads, n: int, **options: Any) -> Models:
    """Room for n models with the first step of their caches, and for half of one without."""
    with tinyllm.load(files["a"], context=512) as llm:
        limit = n * (llm.model.weight_bytes + STEP) + loads.needed(files["a"]) // 2
    return Models(files, loads, needed=loads.needed, memory_limit=limit, **options)


async def touch(models: Models, name: str) -> None:
    async with models.use(name) as llm:
        stream = llm.astream("Once", max_tokens=2)
        assert len((await stream.rest())[0].tokens) <= 2


def test_models_are_loaded_when_asked_for_and_go_in_the_order_of_use(files: dict[str, str]) -> None:
    loads = Loads()

    async def work() -> None:
        models = limited(files, loads, 2)
        for name in "abaca":
            await touch(models, name)
            held = sum(served.n_bytes for served in models.served.values())
            assert held <= (models._memory_limit or 0)
        await models.close()

    asyncio.run(work())
    assert loads.log == ["+a", "+b", "-b", "+c", "-a", "-c"]
    assert backends.live_allocations() == (0, 0)


def test_a_model_in_use_is_not_unloaded(files: dict[str, str]) -> None:
    loads = Loads()

    async def work() -> None:
        models = limited(files, loads, 1)
        async with models.use("a") as llm:
            with pytest.raises(MemoryLimitError, match=r"the models that are in use take .* come back later"):
                await touch(models, "b")
            assert len((await llm.astream("Once", max_tokens=2).rest())[0].tokens) == 2
            assert not await models.unload(models.find("a"))
        await touch(models, "b")
        await models.close()

    asyncio.run(work())
    assert loads.log == ["+a", "-a", "+b", "-b"]


def test_a_model_larger_than_the_limit_is_refused_before_anything_is_loaded(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads()
    models = limited(files, loads, 0)
    monkeypatch.setattr(backends, "Model", None)

    async def work() -> None:
        with pytest.raises(
            MemoryLimitError, match=r"a takes .* at least, more than the .* \(--memory-limit\)"
        ):
            await touch(models, "a")
        assert models.find("a").reserved == 0
        with pytest.raises(MemoryLimitError, match="a takes"):
            models.load_now("a")

    asyncio.run(work())
    assert loads.log == []


def test_a_model_too_large_unloads_nothing(files: dict[str, str]) -> None:
    loads = Loads()

    async def work() -> None:
        models = limited(files, loads, 1)
        await touch(models, "a")
        needed = loads.needed
        models._needed = lambda path: needed(path) * 100
        with pytest.raises(MemoryLimitError, match="more than the"):
            await touch(models, "b")
        assert models.find("a").llm is not None
        await models.close()

    asyncio.run(work())


def test_caches_grow_within_the_limit_alone(files: dict[str, str]) -> None:
    """A cache grows by steps of 64 MB; the second one finds no room, and texts wait or are refused."""
    loads = Loads()

    async def work() -> None:
        models = limited(files, loads, 1)
        limit = models._memory_limit or 0
        async with models.use("a") as llm:
            pages = llm.cache_pages
            assert llm.model.weight_bytes + pages.most * pages.page_bytes <= limit
            streams = [llm.astream([1] * 400, max_tokens=40, min_tokens=40, seed=i) for i in range(12)]
            await asyncio.wait_for(asyncio.gather(*(stream.rest() for stream in streams)), 60)
            assert held_bytes(llm) <= limit
        await models.close()

    asyncio.run(work())


def test_the_machine_runs_out_before_the_limit(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then those go, too, that nobody uses."""
    loads = Loads()

    async def work() -> None:
        models = Models(files, loads)
        await touch(models, "a")
        few = loads.needed(files["a"]) // 2
        monkeypatch.setattr(backends, "free_memory", lambda: few if models.find("a").llm else 1 << 40)
        await touch(models, "b")
        assert models.find("a").llm is None
        monkeypatch.setattr(backends, "free_memory", lambda: few)
        async with models.use("b"):
            with pytest.raises(MemoryLimitError, match=r"^c does not fit into the memory that is free"):
                await touch(models, "c")
        await models.close()

    asyncio.run(work())


def test_a_model_goes_after_its_time(files: dict[str, str]) -> None:
    loads = Loads()

    async def work() -> None:
        models = Models(files, loads, keep_alive_s=0.05)
        models.find("b").keep_alive_s = math.inf
        reaper = asyncio.create_task(models.reap())
        await touch(models, "a")
        await touch(models, "b")
        async with models.use("c"):
            end = time.monotonic() + 20
            while models.find("a").llm is not None and time.monotonic() < end:
                await asyncio.sleep(0.02)
            assert models.find("b").llm is not None
            assert models.find("c").llm is not None, "it is in use"
        reaper.cancel()
        await models.close()

    asyncio.run(work())
    assert loads.log.index("-a") < loads.log.index("-b"), "b is closed at the end"


def test_many_ask_at_once_and_one_loads(files: dict[str, str]) -> None:
    """In all orders, under a limit for one: no two wait for each other."""
    loads = Loads()

    async def one(models: Models, name: str) -> None:
        while True:
            try:
                await touch(models, name)
                return
            except MemoryLimitError:
                await asyncio.sleep(0.01)

    async def work() -> None:
        models = limited(files, loads, 1, keep_alive_s=0)
        reaper = asyncio.create_task(models.reap())
        await asyncio.wait_for(asyncio.gather(*(one(models, name) for name in "abcabcaabbcc")), 60)
        reaper.cancel()
        await models.close()

    asyncio.run(work())
    assert backends.live_allocations() == (0, 0)


def test_who_goes_while_a_model_is_loaded_breaks_nothing_off(files: dict[str, str]) -> None:
    loads = Loads()

    async def work() -> None:
        models = Models(files, loads)
        asking = [asyncio.create_task(touch(models, "a")) for _ in range(3)]
        await asyncio.sleep(0)
        asking[0].cancel()
        assert [type(r) for r in await asyncio.gather(*asking, return_exceptions=True)] == [
            asyncio.CancelledError,
            type(None),
            type(None),
        ]
        assert models.find("a").users == 0
        await models.close()
        with pytest.raises(ModelClosedError):
            await touch(models, "a")

    asyncio.run(work())
    assert loads.log == ["+a", "-a"]


def test_models_are_closed_while_one_is_loaded(files: dict[str, str]) -> None:
    loads = Loads()

    async def work() -> None:
        models = Models(files, loads)
        asking = asyncio.create_task(touch(models, "a"))
        await asyncio.sleep(0.001)
        await models.close()
        with pytest.raises(ModelClosedError):
            await asking

    asyncio.run(work())
    assert backends.live_allocations() == (0, 0)


def test_names_are_looked_up_and_nothing_else(files: dict[str, str]) -> None:
    models = Models(files, Loads())
    assert models.find(None).name == models.find("a:latest").name == "a"
    for name in ("", "A", "a/", files["a"], "a:latest:latest", "x" * 1000):
        with pytest.raises(Refusal) as refused:
            models.find(name)
        assert refused.value.status == 404
        assert len(refused.value.message) < 200


def test_the_loader_takes_a_template_for_a_path(files: dict[str, str]) -> None:
    loader = Loader({"stories": "{{ messages[0].content }}"}, context=128, cache_type="f16")
    with loader("stories") as llm:
        assert llm.chat_template is not None
        assert llm.context == 128
        ids = llm.chat_ids([{"role": "user", "content": "Hello"}])
        assert llm.tokenizer is not None
        assert llm.tokenizer.decode(ids).strip() == "Hello"
        needed = loader.needed("stories")
        assert llm.model.weight_bytes < needed < llm.model.weight_bytes + STEP * 2
    with loader(files["a"]) as llm:
        assert llm.chat_template is not None
        assert "im_start" in llm.chat_template.source


# --- turns


class TurnsMachine(RuleBasedStateMachine):
    """Requests that come, wait, are computed, go at any moment, and a server that ends. The loop runs a step
    at a time, so that a request may be cancelled between any two."""

    PARALLEL, QUEUE = 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.turns = Turns(self.PARALLEL, self.QUEUE)
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.sizes: dict[int, int] = {}
        self.leaving: dict[int, asyncio.Event] = {}
        self.inside: list[int] = []
        self.entered: set[int] = set()
        self.gone: set[int] = set()
        self.overtakers: list[int] = []
        self.refused: dict[int, int] = {}

    def step(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))

    async def request(self, i: int, n: int) -> None:
        try:
            async with self.turns.turn(n):
                self.inside.append(i)
                self.entered.add(i)
                if self.overtakes(i):
                    self.overtakers.append(i)
                try:
                    await self.leaving[i].wait()
                finally:
                    self.inside.remove(i)
        except Refusal as refusal:
            self.refused[i] = refusal.status

    def overtakes(self, i: int) -> bool:
        """Whether one who came before i has no place yet. One who has it may wake up after i."""
        out = self.entered | self.gone | self.refused.keys()
        earlier = [j for j in self.sizes if j < i and j not in out]
        return sum(self.sizes[j] for j in (*self.inside, *earlier)) > self.turns.running

    @rule(n=st.integers(1, 4))
    def arrives(self, n: int) -> None:
        i = len(self.sizes)
        self.sizes[i], self.leaving[i] = n, asyncio.Event()
        self.tasks[i] = self.loop.create_task(self.request(i, n))

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        self.leaving[data.draw(st.sampled_from(self.inside))].set()

    @precondition(lambda self: any(not task.done() for task in self.tasks.values()))
    @rule(data=st.data())
    def goes(self, data: st.DataObject) -> None:
        live = [i for i, task in self.tasks.items() if not task.done()]
        i = data.draw(st.sampled_from(live))
        self.gone.add(i)
        self.tasks[i].cancel()

    @rule(n=st.integers(1, 3))
    def time_passes(self, n: int) -> None:
        for _ in range(n):
            self.step()

    @precondition(lambda self: len(self.sizes) > 5)
    @rule()
    def closes(self) -> None:
        self.turns.close()

    @invariant()
    def never_too_many(self) -> None:
        assert sum(self.sizes[i] for i in self.inside) <= self.turns.running <= self.PARALLEL
        assert self.turns.waiting <= self.QUEUE

    @invariant()
    def first_come_first_served(self) -> None:
        assert not self.overtakers

    def teardown(self) -> None:
        """Everybody leaves, those who wait get in, and all places are there again."""
        for event in self.leaving.values():
            event.set()
        for _ in range(8 * len(self.tasks) + 8):
            self.step()
        for i, task in self.tasks.items():
            assert task.done(), "somebody waits for ever"
            if not task.cancelled():
                task.result()
                refused = self.refused.get(i)
                assert (i in self.entered) != (refused is not None)
                assert (refused == 400) == (self.sizes[i] > self.PARALLEL and refused != 503)
                assert refused in (None, 400, 429, 503)
                assert refused != 503 or self.turns.is_closed
        assert (self.turns.running, self.turns.waiting) == (0, 0)
        self.loop.close()


TestTurns = TurnsMachine.TestCase
TestTurns.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_the_guess_of_when_to_come_back_follows_what_requests_take() -> None:
    async def work() -> None:
        turns = Turns(1, 0)

        async def refused() -> int:
            with pytest.raises(Refusal) as refusal:
                async with turns.turn():
                    pass
            assert refusal.value.status == 429
            assert refusal.value.retry_after is not None
            return refusal.value.retry_after

        async with turns.turn():
            assert await refused() == 1
        turns._usual_s = 42.4
        async with turns.turn():
            assert await refused() == 43
        turns._usual_s = 1e6
        async with turns.turn():
            assert await refused() == 600

    asyncio.run(work())


def test_arguments_of_the_limit_of_memory_reach_load(files: dict[str, str]) -> None:
    """`load` keeps to what `free_memory` says, in its context and in its cache."""
    needed = needed_bytes(read_model(files["a"]), context=512)
    with tinyllm.load(files["a"], free_memory=lambda: 2 * needed) as llm:
        pages = llm.cache_pages
        assert pages.used == pages.allocated == 0
        assert llm.model.weight_bytes + pages.most * pages.page_bytes < 2 * needed
        llm("Once", max_tokens=2)
        assert llm.cache_pages.allocated == pages.most
    with pytest.raises(MemoryLimitError):
        tinyllm.load(files["a"], free_memory=lambda: needed // 2)
    with pytest.raises(ArgumentError):
        needed_bytes(read_model(files["a"]), context=1 << 40)
