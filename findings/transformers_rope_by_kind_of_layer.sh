#!/usr/bin/env bash
# transformers 5.24.0: what an older config.json says of RoPE scaling is lost for models with RoPE by kind of layer.
#
# One would guess: Gemma 3's rope_scaling {"type": "linear", "factor": 8.0}, as files before transformers 4.43 spell
# it, scales RoPE in the full-attention layers, as {"rope_type": "linear", ...} does; and rope_parameters without kinds
# of layers, as other families have them, apply to those layers.
# True: "type" is kept beside rope_type "default", so nothing is scaled (one line of a log says that `factor` is not
# recognized); flat rope_parameters are kept beside the defaults of both kinds, and have no effect.
# Seen: default 8.0 / linear 8.0 / default 1000000.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0
"$folder/venv/bin/python" - <<'P'
from transformers import Gemma3TextConfig

older = Gemma3TextConfig(rope_scaling={"type": "linear", "factor": 8.0}).rope_parameters["full_attention"]
newer = Gemma3TextConfig(rope_scaling={"rope_type": "linear", "factor": 8.0}).rope_parameters["full_attention"]
flat = Gemma3TextConfig(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})
flat = flat.rope_parameters["full_attention"]
print(older["rope_type"], older["factor"], "/", newer["rope_type"], newer["factor"], end=" / ")
print(flat["rope_type"], flat["rope_theta"])
assert (older["rope_type"], newer["rope_type"]) == ("default", "linear")
assert flat == {"rope_type": "default", "rope_theta": 1000000.0}
P
