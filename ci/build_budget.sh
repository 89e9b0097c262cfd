#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds a preset and reports which translation units cost most, in core-seconds; fails beyond the
# budget. The budgets leave room for machines a fifth slower than the one they were measured on.
# Usage: ci/build_budget.sh [cpu|cuda [FOLDER]]   default cpu, in a temporary folder
#        TORCH_CUDA_ARCH_LIST (default 8.0), PYTHON; TARGETS: of CMake, default all;
#        CACHE=1 keeps ccache, whose hits cost nothing
set -euo pipefail
cd "$(dirname "$0")/.."
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
preset=${1:-cpu}
case $preset in
  cpu) total=420 unit=60 ;;
  cuda) total=1500 unit=75 ;;
  *) echo "build_budget.sh: '$preset' has no budget; expected cpu or cuda" >&2; exit 2 ;;
esac
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0}

if [ $# -gt 1 ]; then
  build=$2
else
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
fi
mkdir -p "$build"
log=$(cd "$build" && pwd)/build_budget.tsv
launcher="$python;$PWD/ci/build_budget.py;launch;$log"
[ "${CACHE:-}" != 1 ] || launcher+=$(command -v ccache >/dev/null && echo ";ccache" || true)
cmake --preset "$preset" -S . -B "$build" -DHW_PYTHON_EXECUTABLE="$python" -DHW_TESTS=OFF \
  -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" -DCMAKE_CUDA_COMPILER_LAUNCHER="$launcher"
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" ${TARGETS:+--target $TARGETS}
"$python" ci/build_budget.py report "$log" --total "$total" --unit "$unit"
