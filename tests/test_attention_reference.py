# SPDX-License-Identifier: Apache-2.0
"""The reference of attention against the definition, written as loops over pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from headworks.reference import attention as reference
from headworks.testing import compare
from identities import randn
from specs.attention_cases import WEIGHTS

pytestmark = pytest.mark.operator

F64 = torch.float64
B, SQ, SK, HQ, H, D = 2, 5, 7, 4, 2, 3
SCALE, CAP = 0.7, 2.0


def tensors():
    bias = randn(B, 1, SQ, SK, seed=3)
    bias[0, 0, 1, 2] = -torch.inf
    bias[1, 0, 3] = -torch.inf
    return {
        "bias": bias,
        "key_bias": randn(B, HQ, SK, seed=4),
        "key_gain": randn(1, HQ, SK, seed=5),
        "row_temperature": randn(B, SQ, HQ, seed=6),
    }


def sees(i, j, causal, window):
    left, right = window
    diagonal = i + SK - SQ
    return (
        (left is None or j >= diagonal - left)
        and (right is None or j <= diagonal + right)
        and (not causal or j <= diagonal)
    )


def score(q, k, t, b, h, i, j):
    x = SCALE * float(t["row_temperature"][b, i, h] * (q[b, i, h] @ k[b, j, h // (HQ // H)]))
    y = CAP * math.tanh(x / CAP)
    gain = float(t["key_gain"][0, h, j]) if i >= SQ - 2 else 0.0
    return y + gain * abs(y) + float(t["bias"][b, 0, i, j] + t["key_bias"][b, h, j])


def a(activation, s):
    return {
        "softmax": math.exp,
        "softmax1": math.exp,
        "sigmoid": lambda s: 1 / (1 + math.exp(-s)) if s > -700 else 0.0,
        "relu": lambda s: max(s, 0.0),
        "relu2": lambda s: max(s, 0.0) ** 2,
    }[activation](s)


def normalizer(activation, name, values):
    if activation in ("softmax", "softmax1") or name == "sum":
        return sum(values) + (activation == "softmax1")
    return len(values) if name == "length" else 1


@pytest.mark.parametrize(
    "causal, window", ((False, (None, None)), (True, (2, None)), (False, (1, 2)))
)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_definition(weights, causal, window):
    """All options at once, one pair at a time; and the read-outs and columns of these weights."""
    q, k, v = randn(B, SQ, HQ, D), randn(B, SK, H, D, seed=1), randn(B, SK, H, 2, seed=2)
    t = tensors()
    p = torch.zeros(B, HQ, SQ, SK, dtype=F64)
    lse = torch.full((B, HQ, SQ), -torch.inf, dtype=F64)
    for b, h, i in itertools.product(range(B), range(HQ), range(SQ)):
        keys = [j for j in range(SK) if sees(i, j, causal, window)]
        values = [a(weights[0], score(q, k, t, b, h, i, j)) for j in keys]
        n = normalizer(*weights, values)
        for j, value in zip(keys, values, strict=True):
            p[b, h, i, j] = value / n if n else 0.0
        lse[b, h, i] = math.log(n) if n > 0 else -torch.inf
    options = {
        "scale": SCALE, "softcap": CAP, "gain_rows": (-2, None), "is_causal": causal,
        "window_size": window, "activation": weights[0], "normalizer": weights[1], **t,
    }  # fmt: skip
    found, found_lse = reference.weights(q, k, **options)
    compare(found, p, F64)
    o, statistics = reference.attention(q, k, v, **options)
    compare(o, torch.einsum("bhij,bjhe->bihe", p, v.repeat_interleave(2, 2)), F64)
    compare(reference.column_stats(q, k, **options), p.sum(2), F64)
    x = randn(B, SQ, HQ, 2, seed=7)
    y = reference.attention_transpose(q, k, x, **options)
    compare(y, torch.einsum("bhij,bihe->bjhe", p, x), F64)
    if statistics is None:
        assert found_lse is None
        return
    entropy = torch.where(p > 0, -p * torch.where(p > 0, p, 1).log(), 0).sum(-1)
    expected = (lse, entropy, p.amax(-1), (p * p).sum(-1))
    for actual, oracle in zip(statistics[:4], expected, strict=True):
        compare(actual, oracle, F64)


def test_reference_has_right_gradients():
    """First and second derivatives against finite differences."""
    given = {
        "q": randn(1, 3, 2, 2), "k": randn(1, 3, 1, 2, seed=1), "v": randn(1, 3, 1, 2, seed=2),
        "bias": randn(1, 1, 3, 3, seed=3), "key_bias": randn(1, 2, 3, seed=4),
        "key_gain": randn(1, 1, 3, seed=5), "row_temperature": randn(1, 3, 1, seed=6),
        "head_gate": randn(1, 3, 2, seed=7), "identity_mix": randn(2, seed=8),
    }  # fmt: skip
    inputs = [x.requires_grad_() for x in given.values()]

    def run(*inputs):
        named = dict(zip(given, inputs, strict=True))
        o, statistics = reference.attention(**named, is_causal=True, softcap=1.5)
        return o, statistics.lse

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    compare(run(*inputs)[0], run(*inputs)[0], F64)


def test_a_row_without_keys():
    """Weights, output and gradients 0; L -inf, for softmax1 0."""
    q, k = randn(1, 3, 1, 2).requires_grad_(), randn(1, 2, 1, 2, seed=1).requires_grad_()
    bias = torch.zeros(3, 2, dtype=F64)
    bias[2] = -torch.inf
    for activation, empty in (("softmax", -torch.inf), ("softmax1", 0.0)):
        o, statistics = reference.attention(
            q, k, k, bias=bias, is_causal=True, activation=activation
        )
        for i in (0, 2):  # one sees no key, the other only scores of -inf
            assert (o[:, i] == 0).all() and statistics.lse[0, 0, i] == empty
        grads = torch.autograd.grad(o.sum() + statistics.lse[0, 0, 1], (q, k))
        assert (grads[0][:, [0, 2]] == 0).all() and all(x.isfinite().all() for x in grads)
        compare(o[:, 0], torch.zeros_like(o[:, 0]), F64)
