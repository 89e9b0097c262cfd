# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the routing operators, on the reference and at small sizes: that all contenders
of a case compute the same, and how targets are judged. No test asserts how long anything takes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo

from headworks.testing import compare

sys.path.insert(0, str(Path(__file__).parents[1]))

bilevel = importlib.import_module("bench.bilevel_routing")
kmeans = importlib.import_module("bench.kmeans_routing")
moh = importlib.import_module("bench.moh_attention")
peers = importlib.import_module("bench.routing_peers")
report = importlib.import_module("bench.report")
fill_docs = importlib.import_module("bench.fill_docs")
suite = importlib.import_module("bench.suite")
timing = importlib.import_module("bench.timing")


@pytest.fixture
def small(monkeypatch):
    """The suites with sizes that the reference computes at once."""
    monkeypatch.setattr("headworks._native.DEFAULT_BACKEND", "reference")
    for module, sizes in (
        (bilevel, {"STAGES": ((14, 3, 2), (14, 3, 2)), "BATCH": {"cpu": 2}}),
        (bilevel, {"GROWTH": (16, 24, 32, 40)}),
        (kmeans, {"S": 60, "K": 4, "LONG_S": 80, "LONG_K": 4, "GROWTH": {"cpu": (2, 3, 4, 5)}}),
        (moh, {"S": 40, "H": 4, "BATCH": {"cpu": 2}}),
    ):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)


def cases(module, words):
    return [c for c in module.cases("cpu", True) if any(w in c.name for w in words)]


# A peer that computes something else would make every ratio meaningless.


@pytest.mark.parametrize(
    ("module", "number"), [(bilevel, 8), (kmeans, 6), (moh, 12)], ids=["bilevel", "kmeans", "moh"]
)
def test_contenders_of_a_case_compute_the_same(small, module, number):
    compared = 0
    for case in cases(module, ("forward", "train")):
        results = {}
        for name, call in case.contenders().items():
            if name in ("sdpa", "dense"):  # the user's alternative is another function
                continue
            torch.manual_seed(1)  # of the cotangent
            made = call()
            results[name] = made if isinstance(made, tuple) else (made,)
        ours = results.pop("headworks")
        for name, theirs in results.items():
            for part, (got, want) in enumerate(zip(theirs, ours, strict=True)):
                if module is moh and part == 3:  # ours has no gradient where the gate is 0
                    got = torch.where(want == 0, 0, got)
                compare(got, want.double(), torch.float32, name=f"{case.name}: {name} {part}")
        compared += len(results)
    assert compared == number


@pytest.mark.parametrize("module", [bilevel, kmeans], ids=["bilevel", "kmeans"])
def test_contenders_route_alike(small, module):
    (case,) = cases(module, ("route ",))
    calls = case.contenders()
    ours, theirs = (calls[n]().sort(-1).values for n in ("headworks", "eager"))
    compare(theirs, ours, torch.float32)
    assert len(theirs.unique()) > 3


@pytest.mark.parametrize("module", [bilevel, kmeans, moh], ids=["bilevel", "kmeans", "moh"])
def test_growth_and_overhead_run(small, module):
    chosen = cases(module, ("growth", "overhead"))
    assert [c.name for c in chosen][-1] == "overhead"
    for case in chosen:
        for name, call in case.contenders().items():
            assert isinstance(call(), torch.Tensor), name


def test_half_of_the_heads_are_chosen():
    for share in moh.ACTIVE:
        gate = moh.inputs("cpu", share)[3]
        assert ((gate != 0).sum(-1) == share * moh.H).all()
        compare(gate.sum(-1), torch.full(gate.shape[:2], share * moh.H).double(), torch.float32)
        # every head has rows to leave out, another set of them each
        assert ((gate != 0).float().mean(1) < 1).all() and len(gate.unique(dim=2)[0, 0]) == moh.H


def test_the_package_is_a_peer_where_it_is_installed():
    if importlib.util.find_spec("routing_transformer") is None:
        pytest.skip("the peer is not installed: pip install routing-transformer")
    names = peers.kmeans_routed_peers(torch.randn(2, 4, 8), 5, causal=True, compiled=True)
    assert list(names) == ["eager", "compiled", "routing-transformer"]


def result(case, shape=None, **seconds):
    times = {name.replace("_", " "): timing.Times(t, t, t, 5) for name, t in seconds.items()}
    return case, suite.Result(case, shape or {}, times)


def judged(module, *results):
    return {t.name: (t.figure, t.verdict) for t in module.targets(dict(results), "cpu")}


