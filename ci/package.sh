#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the source distribution, a wheel from it, and looks at what is inside.
# Usage: ci/package.sh [OUTDIR]      (default build/ci-package; PYTHON names the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-build/ci-package}

rm -rf "$out"
mkdir -p "$out"
"$python" -m venv "$out/venv"
"$out/venv/bin/python" -m pip install -q build
# --sdist then the wheel from that sdist: what is published is what is built from.
FORCE_CUDA=0 "$out/venv/bin/python" -m build -q --outdir "$out/dist" .
"$python" ci/check_package.py "$out"/dist/*.tar.gz "$out"/dist/*.whl
