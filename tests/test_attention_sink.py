# SPDX-License-Identifier: Apache-2.0
"""Learned sinks of attention: what they are equal to, in every result and replay."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from headworks.testing import compare
from identities import randn

pytestmark = pytest.mark.operator

F64 = torch.float64


def inputs(b=1):
    q, k = randn(b, 70, 2, 16), randn(b, 70, 2, 16, seed=1)
    return q, k, randn(b, 70, 2, 24, seed=2)


@pytest.mark.parametrize("sink", ["h", "bh"])
def test_a_sink_is_a_key_without_a_value(sink):
    """Its score is the logit, whatever the query: in the output, the read-outs, the gradients and
    every replay of the weights."""
    q, k, v = inputs(b=2)
    z = randn(*((2, 2) if sink == "bh" else (2,)), seed=7)
    given = [x.requires_grad_() for x in (q, k, v, z)]
    o, aux = hw.attention(q, k, v, sink=z, is_causal=True, return_aux=hw.Aux(lse=True))
    # The key comes first: causal masks are aligned at the other end.
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 0)) for x in (k, v)]
    beta = torch.nn.functional.pad(z.expand(2, 2)[..., None], (0, 70))
    expected, more = hw.attention(
        q, *longer, key_bias=beta, is_causal=True, return_aux=hw.Aux(lse=True)
    )
    compare(o, expected, F64)
    compare(aux.lse, more.lse, F64)
    g, d_lse = randn(*o.shape, seed=8), randn(*aux.lse.shape, seed=9)
    ours = torch.autograd.grad((o * g).sum() + (aux.lse * d_lse).sum(), given)
    theirs = torch.autograd.grad((expected * g).sum() + (more.lse * d_lse).sum(), given)
    for x, y in zip(ours, theirs, strict=True):
        compare(x, y, F64)
    with torch.no_grad():
        p = hw.attention_probs(q, k, sink=z, is_causal=True, rows=torch.arange(70))
        compare(torch.einsum("bhij,bjhd->bihd", p, v), o.detach(), F64)
        compare(hw.column_stats(q, k, sink=z, is_causal=True), p.sum(2), F64)
        y = hw.attention_transpose(q, k, g, sink=z, is_causal=True)
        compare(y, torch.einsum("bhij,bihd->bjhd", p, g), F64)
        compare(hw.attention_lse(q, k, sink=z, is_causal=True), aux.lse.detach(), F64)


def test_sinks_of_logit_0_and_of_none():
    q, k, v = inputs()
    zero, none = torch.zeros(2, dtype=F64), torch.full((2,), -torch.inf, dtype=F64)
    compare(hw.attention(q, k, v, sink=zero), hw.attention(q, k, v, activation="softmax1"), F64)
    compare(hw.attention(q, k, v, sink=none), hw.attention(q, k, v), F64)
