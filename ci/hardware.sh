#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The GPU's cases of every operator in the emulator: on a device of 132 multiprocessors in two
# dtypes that reach every kernel, and of the other dtypes and the small device a share a day.
# Usage: ci/hardware.sh [SHARES]     default 12; 1: everything. PYTHON: one with headworks and its
#        emulator; DAY in place of today's number
set -euo pipefail
cd "$(dirname "$0")/.."
shares=${1:-12}
day=${DAY:-$(date +%j)}
HEADWORKS_SHARE=$((10#$day % shares))/$shares "${PYTHON:-python3}" -m pytest -q -m hardware \
  --durations=5 tests/test_hardware_cases.py
