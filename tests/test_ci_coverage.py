# SPDX-License-Identifier: Apache-2.0
"""ci/check_coverage.py: what it calls unreached, in counts of a small kernel; what explains it; and
that cases chosen pairwise have all pairs."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from specs.pairs import pairwise

PATH = Path(__file__).parents[1] / "ci" / "check_coverage.py"
spec = importlib.util.spec_from_file_location("ci_coverage", PATH)
coverage = importlib.util.module_from_spec(spec)
sys.modules["ci_coverage"] = coverage
spec.loader.exec_module(coverage)

FILE = "csrc/ops/sum/sum_simt.cuh"
SOURCE = """template <class T>
struct SumKernel {
  HW_DEVICE static void main(const Params& p) {
    if (p.wide) load(p);
    if (p.rows) store(p), dev::sync_block();
    dev::sync_warp();
  }
};
inline void launch(const Params& p) {
  check(p.rows >= 0 && p.rows < kMost,
        "too many");
  const bool split = p.rows > 4;
  launch<SumKernel<float>>(p, split);
}
"""
FLOAT, DOUBLE = "hw::SumKernel<float>::main(Params)", "hw::SumKernel<double>::main(Params)"


def function(name, first, last, runs):
    return {"name": name, "demangled_name": name, "start_line": first, "end_line": last,
            "execution_count": runs}  # fmt: skip


def line(name, number, count, *branches):
    return {"line_number": number, "count": count, "function_name": name,
            "branches": [{"count": n, "throw": thrown} for n, thrown in branches]}  # fmt: skip


def unit():
    """Everything is reached but the exceptions, a check that fails, and one side of a condition of
    the device, which is not asked for."""
    return {"files": [
        {"file": "/usr/include/vector", "functions": [], "lines": []},
        {
            "file": f"/somewhere/{FILE}",
            "functions": [function(FLOAT, 3, 7, 5), function(DOUBLE, 3, 7, 3),
                          function("launch", 9, 14, 2)],
            "lines": [
                *(line(f, n, 3) for f in (FLOAT, DOUBLE) for n in (3, 6)),
                *(line(f, 4, 3, (3, False), (0, False)) for f in (FLOAT, DOUBLE)),
                *(line(f, 5, 3, (2, False), (1, False)) for f in (FLOAT, DOUBLE)),
                line("launch", 10, 2, (2, False), (0, False)),
                line("launch", 11, 2),
                line("launch", 12, 2, (1, False), (1, False), (0, True)),
                line("launch", 13, 2, (2, False), (0, True)),
            ],
        },
    ]}  # fmt: skip


def found(*units):
    counted = coverage.Counts()
    for u in units:
        counted.add(u)
    return [(f.line, f.kind) for f in coverage.findings(counted, lambda name: SOURCE)]


def changed(number, **to):
    """The unit with other counts in the lines of that number."""
    made = copy.deepcopy(unit())
    for x in made["files"][1]["lines"]:
        if x["line_number"] == number:
            x.update(to)
    return made


def test_what_is_reached_is_no_finding():
    assert found(unit()) == []


@pytest.mark.parametrize(
    "number, to, expected",
    [
        (3, {"count": 0}, [(3, "line")]),
        (5, {"branches": line("", 0, 0, (3, False), (0, False))["branches"]}, [(5, "barrier")]),
        (13, {"count": 0}, [(13, "line")]),
        (12, {"branches": line("", 0, 0, (2, False), (0, False))["branches"]}, [(12, "branch")]),
        # gcov names no function of a line that a lambda shares with the function around it.
        (3, {"count": 0, "function_name": None}, [(3, "line")]),
    ],
)
def test_what_is_not_reached(number, to, expected):
    assert found(changed(number, **to)) == expected
    assert found(changed(number, **to), unit()) == [], "another unit reaches it"


def test_barriers_are_asked_of_every_instance_that_runs():
    made = unit()
    for x in made["files"][1]["lines"]:
        if x["function_name"] == DOUBLE and x["line_number"] in (3, 6):
            x["count"] = 0
    assert found(made) == [(6, "barrier")], "line 3 has none, and another instance reaches it"


def test_kernels_that_are_never_launched():
    made = unit()
    made["files"][1]["functions"][1]["execution_count"] = 0
    assert found(made) == [(3, "instance")]


def test_files_that_count():
    assert [coverage.counts(f"csrc/{f}") for f in (
        "core/gpu/tile.cuh", "core/gpu/csr.cuh", "ops/x/x.cpp", "ops/x/x_plan.h",
        "softmax/simt/loop.cuh", "core/host/registry.cpp", "core/host/call.h", "ops/x/x_cpu.cpp",
        "ops/x/x_cpu_rows.h", "softmax/cpu/tile.h", "emu/run.cpp",
    )] == 5 * [True] + 6 * [False]  # fmt: skip


def test_explanations():
    finding = coverage.Finding(FILE, 5, "line", "store(p);")
    entries = [
        {"file": FILE, "line": "store", "reason": "r"},
        {"file": FILE, "line": "store", "kinds": ["branch"], "reason": "r"},
        {"file": "csrc/ops/other", "line": "store", "reason": "r"},
        {"file": FILE, "line": "load", "reason": "r"},
    ]
    assert coverage.unexplained([finding], entries) == ([], entries[1:])
    assert coverage.unexplained([finding], entries[1:]) == ([finding], entries[1:])


def test_every_pair_of_values_meets():
    options = {"a": (1, 2, 3, 4), "b": (False, True), "c": ("x", "y", "z"), "d": (None, 0.0)}
    chosen = list(pairwise(**options))
    assert len(chosen) < 18 and chosen == list(pairwise(**options))
    for (a, xs), (b, ys) in itertools.combinations(options.items(), 2):
        assert set(itertools.product(xs, ys)) == {(c[a], c[b]) for c in chosen}
    assert all(c in ({"n": 1, "m": 2}, {}) for c in pairwise(a=({"n": 1, "m": 2}, {}), b=({},)))
