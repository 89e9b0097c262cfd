#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs README's demo command as a newcomer would: word for word, in a fresh copy of the tree; then
# looks at what it left.
# Usage: ci/demo.sh [FOLDER]         (default: a temporary one, removed afterwards)
#        RECORD=1 ci/demo.sh         on a quiet machine: writes what it took into
#                                    bench/results/install_cpu.json and README.md
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -gt 0 ]; then
  copy=$1
else
  copy=$(mktemp -d)
  trap 'rm -rf "$copy"' EXIT
fi
[ "${RECORD:-}" != 1 ] || export CCACHE_DISABLE=1  # what a newcomer waits
ci/readme.sh "$copy" '&& headworks demo$'
[ "${RECORD:-}" != 1 ] || python3 ci/readme_times.py record "$copy/readme_trace.tsv"
cd "$copy"
.venv/bin/python - <<'PYTHON'
import glob
import json

(path,) = glob.glob("**/results.json", recursive=True)
results = json.load(open(path))
bits = results["validation_bits_per_byte"]
assert bits < 3.0, f"{bits:.2f} validation bits per byte, expected less than 3.0"
folder = path.removesuffix("results.json")
for name in ("training.png", "decode.png", "generated.txt", "checkpoint.pt"):
    assert open(folder + name, "rb").read(), name
print(f"{results['ended']} after {results['steps']} steps, {bits:.2f} validation bits per byte")
PYTHON
