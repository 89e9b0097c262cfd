#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The GPU's cases of every operator in the emulator, for a device of 132 multiprocessors. With a
# number of shares one of them a day, turn by turn.
# Usage: ci/hardware.sh [SHARES]     PYTHON: one with headworks and its emulator; DAY to choose
set -euo pipefail
cd "$(dirname "$0")/.."
shares=${1:-1}
day=${DAY:-$(date +%j)}
HEADWORKS_SHARE=$((10#$day % shares))/$shares "${PYTHON:-python3}" -m pytest -q -m hardware \
  --durations=5 tests/test_hardware_cases.py
