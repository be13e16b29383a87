#!/usr/bin/env bash
# huggingface_hub 2.4.0: a download into the cache that ended early begins again at the first byte.
#
# One would guess: as for years, the cache keeps NAME.incomplete, and the next call asks for the rest with a Range.
# True: each call writes a file of its own (a random name, because of file systems without working locks) and deletes it
# when it fails, so of 4 GB of which 3.9 had come nothing is left. Only within one call a broken connection goes on.
# Seen: left in blobs: [] | second call asked: ['no Range']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0
cat > "$folder/seen.py" <<'P'
import hashlib
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DATA = bytes(range(256)) * 200_000  # 51 MB: several of the 10 MB pieces that are written at a time
asked, fails = [], [True]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        if not self.path.startswith("/a/b/resolve/"):
            self.send_error(404)
            return
        get = self.command == "GET"
        if get:
            asked.append(self.headers.get("Range", "no Range"))
        if get and fails[0] and len(asked) > 1:  # the server goes away for good
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"%s"' % hashlib.sha256(DATA).hexdigest())
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        if get:
            self.wfile.write(DATA[: 35_000_000 if fails[0] else None])
            self.close_connection = True

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": sys.argv[1], "HF_HUB_DISABLE_XET": "1"}
from huggingface_hub import hf_hub_download

try:
    hf_hub_download("a/b", "model.gguf")
    raise SystemExit("it did not fail")
except OSError:
    pass
within = list(asked)
left = [p.name for p in Path(sys.argv[1]).rglob("blobs/*")]
asked.clear()
fails[0] = False
assert Path(hf_hub_download("a/b", "model.gguf")).read_bytes() == DATA
print("left in blobs:", left, "| second call asked:", asked)
assert within[0] == "no Range"
assert within[1].startswith("bytes=3"), "within one call it goes on"
assert left == []
assert asked == ["no Range"]
P
"$folder/venv/bin/python" "$folder/seen.py" "$folder/home" 2> /dev/null
