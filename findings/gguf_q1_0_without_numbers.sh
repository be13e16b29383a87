#!/usr/bin/env bash
# gguf 0.19.0: `gguf.quants.dequantize` knows Q1_0 by name and block size, and has no numbers for it.
#
# One would guess: what has a number in GGMLQuantizationType and a size in GGML_QUANT_SIZES can be dequantized, as NVFP4 (40)
#   and MXFP4 (39) can.
# True: Q1_0 (41) raises NotImplementedError, and Q2_0, llama.cpp's type 42, is no member at all; a block of Q1_0 is
#   float16 d and 128 bits, a number is d where its bit is set and -d elsewhere.
# Seen: (128, 18) / Dequantization for Q1_0 is not yet implemented / 42 is not a valid GGMLQuantizationType
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0
cat > "$folder/seen.py" <<'P'
import gguf
import numpy as np

kinds = gguf.GGMLQuantizationType
said = []
for ask in (lambda: gguf.quants.dequantize(np.zeros((1, 18), np.uint8), kinds.Q1_0), lambda: kinds(42)):
    try:
        ask()
    except (NotImplementedError, ValueError) as error:
        said.append(str(error))
print(gguf.GGML_QUANT_SIZES[kinds.Q1_0], *said, sep=" / ")
assert len(said) == 2
assert np.isfinite(gguf.quants.dequantize(np.zeros((1, 36), np.uint8), kinds.NVFP4)).all()
P
"$folder/venv/bin/python" "$folder/seen.py"
