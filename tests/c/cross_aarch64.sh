#!/usr/bin/env bash
# The C tests that know instruction sets, on 64-bit ARM: cross-compiled, then run by qemu-user as a processor that has the
# dot product, which tries the sets without it as well, and, at the same time, the quick ones as one that lacks it. Needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user, cmake and
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

check() { # CPU NAMES TEST...: the instruction sets that are to be found there, best first
    local cpu=$1 names test
    names=$(qemu-aarch64 -cpu "$cpu" "$build/names")
    if [ "$names" != "$2 " ]; then
        printf '%s has %s, not %s\n' "$cpu" "$names" "$2"
        exit 1
    fi
    shift 2
    for test in "$@"; do
        local arguments=()
        # Forking while it has threads is what qemu-user itself fails at.
        if [ "${test##*/}" = test_pool ]; then arguments=(without-fork); fi
        if ! qemu-aarch64 -cpu "$cpu" "$test" "${arguments[@]}"; then
            printf '%s: %s failed\n' "$cpu" "${test##*/}"
            exit 1
        fi
        printf '%s: %s passed\n' "$cpu" "${test##*/}"
    done
}
(check max 'neondot neon scalar' "$build"/test_{adapters,corpus,experts,formats,kernels,model,pool,sample}) &
newer=$!
(check cortex-a53 'neon scalar' "$build"/test_{corpus,experts,formats,pool,sample})
wait "$newer"
