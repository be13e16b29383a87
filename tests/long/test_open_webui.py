"""The real Open WebUI in front of the server, both ways that it can be set up: the list of models, a streamed
conversation and a title over its own API, and a conversation typed into its page.

TINYLLM_OPEN_WEBUI names the Python of an environment with the package open-webui, which wants Python 3.11 or
3.12 and some GB; skipped by name without. It starts up to a minute; nothing is reached but this machine.
`pytest tests/long/test_open_webui.py`
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers_browser import chromium
from helpers_serve import Running, Says, serving, write_chat_model

SAID = "A lighthouse tells ships where the land is."
QUESTION = "What is a lighthouse for?"
TITLE = '{ "title": "The lighthouse" }'
START_S = 240.0
WAYS = {
    "openai": {"OPENAI_API_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "none", "ENABLE_OLLAMA_API": "False"},
    "ollama": {"OLLAMA_BASE_URL": "{url}", "ENABLE_OPENAI_API": "False"},
}
ALONE = {  # it downloads nothing and tells nobody
    "OFFLINE_MODE": "True",
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",
    "ENABLE_VERSION_UPDATE_CHECK": "False",
    "SCARF_NO_ANALYTICS": "true",
    "DO_NOT_TRACK": "true",
    "ANONYMIZED_TELEMETRY": "false",
}


@dataclass
class WebUI:
    """One that runs. model: what it calls ours."""

    url: str
    model: str
    client: httpx.Client
    says: Says


@pytest.fixture(scope="module", params=WAYS)
def webui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    python = os.environ.get("TINYLLM_OPEN_WEBUI")
    if not python:
        pytest.skip("TINYLLM_OPEN_WEBUI names no Python with open-webui")
    folder, says = tmp_path_factory.mktemp("webui"), Says(context=32768)  # its page's tools are 13 000 tokens
    with (
        serving({"chat": write_chat_model(folder / "chat.gguf")}, says) as running,
        _open_webui(python, folder, running, request.param) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        signed_in = client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()
        client.headers["Authorization"] = f"Bearer {signed_in['token']}"
        yield WebUI(url, {"openai": "chat", "ollama": "chat:latest"}[request.param], client, says)


@contextmanager
def _open_webui(python: str, folder: Path, running: Running, way: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(python).parent / "open-webui"
    settings = {name: value.format(url=running.url) for name, value in WAYS[way].items()}
    own = {"WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "key", "DATA_DIR": str(folder), "HOME": str(folder)}
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(program), "serve", "--host", "127.0.0.1", "--port", str(port)],
            env={"PATH": f"{program.parent}:/usr/bin:/bin", **own, **ALONE, **settings},
            cwd=folder,
            stdout=out,
            stderr=out,
        )
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not _is_up(url):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, f"it did not start: {log.read_text()[-2000:]}"
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_the_models(webui: WebUI) -> None:
    models = webui.client.get("/api/models").json()["data"]
    assert webui.model in [model["id"] for model in models]


def test_a_conversation(webui: WebUI) -> None:
    webui.says.text = SAID
    body = {"model": webui.model, "stream": True, "messages": [{"role": "user", "content": QUESTION}]}
    texts, ended = [], False
    with webui.client.stream("POST", "/api/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            ended |= data == "[DONE]"
            for choice in json.loads(data).get("choices", ()) if data.startswith("{") else ():
                texts.append(choice["delta"].get("content") or "")
    assert ended
    assert len([text for text in texts if text]) > 5
    assert "".join(texts) == SAID


def test_a_title(webui: WebUI) -> None:
    webui.says.text = TITLE
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": SAID}]
    body = {"model": webui.model, "messages": messages}
    answer = webui.client.post("/api/v1/tasks/title/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == TITLE


@pytest.mark.filterwarnings("ignore")  # of selenium
def test_its_page(webui: WebUI, tmp_path: Path) -> None:
    """As it comes: with all the tools that it gives a model."""
    webui.says.text = SAID
    with chromium(tmp_path / "profile", tmp_path) as browser:
        browser.driver.get(webui.url)
        browser.until(lambda: browser.all("#chat-input"), "the page", 60)
        time.sleep(2)  # what is new in this version is shown above it
        browser.js("document.querySelectorAll('div.modal button').forEach(button => button.click())")
        browser.until(lambda: browser.click("#chat-input") or True, "the field")
        browser.press(QUESTION, "\n")
        browser.until(lambda: SAID in browser.one("body").text, "the answer", 180)
