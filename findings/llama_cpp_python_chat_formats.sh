#!/usr/bin/env bash
# llama-cpp-python 0.3.36: two of its named chat formats lose what was said.
#
# One would guess: chat_format="open-orca" puts the user's words into the prompt, "intel" the system's message.
# True: open-orca's table of roles has "User" and "Assistant", so messages of the roles "user" and "assistant" are
# left out, all of them; intel never fills its text in, so the prompt has the very words {system_message}.
# (The library of llama.cpp is not built for this: the formats are plain Python, and it is replaced by a mock.)
# Seen: open-orca says "Hello there": False / intel says "Be brief": False, {system_message}: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.2.6 jinja2==3.1.6 diskcache==5.6.3 typing-extensions==4.15.0
"$folder/venv/bin/pip" download -q --no-deps --no-binary :all: -d "$folder" llama-cpp-python==0.3.36
tar -xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder" llama_cpp_python-0.3.36/llama_cpp
cat > "$folder/seen.py" <<'P'
import sys
import types
from unittest.mock import MagicMock

low = MagicMock()
low.__all__ = []
sys.modules["llama_cpp.llama_cpp"] = low
sys.modules["llama_cpp._internals"] = MagicMock()
sys.modules["llama_cpp._logger"] = MagicMock()
sys.modules["llama_cpp.mtmd_cpp"] = types.ModuleType("mtmd_cpp")
from llama_cpp import llama_chat_format as formats

messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello there"}]
orca = formats.format_open_orca(messages=messages).prompt
intel = formats.format_intel(messages=messages).prompt
chatml = formats.format_chatml(messages=messages).prompt
assert "Hello there" in chatml and "Be brief" in chatml
print(
    f'open-orca says "Hello there": {"Hello there" in orca} / intel says "Be brief": {"Be brief" in intel}, '
    f"{{system_message}}: {'{system_message}' in intel}"
)
assert "Hello there" not in orca
assert "Be brief" not in intel and "{system_message}" in intel
P
PYTHONPATH="$folder/llama_cpp_python-0.3.36" "$folder/venv/bin/python" "$folder/seen.py"
