#!/usr/bin/env bash
# The C tests on 64-bit ARM: cross-compiled, then run by qemu-user as a processor that has the dot product and, at the
# same time, as one that lacks it. Needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user, cmake and
# ninja-build, and a C++ compiler, which CMake looks for and nothing here uses. Without sanitizers, which the same tests
# meet on the machine itself: emulated they would take many minutes.
#   tests/c/cross_aarch64.sh [BUILD_FOLDER]     writes there only; build/aarch64 if none is given
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-build/aarch64}
export QEMU_LD_PREFIX=${QEMU_LD_PREFIX:-/usr/aarch64-linux-gnu}

cmake -S . -B "$build" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=c++ -DTINYLLM_CUDA=OFF -DTINYLLM_C_TESTS=ON \
    -DTINYLLM_SANITIZE=OFF -DTINYLLM_WERROR=ON
cmake --build "$build"

aarch64-linux-gnu-gcc -std=c11 -Icsrc -o "$build/names" -x c - -x none \
    "$build/libtinyllm_core.a" -pthread -lm <<'END'
#include "tinyllm.h"
#include <stdio.h>
int main(void) {
    for (const char *const *name = tl_isa_names(); *name; name++) printf("%s ", *name);
}
END

check() { # CPU NAMES: the instruction sets that are to be found there, best first
    local names test
    names=$(qemu-aarch64 -cpu "$1" "$build/names")
    if [ "$names" != "$2 " ]; then
        printf '%s has %s, not %s\n' "$1" "$names" "$2"
        exit 1
    fi
    for test in "$build"/test_*; do
        local arguments=()
        # Forking while it has threads is what qemu-user itself fails at.
        if [ "${test##*/}" = test_pool ]; then arguments=(without-fork); fi
        if ! qemu-aarch64 -cpu "$1" "$test" "${arguments[@]}"; then
            printf '%s: %s failed\n' "$1" "${test##*/}"
            exit 1
        fi
        printf '%s: %s passed\n' "$1" "${test##*/}"
    done
}
(check max 'neondot neon scalar') &
newer=$!
(check cortex-a53 'neon scalar')
wait "$newer"
