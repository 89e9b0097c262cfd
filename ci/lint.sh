#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Style and types: ruff (rules and format), mypy on python/, clang-format on the C++ and CUDA files;
# sizes of lines, functions and files; words; headers that compile alone, of those that changed.
# Usage: ci/lint.sh      PYTHON names an interpreter that has the tools of ci/requirements.txt
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

files() { git ls-files -co --exclude-standard -- "$@" | while read -r f; do [ ! -f "$f" ] || echo "$f"; done; }

status=0
step() {
  echo "-- $*" | cut -c1-100
  "$@" || status=1
}

# The formatter as installed beside the interpreter, not whichever comes first on PATH.
clang_format=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")/clang-format

step "$python" -m ruff check --no-cache .
step "$python" -m ruff format --no-cache --check .
step "$python" -m mypy --cache-dir="${TMPDIR:-/tmp}/headworks-mypy" python/
mapfile -t sources < <(files '*.h' '*.cpp' '*.cuh' '*.cu')
step "$clang_format" --dry-run -Werror "${sources[@]}"
step "$python" ci/check_sizes.py
step "$python" ci/check_headers.py --cache "${TMPDIR:-/tmp}/headworks-headers.json"
step "$python" ci/check_docs.py
step "$python" ci/readme_times.py check
exit $status
