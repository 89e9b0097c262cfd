#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a GPU machine need not spend its minutes on, into .gpu_day/ (which git ignores and the run
# carries): the library for sm_90a, the tests of the primitives, wheels of peers. Needs nvcc, and
# no GPU.
# Usage: ci/gpu_prepare.sh [--baseline LIBHEADWORKS.SO]
#        BUILD (default build/gpu_day), MAX_JOBS, PYTHON; ARCH (default 9.0a)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD:-build/gpu_day}
arch=${ARCH:-9.0a}
folder=.gpu_day
most=$((64 << 20))

usage="usage: ci/gpu_prepare.sh [--baseline LIBHEADWORKS.SO]"
baseline=
case "${1:-}" in
  "") ;;
  --baseline) baseline=$(realpath -e "${2:?$usage}") ;;
  *) echo "$usage" >&2; exit 2 ;;
esac
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
command -v nvcc >/dev/null || { echo "gpu_prepare: no nvcc on PATH or in CUDA_HOME" >&2; exit 2; }

FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch cmake --preset cuda -S . -B "$build" -DHW_PYTHON=OFF
cmake --build "$build" --target headworks --parallel "${MAX_JOBS:-$(nproc)}"

mkdir -p "$folder/library" "$folder/wheels"
rm -rf "$folder/baseline"
cp "$build/lib/libheadworks.so" "$folder/library/"
if [ -n "$baseline" ]; then
  mkdir "$folder/baseline"
  cp "$baseline" "$folder/baseline/libheadworks.so"
fi

number=sm_${arch//./}
sources=(tests/device/main.cpp tests/emu/test_{primitives,fragments,gemm}.cpp)
changed=$(find "${sources[@]}" tests/emu csrc/core -newer "$folder/primitives" 2>/dev/null \
  || echo all)
if [ -n "$changed" ]; then
  nvcc -x cu -std=c++20 --expt-relaxed-constexpr -O2 \
    -gencode "arch=compute_${number#sm_},code=$number" -Icsrc -Itests -o "$folder/primitives" \
    "${sources[@]}"
fi
strip "$folder/primitives" "$folder"/*/libheadworks.so

# Peers that the machine lacks; whatever has no wheel is measured without.
for name in fla-core routing-transformer; do
  ls "$folder"/wheels/"${name//-/_}"-*.whl >/dev/null 2>&1 && continue
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    -d "$folder/wheels" "$name" || echo "gpu_prepare: no wheel of $name" >&2
done

carried=$(du -sb --apparent-size "$folder" | cut -f1)
tree=$(git ls-files -co --exclude-standard -z | xargs -0 -r stat -c %s \
  | awk '{ n += $1 } END { print n }')
find "$folder" -type f -printf '%10s  %p\n' | sort -k 2
printf '%s carried, %s in the tree: %.1f of %d MiB\n' "$carried" "$tree" \
  "$(awk "BEGIN { print ($carried + $tree) / 1048576 }")" $((most >> 20))
[ $((carried + tree)) -le $most ] || { echo "gpu_prepare: more than a run may carry" >&2; exit 1; }
