#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What of the CUDA kernels no emulated comparison reaches: builds the emulator with gcov's counters,
# runs the operators' small cases, and reports lines, barriers, kernels and outcomes of host
# branches that never occur (ci/check_coverage.py); fails on any that ci/coverage.json does not explain.
# Usage: ci/coverage.sh    BUILD (default build/coverage), PYTHON: an interpreter with torch and
#                          pytest
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD:-$PWD/build/coverage}

cmake --preset coverage -S . -B "$build" -DHW_TESTS=OFF \
  -DHW_PYTHON_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')"
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}"
find "$build" -name '*.gcda' -delete

# One thread, because counters are plain numbers; one dtype, of which the others are instances.
cases="not schedules and not smallest and emulate and ((simt and float32) or (sm80 and bfloat16))"
HEADWORKS_TEST_THREADS=1 PYTHONPATH=$PWD/python HEADWORKS_LIBRARY_DIR=$build/lib \
  "$python" -m pytest -q -p no:cacheprovider --durations=10 tests/test_ops.py tests/test_devices.py \
  -k "($cases) or kilobytes or decline"
"$python" ci/check_coverage.py "$build"
