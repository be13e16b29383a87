#!/usr/bin/env bash
# gguf 0.19.0: its table of block sizes has one that is not ggml's own.
#
# One would guess: gguf.GGML_QUANT_SIZES, by which tensors of GGUF files are measured, says of each type what ggml_type_size
# says, ggml being where the blocks are defined.
# True: a block of Q8_1 is 36 bytes in ggml (two 16-bit floats and 32 numbers) and 40 in gguf, as it was when they were
# 32-bit floats. All other types agree. Models hold no Q8_1 tensors, so nobody has met it.
# Seen: differ: Q8_1 gguf 40 ggml 36
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0
# ggml in a shared library that is already built; its Python side and what that needs are of no use here.
"$folder/venv/bin/pip" install -q --no-deps --only-binary :all: xllamacpp==2026.10.11549
cat > "$folder/seen.py" <<'P'
import ctypes
import pathlib
import sysconfig

import gguf

(path,) = (pathlib.Path(sysconfig.get_path("purelib")).parent).glob("*/xllamacpp/*.so")
ggml = ctypes.CDLL(str(path))
ggml.ggml_type_size.restype = ctypes.c_size_t
found = []
for type, (_, n_bytes) in gguf.GGML_QUANT_SIZES.items():
    if (own := ggml.ggml_type_size(ctypes.c_int(type))) != n_bytes:
        found.append(f"{type.name} gguf {n_bytes} ggml {own}")
print("differ:", ", ".join(found))
P
seen=$("$folder/venv/bin/python" "$folder/seen.py")
echo "$seen"
[[ $seen == "differ: Q8_1 gguf 40 ggml 36" ]]
