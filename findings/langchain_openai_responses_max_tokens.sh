#!/usr/bin/env bash
# langchain-openai 1.7.4: with /v1/responses, the max_tokens of a call does not count where the model has its own.
#
# One would guess: ChatOpenAI(max_tokens=150).invoke("Hi", max_tokens=10) asks for 10 tokens at most, through
# /v1/responses as through /v1/chat/completions.
# True: with use_responses_api=True it asks for 150 (the same call with max_completion_tokens=10 asks for 10); a call
# with max_output_tokens=10, the API's own name, asks for 150 as well.
# Seen: chat 10 10 / responses 150 10 150
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q langchain-openai==1.7.4
"$folder/venv/bin/python" - <<'P'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
from langchain_openai import ChatOpenAI

asked = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked.append(body.get("max_output_tokens", body.get("max_completion_tokens")))
        self.send_response(400)
        self.end_headers()

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
for responses, names in (
    (False, ("max_tokens", "max_completion_tokens")),
    (True, ("max_tokens", "max_completion_tokens", "max_output_tokens")),
):
    model = ChatOpenAI(
        base_url=url, api_key="none", model="m", max_tokens=150, use_responses_api=responses, max_retries=0
    )
    for name in names:
        try:
            model.invoke("Hi", **{name: 10})
        except openai.BadRequestError:
            pass
print("chat", *asked[:2], "/", "responses", *asked[2:])
assert asked == [10, 10, 150, 10, 150]
P
