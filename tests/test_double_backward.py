# SPDX-License-Identifier: Apache-2.0
"""Gradients are of first order: whoever differentiates one is told, and never gets it for a
constant. Read-outs without a gradient say so."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from headworks.nn import functional
from identities import randn
from specs import SPECS

pytestmark = [pytest.mark.operator, pytest.mark.no_comparison]

DIFFERENTIABLE = [s for s in SPECS if s.differentiable]
REFUSED = "a second derivative is asked for .*expected gradients of first order"


def total(outputs):
    """Their sum: its cotangents are constants."""
    return sum(x.sum() for x in outputs.values() if x.requires_grad)


def wanted(spec, case, dtype=torch.float32):
    """(tensors, those with a gradient by name)"""
    tensors = spec.make(case, dtype)
    given = {n: tensors[n].requires_grad_() for n in spec.differentiable if n in tensors}
    return tensors, given


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=str)
def test_every_operator_refuses(spec):
    for case in spec.sample_cases:
        tensors, given = wanted(spec, case)
        name = spec.name.removesuffix("_step")
        for square in (False, True):
            value = total(spec.run(tensors, case, "cpu"))
            value = value.square() if square else value
            grads = torch.autograd.grad(
                value, list(given.values()), create_graph=True, allow_unused=True
            )
            for grad in grads:
                if grad is None:
                    continue
                assert grad.requires_grad, "its graph is not cut"
                with pytest.raises(NotImplementedError, match=f"{name}: {REFUSED}.*reference"):
                    (total(spec.run(tensors, case, "cpu")) + grad.square().sum()).backward()
                with pytest.raises(NotImplementedError, match=REFUSED):
                    torch.autograd.grad(
                        grad.sum(), list(given.values()), retain_graph=True, allow_unused=True
                    )


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=str)
def test_hessians(spec):
    """torch.autograd.functional takes a way that is not there for zeros."""
    case = spec.sample_cases[0]
    tensors, given = wanted(spec, case)
    name, x = next(iter(given.items()))

    def value(y):
        return total(spec.run({**tensors, name: y}, case, "cpu"))

    for second in (torch.autograd.functional.hessian, torch.autograd.functional.vhp):
        arguments = (x.detach(),) if "hessian" in second.__name__ else (x.detach(), x.detach())
        with pytest.raises(NotImplementedError, match=REFUSED):
            second(value, *arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    q, k, v = (randn(1, 9, 2, 8, dtype=torch.float32, seed=seed) for seed in range(3))
    compiled = torch.compile(hw.attention, fullgraph=True, backend=backend)
    x = q.clone().requires_grad_()
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(compiled(x, k, v).sum(), x, create_graph=True)
        (compiled(x, k, v).sum() + g.square().sum()).backward()


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "gated_short_conv"])
def test_layers_of_one_node(name):
    """These have second derivatives, where a constant cotangent once dropped them."""
    x, weight = randn(1, 5, 6, seed=1), randn(6, seed=2)
    taps, bias = randn(3, 1, 2, seed=3), randn(3, seed=4)
    given = {"rms_norm": (x, weight), "swiglu": (x,), "gated_short_conv": (x, taps, bias)}[name]
    given = [y.requires_grad_() for y in given]
    assert torch.autograd.gradgradcheck(getattr(functional, name), given)


def test_gradients_of_first_order_with_a_graph():
    """create_graph=True alone is no error, and the gradients are the same."""
    q, k, v = (randn(1, 9, 2, 8, seed=seed).requires_grad_() for seed in range(3))
    o = hw.attention(q, k, v, is_causal=True)
    plain = torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True)
    graph = torch.autograd.grad(o.sum(), (q, k, v), create_graph=True)
    for x, y in zip(plain, graph, strict=True):
        assert torch.equal(x, y) and y.requires_grad and not x.requires_grad


READ_OUTS = ("entropy", "p_max", "sq_norm", "mass")


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("name", READ_OUTS)
def test_read_outs_have_no_gradient_and_say_so(name, lse):
    q, k, v = (randn(1, 9, 2, 8, seed=seed).requires_grad_() for seed in range(3))
    asked = torch.tensor([1, 2]) if name == "mass" else True
    aux = hw.Aux(lse=lse, **{name: asked})
    o, made = hw.attention(q, k, v, return_aux=aux)
    assert o.requires_grad and not getattr(made, name).requires_grad
    assert made.lse is None or made.lse.requires_grad == lse
    if name == "mass":
        return
    images = (x.view(1, 3, 3, 2, 8) for x in (q, k, v))
    o, made = hw.bilevel_routing_attention(*images, num_regions=(1, 1), topk=1, return_aux=aux)
    assert o.requires_grad and not getattr(made, name).requires_grad
    assert made.lse is None or made.lse.requires_grad == lse
