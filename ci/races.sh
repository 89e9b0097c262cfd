#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Races between the threads of the CUDA kernels, without a GPU: builds the emulator with its race
# check (docs/emulator.md, "Races"), then runs the emulator's tests, the operators' small cases and
# races planted into them, each of which must be reported.
# Usage: ci/races.sh    BUILD (default build/races), PYTHON: an interpreter with torch and pytest
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD:-$PWD/build/races}

# One dtype and the narrowest and widest tiles of each kernel (f32 on simt, bf16 on sm80): the
# others are instances of the same source.
cmake --preset races -S . -B "$build" \
  -DHW_PYTHON_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')"
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}"
ctest --test-dir "$build" --output-on-failure -R emu

export PYTHONPATH=$PWD/python HEADWORKS_LIBRARY_DIR=$build/lib HEADWORKS_RACES_BUILD=$build
cases="test_matches_reference and emulate and ((simt and float32) or (sm80 and bfloat16))"
"$python" -m pytest -q -p no:cacheprovider --durations=5 \
  tests/test_ops.py tests/test_planted_races.py -k "($cases) or planted_race_is"
