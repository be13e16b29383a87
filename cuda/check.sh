#!/usr/bin/env bash
# Builds, tests and times the CUDA backend on the GPU of this machine: one call, no network, nothing outside this
# checkout but python3 and nvcc, under ten minutes. `bash cuda/check.sh --help` and docs/gpu.md say more.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/check/run.py" "$@"
