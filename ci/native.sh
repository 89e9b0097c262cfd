#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Native code under AddressSanitizer and UBSan: the C++ unit tests, the emulator's own tests, and
# the operators' emulator tests from Python, in which the CUDA kernels themselves run sanitized.
# Usage: ci/native.sh    BUILD (default build/ci-asan), PYTHON: an interpreter with torch and pytest
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD:-$PWD/build/ci-asan}

# detect_leaks=0: the interpreter and torch keep memory to the end on purpose.
# detect_stack_use_after_return=0: a fiber's frames must lie on the fiber's own stack.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1:strict_init_order=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

# One dtype and the narrowest and widest tiles of each kernel (f32 on simt, bf16 on sm80): sanitized
# code takes long to compile, and the others are instances of the same source that the ordinary
# tests run.
cmake --preset asan -S . -B "$build" -DHW_MINIMAL=ON \
  -DHW_PYTHON_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')"
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}"
ctest --test-dir "$build" --output-on-failure

# The sanitizer must come before everything else the interpreter loads; libstdc++ with it, since
# its interceptor for C++ exceptions looks for the original at start-up.
runtime=$(g++ -print-file-name=libasan.so)
cxx=$(g++ -print-file-name=libstdc++.so.6)
PYTHONPATH=$PWD/python HEADWORKS_LIBRARY_DIR=$build/lib LD_PRELOAD="$runtime $cxx" \
  "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py \
  -k "emulate and ((simt and float32) or (sm80 and bfloat16))"
