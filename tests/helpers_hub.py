"""A stand-in for huggingface.co on loopback: the few requests that huggingface_hub makes to fetch a model,
over files given as bytes. It counts what it is asked, and can break off, lie about bytes, or ask for an
account."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".gguf", ".safetensors", ".model")  # kept in LFS, whose checksum is a SHA-256


@dataclass
class Hub:
    """repos: {repository: {path: bytes}}. gated: repositories that ask for an account. sends: bytes that are
    sent of a path in place of the true ones. breaks_at: {path: bytes after which the first answer ends
    early}."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    sends: dict[str, bytes] = field(default_factory=dict)
    breaks_at: dict[str, int] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)  # "METHOD path"
    ranges: list[str] = field(default_factory=list)  # that were asked for
    url: str = ""

    def facts(self, file: str, content: bytes, *, path: str, oid: str, sha: str) -> dict[str, Any]:
        """A file as the API lists it. path, oid, sha: what that part of the API calls these."""
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        facts: dict[str, Any] = {path: file, "size": len(content), oid: git}
        if file.endswith(LARGE):
            facts["lfs"] = {
                sha: hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 134,
            }
        return facts


@contextmanager
def serving(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    """The stand-in, listening."""
    hub = Hub({repo: dict(files) for repo, files in repos.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                self._info(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                self._tree(match[1], match[2])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(match[1], match[2], match[3])
            elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
                self._bytes(match[1], match[2])
            else:
                self._refuse(404, "EntryNotFound")

        def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
            if repo not in hub.repos:
                self._refuse(401, "RepoNotFound")
            elif repo in hub.gated:
                self._refuse(403, "GatedRepo")
            elif revision not in ("main", COMMIT):
                self._refuse(404, "RevisionNotFound")
            else:
                return hub.repos[repo]
            return None

        def _info(self, repo: str, revision: str) -> None:
            if (files := self._files(repo, revision)) is not None:
                names = {"path": "rfilename", "oid": "blobId", "sha": "sha256"}
                siblings = [hub.facts(path, content, **names) for path, content in files.items()]
                self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

        def _tree(self, repo: str, revision: str) -> None:
            if (files := self._files(repo, revision)) is not None:
                names = {"path": "path", "oid": "oid", "sha": "oid"}
                self._json(
                    [{"type": "file"} | hub.facts(p, content, **names) for p, content in files.items()]
                )

        def _file(self, repo: str, revision: str, path: str) -> None:
            files = self._files(repo, revision)
            if files is None:
                return
            if path not in files:
                self._refuse(404, "EntryNotFound")
                return
            facts = hub.facts(path, files[path], path="path", oid="oid", sha="sha")
            if "lfs" not in facts:
                self._bytes(repo, path)
                return
            self.send_response(302)  # to another host, usually
            self.send_header("Location", f"{hub.url}/cdn/{repo}/{path}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{facts["lfs"]["sha"]}"')
            self.send_header("X-Linked-Size", str(facts["size"]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _bytes(self, repo: str, path: str) -> None:
            true = hub.repos[repo][path]
            if path in hub.gone:
                self._refuse(503, "")
                return
            content = hub.sends.get(path, true)
            start = 0
            if asked := self.headers.get("Range"):
                hub.ranges.append(f"{path} {asked}")
                start = int(asked.removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hub.facts(path, true, path="path", oid="oid", sha="sha")["oid"]}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if self.command == "GET":
                end = hub.breaks_at.pop(path, len(content))
                hub.gone |= {path} if end < len(content) else set()
                self.wfile.write(content[start:end])
                self.close_connection = end < len(content)

        def _json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler
