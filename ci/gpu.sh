#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that a GPU machine can add, within ten minutes and without a network; see
# ci/gpu_day/README.md. Needs what ci/gpu_prepare.sh made. With --dry-run every step runs here,
# small and on the emulator.
# Usage: ci/gpu.sh [--dry-run] [--seconds N] [--only STAGE,...] OUTDIR
#        PYTHON names the interpreter; for a dry run BUILD (default build/emu) or
#        HEADWORKS_LIBRARY_DIR the libraries with the emulator
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=ci${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -m gpu_day "$@"
