# SPDX-License-Identifier: Apache-2.0
"""The references against the definitions, written as loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from headworks.reference import key_scan as ks
from headworks.reference import linear_attention as la
from headworks.testing import compare

pytestmark = pytest.mark.operator

F64 = torch.float64
MAPS = tuple(la.PRE)


def rand(*shape):
    return torch.randn(shape, dtype=F64)


def weight(feature_map, q, k, scale):
    s = scale * float(la.PRE[feature_map](q) @ la.PRE[feature_map](k))
    return 1 + s + s * s / 2 if feature_map == "taylor2" else s


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("normalize", (True, False))
def test_definition(feature_map, causal, normalize):
    """o_i = sum_j w_ij v_j / (sum_j w_ij + eps), one sum at a time."""
    s, d, dv, scale, eps = 5, 3, 2, 0.7, 0.1
    q, k, v = rand(1, s, 2, d).abs(), rand(1, s, 1, d).abs(), rand(1, s, 1, dv)
    expected = torch.zeros(1, s, 2, dv, dtype=F64)
    for h in range(2):
        for i in range(s):
            seen = range(i + 1) if causal else range(s)
            w = [weight(feature_map, q[0, i, h], k[0, j, 0], scale) for j in seen]
            total = sum(w_j * v[0, j, 0] for w_j, j in zip(w, seen, strict=True))
            expected[0, i, h] = total / (sum(w) + eps) if normalize else total
    o, _ = la.linear_attention(
        q, k, v, feature_map=feature_map, is_causal=causal, normalize=normalize, scale=scale,
        eps=eps,
    )  # fmt: skip
    compare(o, expected, F64)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("d", (1, 2, 16, 32))
def test_features_give_the_weights(feature_map, d):
    """sum_f c_f m_f(q) m_f(k) = w(q, k), and the documented number and order of features."""
    q, k, scale = rand(d), rand(d), 0.3
    m_q, m_k = la.features(q, feature_map), la.features(k, feature_map)
    c = la.coefficients(d, feature_map, scale, q)
    assert len(m_q) == (1 + d + d * (d + 1) // 2 if feature_map == "taylor2" else d)
    w = torch.tensor(weight(feature_map, q, k, scale), dtype=F64)
    compare((c * m_q * m_k).sum(), w, F64)


def test_order_of_features():
    x = torch.tensor([2.0, 3.0, 5.0], dtype=F64)
    expected = [1, 2, 3, 5, 4, 6, 10, 9, 15, 25]
    compare(la.features(x, "taylor2"), torch.tensor(expected, dtype=F64), F64)


def test_full_form_equals_symmetric_form():
    """The paper's 273 features at D = 16 have the inner products of the 153 here."""
    q, k = rand(16), rand(16)

    def full(x):
        x = x / 16**0.25
        return torch.cat([torch.ones(1, dtype=F64), x, torch.outer(x, x).flatten() / math.sqrt(2)])

    c = la.coefficients(16, "taylor2", 0.25, q)
    symmetric = (c * la.features(q, "taylor2") * la.features(k, "taylor2")).sum()
    assert full(q).numel() == 273 and c.numel() == 153
    compare(symmetric, full(q) @ full(k), F64)


@pytest.mark.parametrize("feature_map", MAPS)
def test_state_is_the_recurrence(feature_map):
    """S <- S + m(k) v^T, n <- n + m(k), o = c m(q) S / c m(q) n."""
    q, k, v = rand(1, 6, 1, 4).abs(), rand(1, 6, 1, 4).abs(), rand(1, 6, 1, 3)
    o, state = la.linear_attention(q, k, v, feature_map=feature_map)
    m_k = la.features(k[0, :, 0], feature_map)
    big_s, n = torch.zeros(m_k.shape[1], 3, dtype=F64), torch.zeros(m_k.shape[1], dtype=F64)
    for i in range(6):
        big_s = big_s + torch.outer(m_k[i], v[0, i, 0])
        n = n + m_k[i]
        phi = la.features(q[0, i, 0], feature_map)
        phi = phi * la.coefficients(4, feature_map, 0.5, phi)
        compare(o[0, i, 0], phi @ big_s / (phi @ n), F64)
    compare(state.kv[0, 0], big_s, F64)
    compare(state.z[0, 0], n, F64)


def test_a_row_of_zero_weight_is_zero():
    """relu of negative numbers: z = 0, output 0, gradients 0 and finite."""
    q = -torch.ones(1, 3, 1, 2, dtype=F64, requires_grad=True)
    k, v = rand(1, 3, 1, 2).abs().requires_grad_(), rand(1, 3, 1, 2).requires_grad_()
    o, _ = la.linear_attention(q, k, v, feature_map="relu")
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    for x in (o, *grads):
        compare(x, torch.zeros_like(x), F64)


def test_key_scan_definition():
    s, v = rand(1, 6, 2), rand(1, 6, 2, 3)
    o, state = ks.key_scan(s, v)
    for h in range(2):
        for i in range(6):
            p = s[0, : i + 1, h].exp()
            compare(o[0, i, h], (p[:, None] * v[0, : i + 1, h]).sum(0) / p.sum(), F64)
    compare(state.o, o[:, -1], F64)
    compare(state.lse, s.exp().sum(1).log(), F64)


def test_key_scan_recurrence_from_a_state():
    s, v, o_0, lse_0 = rand(1, 6, 2), rand(1, 6, 2, 3), rand(1, 2, 3), rand(1, 2)
    o, state = ks.key_scan(s, v, initial_state=(o_0, lse_0))
    for i in range(6):
        lse = torch.logaddexp(lse_0, s[:, i])
        o_0 = (lse_0 - lse).exp()[..., None] * o_0 + (s[:, i] - lse).exp()[..., None] * v[:, i]
        lse_0 = lse
        compare(o[:, i], o_0, F64)
    compare(state.o, o_0, F64)
    compare(state.lse, lse_0, F64)


def test_references_have_right_gradients():
    """First and second derivatives against finite differences."""
    q, k, v = (rand(1, 4, 1, n).requires_grad_() for n in (2, 2, 2))
    s = rand(1, 4, 1).requires_grad_()

    def based(q, k, v):
        o, state = la.linear_attention(q, k, v)
        return o, *state

    def scan(s, v):
        o, state = ks.key_scan(s, v)
        return o, *state

    for function, inputs in ((based, (q, k, v)), (scan, (s, v))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    compare(based(q, k, v)[0], based(q, k, v)[0], F64)
