#!/usr/bin/env bash
# ziglang 0.15.2: for 64-bit ARM macOS, -mcpu=generic compiles no NEON intrinsic.
#
# One would guess: -mcpu=generic, which compiles NEON for Linux, does so for macOS: NEON is in every ARMv8-A.
# True: the intrinsics of arm_neon.h are then compiled with an M1's features and the caller without them, so none can
# be inlined; more features (-mcpu=generic+aes) only move the complaint. The M1 has to be named: -mcpu=apple_m1.
# Seen: aarch64-linux-musl generic 0, aarch64-macos.11.0 generic 1, aarch64-macos.11.0 apple_m1 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ziglang==0.15.2
cat > "$folder/neon.c" <<'C'
#include <arm_neon.h>
float32x4_t same(float x) { return vdupq_n_f32(x); }
C
compiles() { # TARGET CPU EXPECTED
    local code=0
    "$folder/venv/bin/python" -m ziglang cc -target "$1" "-mcpu=$2" -O2 -c "$folder/neon.c" -o "$folder/neon.o" \
        2> "$folder/said" || code=1
    printf '%s %s %d\n' "$1" "$2" "$code"
    [ "$code" = "$3" ]
}
compiles aarch64-linux-musl generic 0
compiles aarch64-macos.11.0 generic 1
grep -q "requires target feature 'aes'" "$folder/said"
compiles aarch64-macos.11.0 apple_m1 0
