#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a command of README as a newcomer would: word for word, in a fresh copy of the tree.
# Usage: ci/readme.sh [FOLDER [END]]   FOLDER: of the copy (default: a temporary one, removed
#                                      afterwards); END: how the line ends (default: && pytest -n auto)
set -euo pipefail
cd "$(dirname "$0")/.."

end=${2:-'&& pytest -n auto$'}
command=$(grep -E "^python3 -m venv .*$end" README.md) || {
  echo "readme.sh: README.md has no line 'python3 -m venv ... $end'" >&2
  exit 1
}
if [ $# -gt 0 ]; then
  copy=$1
else
  copy=$(mktemp -d)
  trap 'rm -rf "$copy"' EXIT
fi
mkdir -p "$copy"
git ls-files -co --exclude-standard -z | while IFS= read -r -d '' f; do [ ! -f "$f" ] || printf '%s\0' "$f"; done \
  | tar --null -T - -cf - | tar -xf - -C "$copy"
cd "$copy"
echo "\$ $command"
# The time before each step of the line goes to a file; root's bash takes no PS4 from outside.
trace="PS4=\$'+\\t\$EPOCHREALTIME\\t'; set -x"
BASH_XTRACEFD=9 CI=true bash -euo pipefail -c "$trace; $command" </dev/null 9>readme_trace.tsv
printf '+\t%s\tend\n' "$EPOCHREALTIME" >>readme_trace.tsv
python3 ci/readme_times.py print readme_trace.tsv
