# SPDX-License-Identifier: Apache-2.0
"""Lets the benchmarks import the operators' specifications, which live beside the tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
