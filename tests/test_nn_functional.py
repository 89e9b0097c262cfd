# SPDX-License-Identifier: Apache-2.0
"""Single autograd nodes of layers, of tensors that are not what they look like."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from headworks.nn import functional

# Calls of x [2, 5, 6] and what else they take, fp64.
NODES = {
    "gated_short_conv": (functional.gated_short_conv, (torch.randn(3, 1, 3), torch.randn(3))),
    "swiglu": (functional.swiglu, ()),
    "rms_norm": (functional.rms_norm, (torch.randn(6),)),
}


@pytest.mark.parametrize("name", NODES)
def test_cotangents_in_a_batch(name):
    call, others = NODES[name]
    given = [x.double().requires_grad_() for x in (torch.randn(2, 5, 6), *others)]
    y = call(*given)
    dy = torch.randn(3, *y.shape, dtype=y.dtype)
    made = torch.autograd.grad(y, given, dy, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(y, given, row, retain_graph=True) for row in dy]
    for x, want in zip(made, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(want))


@pytest.mark.parametrize("name", NODES)
def test_a_tensor_of_two_tensors(name):
    """A subclass, whose parts go their own ways."""
    call, others = NODES[name]
    a = [x.double() for x in (torch.randn(2, 5, 6), *others)]
    both = [TwoTensor(x, x.flip(0)).requires_grad_() for x in a]
    y = call(*both)
    made = torch.autograd.grad(y, both, TwoTensor(torch.ones_like(y.a), torch.ones_like(y.b)))
    for part in ("a", "b"):
        given = [getattr(x, part).detach().requires_grad_() for x in both]
        want = torch.autograd.grad(call(*given).sum(), given)
        for x, w in zip(made, want, strict=True):
            torch.testing.assert_close(getattr(x, part), w)
