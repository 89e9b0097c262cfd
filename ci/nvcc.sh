#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs from PyPI what ci/cuda.sh needs beside the interpreter PYTHON: nvcc, where the machine has
# none, and the programs that read compiled kernels, which some toolkits come without.
set -euo pipefail
python=${PYTHON:-python3}
packages=(nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
if ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  for name in cuda-nvcc cuda-crt cuda-runtime cuda-cccl nvvm; do
    packages+=("nvidia-$name==13.0.*")
  done
fi
"$python" -m pip install -q "${packages[@]}"
