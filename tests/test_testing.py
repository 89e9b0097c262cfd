# SPDX-License-Identifier: Apache-2.0
"""The test tools themselves: what must fail does fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import headworks as hw
from headworks.testing import (
    HALF,
    LAYOUTS,
    assert_same_bits,
    check_case,
    compare,
    comparisons,
    poison_empty,
    restride,
    restride_empty,
)
from specs import SPECS

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
INF, NAN = float("inf"), float("nan")


def tensor(*values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


def test_compare_accepts_what_it_should():
    before = comparisons()
    compare(tensor(1.0, INF, NAN), tensor(1.0, INF, NAN), F64)
    compare(tensor(100.0, 1.0), tensor(100.001, 1.0), F32)
    rough = tensor(1.02, dtype=F64)
    compare(tensor(1.05), tensor(1.0), BF16, reference=rough)
    compare(torch.empty(0, 3), torch.empty(0, 3), F64)
    assert comparisons() == before + 4


@pytest.mark.parametrize(
    ("actual", "oracle", "dtype", "words"),
    (
        (tensor(1.0, 2.1), tensor(1.0, 2.0), F32, "1 of 2 elements off"),
        (tensor(1.0 + 1e-9), tensor(1.0), F64, "error 1e-09"),
        (tensor(NAN, 1.0), tensor(0.0, 1.0), F64, "isnan at 1 places"),
        (tensor(0.0, 1.0), tensor(NAN, 1.0), F64, "isnan at 0 places"),
        (tensor(INF), tensor(-INF), F64, "isposinf"),
        (tensor(1.0), tensor(1.0, 2.0), F64, "shape"),
        (tensor(1.1), tensor(1.0), BF16, "off"),
    ),
    ids=str,
)
def test_compare_refuses_what_it_should(actual, oracle, dtype, words):
    with pytest.raises(AssertionError, match=words):
        compare(actual, oracle, dtype, reference=oracle.clone())


def planted(kind, x, y, dtype):
    """y with a fault that no single element gives away."""
    y = y.clone()
    if kind == "scaled":
        return y * 1.01
    if kind == "small elements dropped":
        y[x.abs() < 0.01 * x.abs().max()] = 0
    if kind == "a row scaled":
        y[2, 7] *= 1.1 if dtype == BF16 else 1.01
    if kind == "a small row lost":
        y[1, 3] = 0
    return y


@pytest.mark.parametrize("dtype", (BF16, torch.float16, F32), ids=str)
@pytest.mark.parametrize("size", (0.1, 1.0, 100.0))
@pytest.mark.parametrize(
    "kind", ("", "scaled", "small elements dropped", "a row scaled", "a small row lost")
)
def test_what_no_element_gives_away(kind, size, dtype):
    """Right but for rounding passes; 1 % too much, and what is lost among larger numbers, do not.
    Below 1, where the noise of an element no longer shrinks with it, only sums over many tell."""
    generator = torch.Generator().manual_seed(3)
    x = size * torch.randn(4, 50, 24, generator=generator, dtype=F64)
    x[1, 3] *= 0.25
    y, reference = x.to(dtype), (x * 1.0001).to(dtype)
    wrong = planted(kind, x, y.double(), dtype)
    if not kind:
        compare(wrong, x, dtype, reference=reference)
    elif size >= 1 or dtype == F32 or kind in ("scaled", "small elements dropped"):
        words = {"scaled": "slope of all|norm|elements off", "small elements dropped": "slope of "
                 "small|elements off"}.get(kind, "of row|elements off")  # fmt: skip
        with pytest.raises(AssertionError, match=words):
            compare(wrong, x, dtype, reference=reference)


def test_sixteen_bits_need_a_reference():
    with pytest.raises(AssertionError, match="need the reference"):
        compare(tensor(1.0), tensor(1.0), BF16)


def test_same_bits():
    assert_same_bits(tensor(NAN, 0.0), tensor(NAN, 0.0))
    for a, b in ((0.0, -0.0), (1.0, 1.0 + 2**-52)):
        with pytest.raises(AssertionError, match="1 of 1 elements differ"):
            assert_same_bits(tensor(a), tensor(b))
    with pytest.raises(AssertionError, match="float32"):
        assert_same_bits(tensor(1.0), tensor(1.0, dtype=F32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values(layout):
    x = torch.randn(2, 3, 4, 5)
    y = restride(x, layout)
    assert y.shape == x.shape
    expected = x[:1].expand_as(x) if layout == "expanded" else x
    assert torch.equal(y, expected)
    assert (y.stride() == x.stride()) == (layout == "contiguous")
    assert restride(torch.ones(3), layout).is_contiguous()


def test_poison():
    with poison_empty():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 0x7F).all()
        assert torch.empty(3, device="meta").is_meta
        assert torch.ones(2).new_empty(3).isnan().all()


def test_empty_of_another_layout():
    with poison_empty(), restride_empty("strided"):
        x = torch.empty(2, 3)
        y = x.new_empty((2, 3), dtype=torch.int64)
    assert x.stride() == y.stride() == (6, 2)
    assert x.isnan().all() and torch.empty(2, 3).is_contiguous()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_wrong_operator_is_caught(spec):
    """Each output and each gradient off by a little, one at a time."""
    case = spec.sample_cases[0]
    names = spec.run(spec.make(case, F32), case, "cpu")
    for wrong in names:

        def run(tensors, case, backend, wrong=wrong):
            outputs = spec.run(tensors, case, backend)
            if backend != "reference":
                outputs[wrong] = outputs[wrong] * 1.001
            return outputs

        with pytest.raises(AssertionError, match=f": (d_)?{wrong[0]}"):
            check_case(type(spec)(**{**vars(spec), "run": run}), case, "cpu", F32)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.differentiable], ids=str)
def test_a_wrong_gradient_is_caught(spec):
    case = spec.sample_cases[0]
    for wrong in (n for n in spec.differentiable if n in spec.make(case, F32)):

        def run(tensors, case, backend, wrong=wrong):
            x = tensors[wrong]
            if backend != "reference" and x.requires_grad:
                x = x + 0.01 * (x - x.detach())
            return spec.run({**tensors, wrong: x}, case, backend)

        with pytest.raises(AssertionError, match=f": d_{wrong}:"):
            check_case(type(spec)(**{**vars(spec), "run": run}), case, "cpu", F32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("spec", [s for s in SPECS if "q" in s.differentiable], ids=str)
def test_gradients_one_percent_too_large_are_caught(spec, dtype):
    """In 16 bits as well, whose elements are rounded more coarsely than that."""
    case = spec.sample_cases[0]
    for wrong in (n for n in ("q", "k", "v") if n in spec.differentiable):

        def run(tensors, case, backend, wrong=wrong):
            x = tensors[wrong]
            if backend != "reference" and x.requires_grad:
                x = Scaled.apply(x)
            return spec.run({**tensors, wrong: x}, case, backend)

        with pytest.raises(AssertionError, match=f": d_{wrong}: "):
            check_case(type(spec)(**{**vars(spec), "run": run}), case, "cpu", dtype)


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is 1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return (grad.double() * 1.01).to(grad.dtype)


def test_an_operator_test_without_comparison_fails(tmp_path):
    """The hook in conftest.py, seen from outside."""
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_nothing.py").write_text(
        "import pytest, torch\n"
        "from headworks.testing import compare\n"
        "@pytest.mark.operator\n"
        "def test_idle(): pass\n"
        "@pytest.mark.operator\n"
        "def test_busy(): compare(torch.ones(1), torch.ones(1), torch.float32)\n"
        "def test_unmarked(): assert torch.empty(1).isnan()\n"
        "@pytest.mark.operator\n"
        "@pytest.mark.no_comparison\n"
        "def test_refuses(): pass\n"
        "@pytest.mark.operator\n"
        "@pytest.mark.no_comparison\n"
        "def test_compares(): compare(torch.ones(1), torch.ones(1), torch.float32)\n"
    )
    code = "import sys, pytest; sys.path.insert(0, sys.argv.pop(1)); sys.exit(pytest.main())"
    folder = str(Path(hw.__file__).parents[1])
    command = [sys.executable, "-c", code, folder, "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "2 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "this operator test compared nothing" in done.stdout
    assert "this test compares: it needs no mark no_comparison" in done.stdout
