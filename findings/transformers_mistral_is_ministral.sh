#!/usr/bin/env bash
# transformers 5.24.0: a config.json of Mistral that has the key "layer_types", even as null, is another family's.
#
# One would guess: {"model_type": "mistral"} is a MistralConfig whatever else it says.
# True: AutoConfig makes a MinistralConfig of it where "layer_types" is a key, whose model has windows by layer; the
# same object as the text_config of a Mistral3Config stays a MistralConfig.
# Seen: MistralConfig MinistralConfig MistralConfig
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'P'
import json
from pathlib import Path

from transformers import AutoConfig, Mistral3Config

found = []
for more in ({}, {"layer_types": None}):
    Path("config.json").write_text(json.dumps({"model_type": "mistral", **more}))
    found.append(type(AutoConfig.from_pretrained(".")).__name__)
inner = Mistral3Config(text_config={"model_type": "mistral", "layer_types": None}).text_config
found.append(type(inner).__name__)
print(*found)
assert found == ["MistralConfig", "MinistralConfig", "MistralConfig"]
P
