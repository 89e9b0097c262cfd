#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The GPU day on the emulator, to its end: every step, then the page from what came home, in a copy.
# Usage: ci/gpu_dry_run.sh FOLDER     PYTHON; BUILD or HEADWORKS_LIBRARY_DIR as for ci/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { echo "usage: ci/gpu_dry_run.sh FOLDER" >&2; exit 2; }
mkdir -p "$1/copy/bench/results"
folder=$(cd "$1" && pwd)
python=${PYTHON:-python3}

status=0
ci/gpu.sh --dry-run "$folder/home" || status=1
for name in summary.txt junit.tgz bench.jsonl sanitizer.tgz kernels.ncu-rep env.txt; do
  [ -s "$folder/home/$name" ] || { echo "gpu_dry_run: no $name came home" >&2; status=1; }
done
if [ "$(find "$folder/home" -type f | wc -l)" -gt 8 ]; then
  echo "gpu_dry_run: more than 8 files came home" >&2
  status=1
fi

cp bench/GPU.md "$folder/copy/bench/"
PYTHONPATH=python:$PWD "$python" -m bench.fill_gpu "$folder/home" --root "$folder/copy"
grep -q 'A dry run' "$folder/copy/bench/GPU.md"
if PYTHONPATH=python:$PWD "$python" -m bench.fill_gpu "$folder/home" 2>/dev/null; then
  echo "gpu_dry_run: a dry run was taken for a measurement" >&2
  status=1
fi
exit $status
