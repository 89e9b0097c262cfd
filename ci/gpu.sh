#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that a GPU machine can add, within ten minutes and without a network: build there,
# correctness of every CUDA backend, compute-sanitizer, benchmarks. Needs nvcc and, in the
# interpreter, torch, pybind11, cmake, ninja, setuptools, pytest (and matplotlib for the plots).
# Usage: ci/gpu.sh OUTDIR            PYTHON names the interpreter, BUILD the build folder
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { echo "usage: ci/gpu.sh OUTDIR" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
site=${BUILD:-build/ci-gpu}
status=0

# A step has its own time limit and log; a failure is remembered and the next step still runs.
step() {
  local name=$1 limit=$2 start=$SECONDS result=ok
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { result="FAILED ($?)"; status=1; }
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - start)) "$result" | tee -a "$out/summary.txt"
  [ "$result" = ok ] || tail -n 25 "$out/$name.log"
}

# The emulator's own tests, by the hardware: what the emulator was taught is what a GPU does.
primitives() {
  nvcc -x cu -std=c++20 --expt-relaxed-constexpr -arch=native -Icsrc -Itests -o "$out/primitives" \
    tests/device/main.cpp tests/emu/test_{primitives,fragments,gemm}.cpp
  "$out/primitives"
}
export -f primitives
export out

: >"$out/summary.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} FORCE_CUDA=1
MAX_JOBS=${MAX_JOBS:-$(nproc)}
export MAX_JOBS

step build 200 "$python" -m pip install --no-build-isolation --no-deps --no-index \
  --target "$site" --upgrade .
export PYTHONPATH="$PWD/$site${PYTHONPATH:+:$PYTHONPATH}"
step info 20 "$python" -m headworks info
step correctness 130 "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py \
  -k "(simt or sm80 or sm90) and not emulate"
step graphs 40 "$python" -m pytest -q -p no:cacheprovider tests/test_torch.py -k "cuda_graph"
step primitives 60 bash -euc primitives

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" ci/gpu_cases.py
  done
else
  echo "compute-sanitizer    -    SKIPPED: not on this machine" | tee -a "$out/summary.txt"
fi
step bench 140 "$python" -m headworks bench --quick --device cuda --json "$out/bench.json" --plots "$out"
exit $status
