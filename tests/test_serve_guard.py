"""Who may ask the server, how much may be sent, and what an answer must never hold.

Every refusal comes in the shape of the dialect whose path was asked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_listen import Listening, listening, post, read_all
from helpers_serve import write_chat_model
from starlette.responses import Response

from tinyllm.server.app import Call, Dialect, Limits, dialect_of
from tinyllm.server.ask import Refusal
from tinyllm.server.dialects import DIALECTS
from tinyllm.server.guard import Access, is_loopback, name_of
from tinyllm.server.streams import json_response

CHAT = "/v1/chat/completions"
HTTP = httpx.Client(verify=False, timeout=60)  # for requests without a key
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


async def _plain(call: Call) -> Response:
    return json_response({"body": len(await call.request.body())})


async def _broken(call: Call) -> Response:
    raise ZeroDivisionError(f"secret {await call.request.body()!r}")


def _error(refusal: Refusal) -> Any:
    return {"other": refusal.message}


OTHER = Dialect(
    "other",
    [("POST", "/other/size", _plain), ("POST", "/other/broken", _broken)],
    _error,
    lambda refusal: json.dumps(_error(refusal)),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("serve") / "chat.gguf")


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Listening]:
    """A server with a key, pages of another site, and small limits."""
    access = Access(key="s3cret", origins=["https://chat.example"])
    limits = Limits(body_bytes=100_000, stop_strings=4, stop_chars=10)
    with listening({"m": model}, dialects=[*DIALECTS, OTHER], access=access, limits=limits) as it:
        yield it


@pytest.fixture
def client(running: Listening) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, headers={"Authorization": "Bearer s3cret"}) as client:
        yield client


def test_the_key_opens(client: httpx.Client) -> None:
    answer = client.post(CHAT, json=HELLO)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic s3cret"},
        {"Authorization": "Bearer s3cre"},
        {"x-api-key": ""},
        {"x-api-key": "s3cret2"},
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")])
def test_without_the_key_nothing_opens(
    running: Listening, headers: dict[str, str], method: str, path: str
) -> None:
    answer = HTTP.request(method, running.url + path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "s3cre" not in answer.text


@pytest.mark.parametrize("headers", [{"x-api-key": "s3cret"}, {"Authorization": "bearer s3cret"}])
def test_each_header_carries_the_key(running: Listening, headers: dict[str, str]) -> None:
    assert HTTP.get(running.url + "/v1/models", headers=headers).status_code == 200


def test_an_error_has_the_shape_of_its_path(running: Listening, client: httpx.Client) -> None:
    assert "other" in HTTP.post(running.url + "/other/size").json()
    missing = client.get("/other/nothing")
    assert (missing.status_code, list(missing.json())) == (404, ["other"])
    wrong = client.get("/other/size")
    assert (wrong.status_code, list(wrong.json()), wrong.headers["allow"]) == (405, ["other"], "POST")
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert client.get("/nothing").json()["error"]["code"] == "not_found"
    assert client.get("/v1/models/", follow_redirects=False).status_code == 404
    assert dialect_of("/other", [*DIALECTS, OTHER]) is OTHER
    assert dialect_of("", [*DIALECTS, OTHER]) is DIALECTS[0]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("localhost.", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.7", 403),
        ("", 403),
        ("[::1", 200),
        ("localhost@evil.example", 403),
    ],
)
def test_a_name_bent_to_this_machine_is_refused(client: httpx.Client, host: str, status: int) -> None:
    answer = client.get("/v1/models", headers={"Host": host})
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8080", 200),
        ("https://localhost:8080", 200),
        ("https://chat.example", 200),
        ("http://chat.example", 403),
        ("http://localhost:9999", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_pages_of_other_sites_are_refused(client: httpx.Client, origin: str, status: int) -> None:
    answer = client.post(CHAT, headers={"Host": "localhost:8080", "Origin": origin}, json=HELLO)
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://chat.example" else None)


def test_a_preflight_is_answered_for_the_origins_that_may_ask(running: Listening) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ours = HTTP.options(running.url + CHAT, headers={"Origin": "https://chat.example", **asked})
    assert ours.status_code == 200
    assert ours.headers["access-control-allow-origin"] == "https://chat.example"
    theirs = HTTP.options(running.url + CHAT, headers={"Origin": "https://evil.example", **asked})
    assert theirs.status_code == 400
    assert "access-control-allow-origin" not in theirs.headers


def test_no_page_may_ask_by_default(model: Path) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with listening({"m": model}) as it:
        answer = HTTP.options(it.url + CHAT, headers=asked)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
    with listening({"m": model}, access=Access(origins=["*"])) as it:
        assert HTTP.get(it.url + "/v1/models", headers=asked).headers["access-control-allow-origin"] == "*"


def test_addresses_are_names_of_a_server_that_others_reach(model: Path) -> None:
    with listening({"m": model}, access=Access(hosts=["My.Host"], any_address=True)) as it:
        for host, status in (("192.168.1.7:80", 200), ("[fe80::1]", 200), ("my.host", 200), ("other", 403)):
            assert HTTP.get(it.url + "/v1/models", headers={"Host": host}).status_code == status, host


@pytest.mark.parametrize(
    ("host", "name"),
    [("a:80", "a"), ("A", "a"), ("[::1]:80", "::1"), ("::1", "::1"), ("[::1]", "::1"), ("a.", "a"), ("", "")],
)
def test_names_of_host_headers(host: str, name: str) -> None:
    assert name_of(host) == name


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "Localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", ""])
def test_no_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_two_host_headers_are_refused(running: Listening) -> None:
    with running.connect() as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert client.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.1 403"))


def test_a_base_model_without_a_template_says_so() -> None:
    with listening({"tales": "stories"}) as it:
        answer = HTTP.post(it.url + CHAT, json=HELLO)
    assert answer.status_code == 400
    assert "tales has no chat template" in answer.json()["error"]["message"]


# --- size


def test_a_body_may_have_just_the_limit(client: httpx.Client) -> None:
    assert client.post("/other/size", content=b"x" * 100_000).json() == {"body": 100_000}


def test_a_body_past_the_limit_is_413_by_its_length_and_while_it_comes(client: httpx.Client) -> None:
    said = client.post("/other/size", content=b"x" * 100_001)
    chunked = client.post("/other/size", content=(b"x" * 1000 for _ in range(3000)))
    for answer in (said, chunked):
        assert answer.status_code == 413
        assert "100000 bytes" in answer.json()["other"]
    assert client.post(CHAT, content=b" " * 200_000).json()["error"]["code"] == "body_too_large"
    assert client.post("/other/size", content=b"x").json() == {"body": 1}, "and others go on"


def test_a_client_that_waits_for_our_word_need_not_send(running: Listening) -> None:
    with running.connect() as client:
        more = ("Authorization: Bearer s3cret", "Expect: 100-continue")
        client.sendall(post("/other/size", b"", *more, length=10_000_000))
        assert read_all(client).startswith(b"HTTP/1.1 413")


# --- what a request asks for


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 1000}, "1 to 128"),
        ({"n": 9}, "computes 8 texts at once"),
        ({"stop": ["a"] * 5}, "5 stop strings, the most is 4"),
        ({"stop": "a" * 11}, "has 11 characters, the most is 10"),
        ({"stop": ["a", "b" * 11]}, "has 11 characters, the most is 10"),
        ({"max_tokens": 10**30}, "max_tokens is"),
        ({"seed": 2**70}, "seed is"),
        ({"temperature": 1e999}, "temperature is inf"),
        ({"messages": [{"role": "user", "content": "ha " * 20_000}]}, "do not fit into the context"),
    ],
)
def test_limits_are_told_with_their_numbers(
    client: httpx.Client, members: dict[str, Any], words: str
) -> None:
    answer = client.post(CHAT, content=json.dumps(HELLO | members).replace("Infinity", "1e999"))
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_the_time_of_a_request_is_bounded(model: Path) -> None:
    body = {"messages": HELLO["messages"], "max_tokens": 400, "temperature": 0, "stream": True}
    with listening({"m": model}, limits=Limits(time_s=0.05)) as it:
        whole = HTTP.post(it.url + CHAT, json=body | {"stream": False})
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        assert "0.05 s" in whole.json()["error"]["message"]
        stream = HTTP.post(it.url + CHAT, json=body)
        assert stream.status_code == 504 or '"code":"timeout"' in stream.text


# --- what must never come out


def test_no_name_of_a_model_opens_a_file(client: httpx.Client, model: Path) -> None:
    for name in (str(model), "/etc/passwd", "../m", "m/../m", "", "m\0", "a" * 10_000, "%2e%2e/m"):
        answer = client.post(CHAT, json=HELLO | {"model": name})
        assert answer.status_code == 404, name
        assert answer.json()["error"]["code"] == "model_not_found"
        assert len(answer.text) < 1000


@pytest.mark.parametrize("name", ["chat_template", "template", "model_path", "lora", "grammar_file"])
def test_templates_and_files_are_refused_by_name(client: httpx.Client, name: str) -> None:
    answer = client.post(CHAT, json=HELLO | {name: "/etc/passwd"})
    assert answer.status_code == 400
    assert "root:" not in answer.text


def test_an_error_of_ours_tells_nothing(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    answer = client.post("/other/broken", content=b"my prompt")
    assert answer.status_code == 500
    for word in ("secret", "prompt", "Traceback", "ZeroDivision", __file__, "line"):
        assert word not in answer.text
    (record,) = [r for r in caplog.records if r.name.startswith("tinyllm.server")]
    assert record.getMessage().startswith("ZeroDivisionError at ")
    assert "secret" not in caplog.text
    assert "my prompt" not in caplog.text


def test_a_model_that_cannot_be_loaded_shows_no_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with listening({"m": broken}) as it:
        answer = HTTP.post(it.url + CHAT, json=HELLO)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "m cannot be loaded: the server's log says why"
    assert str(broken) in caplog.text


def test_prompts_and_keys_are_not_logged(
    running: Listening, client: httpx.Client, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ask = {"messages": [{"role": "user", "content": "zebra"}], "max_tokens": 2}
    assert client.post(CHAT + "?zebra", json=ask).status_code == 200
    assert client.post(CHAT, json=ask | {"stop": "zebra" * 9}).status_code == 400
    assert client.post(CHAT, content=b"zebra").status_code == 400
    assert HTTP.post(running.url + CHAT, headers={"x-api-key": "zebra"}, json=ask).status_code == 401
    with running.connect() as raw:
        raw.sendall(b"zebra\r\n\r\n")
        read_all(raw)
    ours = [r.getMessage() for r in caplog.records if r.name.split(".")[0] not in ("httpx", "httpcore")]
    assert "zebra" not in "\n".join(ours)
    assert "s3cret" not in "\n".join(ours)
    with listening({"m": model}, logs_prompts=True) as it:
        assert HTTP.post(it.url + CHAT, json=ask).status_code == 200
    assert '"content":"zebra"' in caplog.text


# --- metrics


def test_metrics_hold_nothing_that_clients_write(running: Listening, client: httpx.Client) -> None:
    client.post(CHAT, json=HELLO)
    client.post(CHAT, json=HELLO | {"stream": True})
    client.get("/zebra/zebra")
    client.post(CHAT, json=HELLO | {"model": "zebra"})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.text
    assert "zebra" not in text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    chats = 'tinyllm_requests_total{dialect="openai",route="/v1/chat/completions",status="%d"}'
    assert float(values[chats % 200]) >= 2
    assert float(values[chats % 404]) >= 1
    assert float(values['tinyllm_requests_total{dialect="",route="other",status="404"}']) >= 1
    assert float(values["tinyllm_time_to_first_token_seconds_count"]) >= 2
    assert float(values["tinyllm_time_per_output_token_seconds_count"]) >= 2
    for name in ("prompt_tokens_total", "prompt_seconds_total", "tokens_predicted_total"):
        assert float(values[f"llamacpp:{name}"]) > 0
    assert float(values["llamacpp:predicted_tokens_seconds"]) > 0
    assert float(values["llamacpp:requests_processing"]) == 0
    assert float(values["llamacpp:requests_deferred"]) == 0
    assert float(values["tinyllm_models_loaded"]) == 1
    assert float(values['tinyllm_cache_pages{model="m",state="allocated"}']) > 0
    assert float(values['tinyllm_model_bytes{model="m"}']) > running.llm().model.weight_bytes


def test_tokens_are_counted_once(model: Path) -> None:
    with listening({"m": model}) as it:
        ask = HELLO | {"n": 3, "max_tokens": 5, "temperature": 0, "seed": 1}
        usage = HTTP.post(it.url + CHAT, json=ask).json()["usage"]
        text = HTTP.get(it.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["llamacpp:prompt_tokens_total"]) == usage["prompt_tokens"]
    assert float(values["llamacpp:tokens_predicted_total"]) == usage["completion_tokens"]
    assert float(values["tinyllm_time_to_first_token_seconds_count"]) == 1