def test_targets_of_bilevel_routing():
    verdicts = judged(
        bilevel,
        result(
            "forward 56x56 topk 1",
            **{"headworks": 1.0, "eager": 9.0, "compiled": 1.9, "compiled, indexed": 0.9},
        ),
        result("train 14x14 topk 16", headworks=1.0, eager=3.0),
        result("growth", **{str(4**i): float(4**i) for i in range(4)}),
    )
    assert verdicts["forward 56x56 topk 1: official form"] == (1.9, "miss")  # the best of two
    assert verdicts["forward 56x56 topk 1: any torch form"] == (0.9, "miss")
    assert verdicts["train 14x14 topk 16: official form"] == (3.0, "pass")
    assert verdicts["train 56x56 topk 1: official form"] == (None, "not measured")
    assert verdicts["growth exponent, regions of 64"] == (pytest.approx(1.0), "pass")
    assert len(verdicts) == 13


def test_targets_of_kmeans_routing():
    verdicts = judged(
        kmeans,
        result("forward S 8192", headworks=1.0, eager=4.0, compiled=2.9, sdpa=3.1),
        result("train S 8192", headworks=1.0, eager=2.5, compiled=2.6, sdpa=0.1),
        result("forward S 32768", headworks=1.0, sdpa=9.9),
        result("growth, routed", **{str(4**i): float(8**i) for i in range(4)}),
    )
    assert verdicts == {
        "forward S 8192: torch": (2.9, "miss"),
        "train S 8192: torch": (2.5, "pass"),
        "forward S 8192: causal SDPA": (3.1, "pass"),
        "forward S 32768: causal SDPA": (9.9, "miss"),
        "growth exponent, K = sqrt S": (None, "not measured"),
        "growth exponent, routed": (pytest.approx(1.5), "pass"),
    }


def test_targets_of_moh_attention():
    verdicts = judged(
        moh,
        result("forward full 50 %", {"active": 0.5}, headworks=0.54, dense=1.0),
        result("forward causal 75 %", {"active": 0.75}, headworks=0.9, dense=1.0),
    )
    assert verdicts["forward full 50 %: of its share of dense"] == (pytest.approx(1.08), "pass")
    assert verdicts["forward causal 75 %: of its share of dense"] == (pytest.approx(1.2), "miss")
    assert len(verdicts) == 8


def test_targets_name_cases_that_exist():
    for module in (bilevel, kmeans, moh):
        names = {case.name for case in module.cases("cpu", False)}
        figures = [t.name.split(":")[0] for t in module.targets({}, "cpu") if ":" in t.name]
        assert figures and set(figures) <= names
        assert module.cases("cuda", False)


def refuse():
    raise torch._dynamo.exc.TorchRuntimeError("no such kernel\nand a trace of it")


def test_a_peer_that_raises_is_a_row():
    calls = {"headworks": lambda: 1, "compiled, indexed": refuse}
    case = suite.Case("forward", {}, lambda: calls)
    made = suite.run_case(case, device="cpu", effort=suite.QUICK)
    assert made.failed == {"compiled, indexed": "TorchRuntimeError: no such kernel"}
    assert list(made.seconds) == ["headworks"]
    assert "failed" in report.result_table([made]) and "no such kernel" in report.result_table(
        [made]
    )
    machine = {"processor": "a machine", "threads": 2, "torch": "0"}
    data = report.as_json(machine, {"op": ([made], [])})
    (row,) = [r for r in fill_docs.tables("op", data, "").splitlines() if r.startswith("| forward")]
    assert row.endswith("| failed |")


@pytest.mark.parametrize("name", ["headworks", "eager"])
def test_every_contender_may_raise(name):
    calls = {"headworks": lambda: 1, "eager": lambda: 2, name: refuse}
    case = suite.Case("forward", {}, lambda: calls)
    made = suite.run_case(case, device="cpu", effort=suite.QUICK)
    assert made.failed == {name: "TorchRuntimeError: no such kernel"}
    assert made.seconds.keys() == {"headworks", "eager"} - {name}
    assert made.speedup("eager") is None and made.fraction("copy") is None


def test_a_contender_that_raises_later_is_left_out():
    """It runs at first: out of memory in the third round, say."""
    left = iter(range(4))

    def tire():
        if next(left, None) is None:
            raise RuntimeError("out of memory")

    case = suite.Case("forward", {}, lambda: {"headworks": lambda: 1, "eager": tire})
    made = suite.run_case(case, device="cpu", effort=suite.Effort(0.0, (3, 3)))
    assert made.failed == {"eager": "RuntimeError: out of memory"}
    assert made.seconds["headworks"].samples == 3 and "eager" not in made.seconds
