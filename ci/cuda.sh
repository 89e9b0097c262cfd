#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiles every CUDA kernel for one architecture and audits the result; no GPU is needed.
# Usage: ci/cuda.sh      TORCH_CUDA_ARCH_LIST (default 8.0), BUILD (default build/ci-cuda), PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD:-build/ci-cuda}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0}

if ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  echo "SKIPPED: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: the CUDA code was NOT compiled"
  exit 0
fi
FORCE_CUDA=1 cmake --preset cuda -S . -B "$build" \
  -DHW_PYTHON_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')"
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}"
"$python" ci/check_ptx.py --self-test
"$python" ci/check_ptx.py "$build"
