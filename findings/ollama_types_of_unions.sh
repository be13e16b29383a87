#!/usr/bin/env bash
# ollama 0.6.3: a Python function's parameter of several types becomes a tool whose "type" is no JSON schema.
#
# One would guess: for `x: int | str` the package sends {"type": ["integer", "string"]} or an anyOf, and for
# `x: list[int]` an array with its items, as pydantic writes them.
# True: the names of all types stand in one text, "integer, string" in an order that changes from run to run, which no
# JSON schema knows; and of a list only "array" is left, without its items.
# Seen: {'type': 'string, integer', 'description': 'What.'} {'type': 'array', 'description': 'Which.'}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ollama==0.6.3
cat > "$folder/seen.py" <<'P'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import ollama

sent = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body = b'{"model": "m", "message": {"role": "assistant", "content": ""}, "done": true}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def look_up(x: int | str, y: list[int]) -> str:
    """Looks up.

    Args:
        x: What.
        y: Which.
    """


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = ollama.Client(host=f"http://127.0.0.1:{server.server_port}")
client.chat("m", [{"role": "user", "content": "Hi"}], tools=[look_up])
found = sent[0]["tools"][0]["function"]["parameters"]["properties"]
print(found["x"], found["y"])
assert sorted(found["x"]["type"].split(", ")) == ["integer", "string"]
assert found["y"] == {"description": "Which.", "type": "array"}
P
"$folder/venv/bin/python" "$folder/seen.py"
