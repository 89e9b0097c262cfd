# SPDX-License-Identifier: Apache-2.0
"""bench/compare.py: two trees beside each other. Nothing here asserts how long anything takes."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from headworks import _library
from headworks._operator_list import OPERATORS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

cases = importlib.import_module("bench.compare_cases")
compare = importlib.import_module("bench.compare")


class Fake:
    """In place of a process: calls that take given seconds, and the order of all of them."""

    def __init__(self, name, seconds, log):
        self.name, self._seconds, self._log = name, iter(seconds), log

    def start(self, case):
        self._log.append((self.name, case))

    def seconds(self, count):
        self._log.append((self.name, count))
        return next(self._seconds)


def test_every_operator_has_a_case():
    assert {case.operator for case in cases.CASES} == {operator.name for operator in OPERATORS}


@pytest.mark.parametrize("name", [name for name in cases.named_calls() if "fp32" in name])
def test_a_call_is_made_of_the_operator_that_it_names(name):
    case, mode, dtype = cases.named_calls()[name]
    made = cases.call_of(case, mode, dtype)()
    results = [made] if isinstance(made, torch.Tensor) else [x for x in made if x is not None]
    assert results and all(bool(torch.isfinite(x.double()).all()) for x in results)


def test_processes_take_turns_and_ratios_are_of_the_same_turn():
    log = []
    # Both slow down together; a call of the second takes half as long again.
    slow = [0.02, *(0.02 * 2**i for i in range(6))]
    workers = [Fake("a", slow, log), Fake("b", [1.5 * x for x in slow], log)]
    samples = compare.Samples()
    compare.measure_pair(workers, "case", 6, 100.0, samples)
    assert log[:4] == [("a", "case"), ("b", "case"), ("a", 1), ("b", 1)]
    assert "".join(name for name, _ in log[4:]) == "ab" + "ba" + "ab" + "ba" + "ab" + "ba"
    row = samples.row()
    assert row["ratio"] == pytest.approx(1.5) and row["pairs"] == 1
    assert row["before"] == pytest.approx(0.02 * (4 + 8) / 2)


def test_the_table_has_all_ratios_and_what_failed():
    found = {"one": compare.Samples([1e-3] * 3, [2e-3] * 3, [1.9, 2.0, 2.5])}
    found["two"] = compare.Samples(failed="ValueError: no")
    lines = [*compare.table({name: samples.row() for name, samples in found.items()})]
    assert lines[1].split() == ["one", "2.000", "1.900", "2.500", "1.000", "2.000"]
    assert lines[2].split(None, 1) == ["two", "ValueError: no"]
    assert lines[3].split() == ["median", "of", "all", "2.000"]


def test_two_trees_are_compared_and_written(tmp_path, capsys):
    library = Path(os.environ.get("HEADWORKS_LIBRARY_DIR") or Path(_library.__file__).parent)
    if not any(library.glob("libheadworks.*")):
        pytest.skip("no folder of native libraries is known")
    tree, file = f"{ROOT}:{library}", tmp_path / "ratios.json"
    options = ["--filter", "step.*fp32", "--pairs", "1", "--rounds", "1", "--budget", "0"]
    assert compare.main([tree, tree, *options, "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert list(data["cases"]) == ["linear_attention_step: 16 sequences, forward fp32"]
    (row,) = data["cases"].values()
    assert row["before"] > 0 and row["lowest"] <= row["ratio"] <= row["highest"]
    assert data["threads"] == 1 and set(data["commits"]) == {"before", "after"}
    assert "median of all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "/nowhere"], "no checkout of headworks"),
        ([f"{ROOT}:/nowhere", f"{ROOT}:/nowhere"], "holds no libheadworks"),
    ],
)
def test_what_is_no_tree_is_refused(arguments, message, capsys):
    assert compare.main(arguments) == 2
    assert message in capsys.readouterr().err
