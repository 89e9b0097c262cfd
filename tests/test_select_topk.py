# SPDX-License-Identifier: Apache-2.0
"""select_topk: its order, ties, NaN, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import headworks as hw
from backends import targets
from headworks.testing import assert_same_bits
from identities import Refused, allocates_nothing, randn
from routing_checks import cases_of, check_example, check_reference
from specs.select_topk import SPEC

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
BACKENDS = sorted({backend for backend, device, _ in targets(SPEC) if device == "cpu"})


@pytest.mark.parametrize("case, dtype", cases_of(SPEC))
def test_reference(case, dtype):
    check_reference(SPEC, case, dtype)


def by_rank(row):
    """The definition, one number at a time."""
    key = [(math.isnan(s), 0.0 if math.isnan(s) else -s, i) for i, s in enumerate(row)]
    return [i for _, _, i in sorted(key)]


@pytest.mark.parametrize("dtype", (F64, F32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", (*SPEC.sample_cases, *SPEC.emulator_cases), ids=str)
def test_is_the_definition(case, dtype):
    score = SPEC.make(case, dtype)["score"]
    k, keep_order = case.options["k"], case.options["keep_order"]
    actual = hw.select_topk(score, k, keep_order=keep_order, backend="reference")
    expected = [by_rank(row)[:k] for row in score.double().flatten(0, -2).tolist()]
    expected = [sorted(row) for row in expected] if keep_order else expected
    assert_same_bits(actual.flatten(0, -2), torch.tensor(expected).view(len(expected), k).long())


def test_equal_scores_and_nan():
    nan, inf = torch.nan, torch.inf
    score = torch.tensor([nan, -inf, 0.0, nan, -0.0, inf, -inf, 0.0])
    ranks = hw.select_topk(score, 8, keep_order=False, backend="reference")
    assert_same_bits(ranks, torch.tensor([5, 2, 4, 7, 1, 6, 0, 3]))
    kept = hw.select_topk(score, 4, backend="reference")
    assert_same_bits(kept, torch.tensor([2, 4, 5, 7]))


def test_agrees_with_torch_where_nothing_ties():
    score = randn(3, 5, 200)
    expected = score.topk(40).indices
    assert_same_bits(hw.select_topk(score, 40, keep_order=False, backend="reference"), expected)
    kept = hw.select_topk(score, 40, backend="reference")
    assert_same_bits(kept, expected.sort(-1).values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_thousands_of_a_row(backend):
    score = randn(1, 6000, dtype=F32)
    index = hw.select_topk(score, 5000, backend=backend)
    assert_same_bits(index, hw.select_topk(score, 5000, backend="reference"))


@pytest.mark.no_comparison
def test_has_no_gradient():
    score = randn(3, 9).requires_grad_()
    index = hw.select_topk(score, 2, backend="reference")
    assert index.dtype == torch.int64 and not index.requires_grad


@pytest.mark.no_comparison
def test_example():
    check_example(hw.select_topk)


BAD = (
    Refused(TypeError, "score", "a list", score=[1.0, 2.0]),
    Refused(TypeError, "score", "int64", score=torch.zeros(5, dtype=torch.int64)),
    Refused(ValueError, "score", "[..., N]", score=torch.zeros(())),
    Refused(ValueError, "k", "6", "from 0 to 5", k=6),
    Refused(ValueError, "k", "-1", k=-1),
    Refused(TypeError, "k", "2.0", "integer", k=2.0),
    Refused(TypeError, "k", "True", k=True),
    Refused(TypeError, "k", "int64", k=torch.tensor(2)),
    Refused(TypeError, "keep_order", "1", "True or False", keep_order=1),
    Refused(ValueError, "backend", "'gpu'", backend="gpu"),
    Refused(RuntimeError, "simt", "cpu", "emulate:simt", backend="simt"),
)


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", BAD, ids=repr)
def test_bad_input(case, monkeypatch):
    arguments = {"score": torch.zeros(5), "k": 2} | case.arguments
    allocates_nothing(monkeypatch)
    score, k = arguments.pop("score"), arguments.pop("k")
    case.check(lambda: hw.select_topk(score, k, **arguments))
