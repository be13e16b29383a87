#!/usr/bin/env bash
# anthropic 2.14.0: `messages.create` takes no temperature, top_p and top_k.
#
# One would guess: messages.create(..., temperature=0) sends "temperature": 0.
# True: it is a TypeError before anything is sent; a server gets these only through extra_body={"temperature": 0}.
# Seen: Messages.create() got an unexpected keyword argument 'temperature' / {'temperature': 0}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q anthropic==2.14.0
cat > "$folder/seen.py" <<'P'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import anthropic

sent = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        usage = {"input_tokens": 1, "output_tokens": 1}
        message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": usage}
        body = json.dumps({**message, "stop_reason": "end_turn", "stop_sequence": None}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", api_key="none")
ask = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
refused = None
for name in ("temperature", "top_p", "top_k"):
    try:
        client.messages.create(**ask, **{name: 0})
    except TypeError as error:
        refused = refused or str(error)
    else:
        raise AssertionError(f"{name} is taken")
client.messages.create(**ask, extra_body={"temperature": 0})
print(refused, "/", {key: value for key, value in sent[0].items() if key not in ask})
assert len(sent) == 1
assert sent[0]["temperature"] == 0
P
"$folder/venv/bin/python" "$folder/seen.py"
