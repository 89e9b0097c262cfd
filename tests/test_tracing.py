# SPDX-License-Identifier: Apache-2.0
"""Whoever records or replaces operations: the values of the call, or an error, never memory that
nobody wrote."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import headworks as hw
from headworks.testing import assert_same_bits, compare
from identities import randn
from specs import SPECS

pytestmark = [
    pytest.mark.operator,
    # Deprecations of torch's own making.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def runner(spec, case, names):
    def run(*tensors):
        outputs = spec.run(dict(zip(names, tensors, strict=True)), case, "cpu")
        return tuple(outputs.values())

    return run


def call_of(spec):
    """(function of tensors, two sets of them)"""
    case = spec.sample_cases[0]
    first, second = (spec.make(case, torch.float32, seed=seed) for seed in (0, 1))
    names = tuple(first)
    return runner(spec, case, names), tuple(first.values()), tuple(second.values())


def check(recorded, run, tensors, same=assert_same_bits):
    copies = [[x.clone() for x in tensors] for _ in range(2)]  # states are updated in place
    for x, y in zip(recorded(*copies[0]), run(*copies[1]), strict=True):
        same(x, y)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_jit_trace(spec, tmp_path):
    run, first, second = call_of(spec)
    with torch.no_grad():
        traced = torch.jit.trace(run, [x.clone() for x in first], check_trace=False)
    # torch.jit.trace computes with sizes in fp32: the default scale is rounded.
    check(traced, run, second, lambda x, y: compare(x, y, torch.float32))
    file = str(tmp_path / "traced.pt")
    torch.jit.save(traced, file)
    check(torch.jit.load(file), traced, second)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.differentiable], ids=str)
@pytest.mark.no_comparison
def test_jit_trace_has_no_gradient(spec):
    run, first, _ = call_of(spec)
    first = [x.clone().requires_grad_() if x.is_floating_point() else x for x in first]
    with pytest.raises(NotImplementedError, match=r"requires grad, in torch\.jit\.trace.*no_grad"):
        torch.jit.trace(run, first, check_trace=False)


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_make_fx(spec, mode, pre_dispatch):
    run, first, second = call_of(spec)
    copies = [x.clone() for x in first]
    graph = make_fx(run, tracing_mode=mode, pre_dispatch=pre_dispatch)(*copies)
    assert "headworks" in graph.code
    check(graph, run, second)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_with_gradient(mode):
    def gradient(q, k, v):
        q = q.detach().requires_grad_()
        return torch.autograd.grad(hw.attention(q, k, v, is_causal=True).sum(), q)

    tensors = [randn(1, 9, 2, 8, seed=seed) for seed in range(3)]
    graph = make_fx(gradient, tracing_mode=mode)(*(x + 1 for x in tensors))
    check(graph, gradient, tensors)


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_subclasses(spec):
    run, first, _ = call_of(spec)
    expected = run(*(x.clone() for x in first))
    for make in (
        lambda x: x.clone().as_subclass(Plain),
        lambda x: torch.nn.Parameter(x.clone(), requires_grad=False),
    ):
        made = run(*(make(x) if x.is_floating_point() else x.clone() for x in first))
        for x, y in zip(made, expected, strict=True):
            assert_same_bits(x.as_subclass(torch.Tensor), y)


def test_functional_call():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.k = torch.nn.Parameter(randn(1, 9, 2, 8))

        def forward(self, q):
            return hw.attention(q, self.k, self.k)

    q, k = randn(1, 9, 2, 8, seed=1), randn(1, 9, 2, 8, seed=2).requires_grad_()
    o = torch.func.functional_call(Layer(), {"k": k}, (q,))
    assert_same_bits(o, hw.attention(q, k, k))
    (grad,) = torch.autograd.grad(o.sum(), k)
    assert grad.abs().sum() > 0


def test_tensors_without_memory():
    """Zeros that torch keeps without memory are made real by its dispatcher."""
    q, k = torch._efficientzerotensor((1, 9, 2, 8)), torch.randn(1, 9, 2, 8)
    assert_same_bits(hw.attention(q, k, k), hw.attention(torch.zeros(q.shape), k, k))


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Which operators of headworks it saw."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "headworks":
            self.seen.add(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_dispatch_mode_sees_the_call(spec):
    run, first, _ = call_of(spec)
    expected = run(*(x.clone() for x in first))
    with Counting() as counting:
        made = run(*(x.clone() for x in first))
    assert counting.seen
    for x, y in zip(made, expected, strict=True):
        assert_same_bits(x, y)
