#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiles every CUDA kernel for one architecture and audits the result, and the primitives that the
# kernels are made of; no GPU is needed.
# Usage: ci/cuda.sh      TORCH_CUDA_ARCH_LIST (default: 8.0 on even days, 9.0a on odd ones),
#                        BUILD (default build/ci-cuda), PYTHON; HEADWORKS_WITHOUT_NVCC=1 lets it pass
#                        where nothing can be compiled
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD:-build/ci-cuda}
turn=(8.0 9.0a)
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${turn[10#$(date +%j) % 2]}}

wheels=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
if ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] \
  && [ ! -x "$wheels/bin/nvcc" ]; then
  echo "no nvcc on PATH, in CUDA_HOME, in /usr/local/cuda or in $wheels: the CUDA code was NOT" \
    "compiled. ci/nvcc.sh installs it from PyPI; HEADWORKS_WITHOUT_NVCC=1 goes on without." >&2
  [ "${HEADWORKS_WITHOUT_NVCC:-}" = 1 ] && exit 0
  exit 1
fi
"$python" ci/check_seam.py --self-test
"$python" ci/check_seam.py
FORCE_CUDA=1 CACHE=1 PYTHON=$python TARGETS="hw_cuda_SIMT hw_cuda_SM80" \
  ci/build_budget.sh cuda "$build"
"$python" ci/check_ptx.py --self-test
"$python" ci/check_ptx.py "$build"
