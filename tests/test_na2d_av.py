# SPDX-License-Identifier: Apache-2.0
"""Neighbourhoods with given weights: identities, gradients, bad input. The rest is in
test_ops.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import headworks as hw
from backends import native_info
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, randn

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
BACKENDS = ["cpu"] + (["emulate:simt"] if native_info().get("emulator") else [])


def inputs(y=8, x=9, k=3, b=2, h=2, d=5, dtype=F64):
    taps = k * k if isinstance(k, int) else k[0] * k[1]
    return randn(b, y, x, h, taps, dtype=dtype), randn(b, y, x, h, d, dtype=dtype, seed=1)


def by_unfold(w, v, k):
    """Windows that lie within the image, and at the border those of the nearest such token."""
    b, y, x, h, d = v.shape
    image = v.permute(0, 3, 4, 1, 2).flatten(1, 2)  # [B, H D, Y, X]
    seen = F.unfold(image, k).unflatten(2, (y - k + 1, x - k + 1))
    seen = F.pad(seen, (k // 2,) * 4, mode="replicate").view(b, h, d, k * k, y, x)
    return torch.einsum("byxht,bhdtyx->byxhd", w, seen)


@pytest.mark.parametrize("k, y, x", [(1, 3, 4), (3, 3, 8), (5, 9, 6), (7, 7, 7), (7, 20, 9)])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_equals_unfolding_with_replicated_borders(backend, k, y, x):
    w, v = (t.requires_grad_() for t in inputs(y, x, k))
    o, want = hw.na2d_av(w, v, kernel_size=k, backend=backend), by_unfold(w, v, k)
    compare(o, want, F64)
    d_o = randn(*o.shape, seed=7)
    for a, e in zip(*(torch.autograd.grad(z, (w, v), d_o) for z in (o, want)), strict=True):
        compare(a, e, F64)


def test_windows_are_where_the_formula_has_them():
    """One key at a time, by the definition."""
    y, x, (ky, kx) = 6, 7, (3, 5)
    w, v = inputs(y, x, (ky, kx), b=1, h=1, d=2)
    want = torch.zeros_like(v)
    for i in range(y):
        for j in range(x):
            top, left = min(max(i - 1, 0), y - ky), min(max(j - 2, 0), x - kx)
            for a in range(ky):
                for c in range(kx):
                    want[0, i, j] += w[0, i, j, :, a * kx + c, None] * v[0, top + a, left + c]
    compare(hw.na2d_av(w, v, kernel_size=(ky, kx)), want, F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_as_large_as_the_image_is_full_attention(backend):
    w, v = inputs(5, 7, (5, 7))
    want = torch.einsum("bqht,bthd->bqhd", w.flatten(1, 2), v.flatten(1, 2)).view_as(v)
    compare(hw.na2d_av(w, v, kernel_size=(5, 7), backend=backend), want, F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_sequences(backend):
    """(1, K) on an image is a neighbourhood of each row for itself."""
    w, v = inputs(4, 11, (1, 5), dtype=F32)
    o = hw.na2d_av(w, v, kernel_size=(1, 5), backend=backend)
    for i in range(4):
        rows = (t[:, i : i + 1] for t in (w, v))
        assert_same_bits(hw.na2d_av(*rows, kernel_size=(1, 5), backend=backend), o[:, i : i + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_turning_the_image_turns_the_result(backend):
    """Rows become columns, and taps with them."""
    w, v = inputs(6, 9, (3, 5))
    o = hw.na2d_av(w, v, kernel_size=(3, 5), backend=backend)
    turned = w.unflatten(-1, (3, 5)).transpose(-1, -2).flatten(-2).transpose(1, 2)
    other = hw.na2d_av(turned, v.transpose(1, 2), kernel_size=(5, 3), backend=backend)
    compare(other.transpose(1, 2), o, F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_outside_the_window_do_not_leak(backend):
    w, v = inputs(9, 9, 3, b=1, dtype=F32)
    o = hw.na2d_av(w, v, kernel_size=3, backend=backend)
    other = v.clone()
    other[:, 4, 4] = 1e6
    changed = (hw.na2d_av(w, other, kernel_size=3, backend=backend) != o).any(-1).any(-1)[0]
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 3:6] = True
    assert torch.equal(changed, expected)
    compare(o, hw.na2d_av(w.double(), v.double(), kernel_size=3, backend="reference"), F32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_border_keys_are_seen_by_more_queries(backend):
    """d_v of ones counts the queries that see a key: near a border more than K."""
    w, v = torch.ones(1, 1, 9, 1, 5, dtype=F64), torch.zeros(1, 1, 9, 1, 1, dtype=F64)
    o = hw.na2d_av(w, v.requires_grad_(), kernel_size=(1, 5), backend=backend)
    (d_v,) = torch.autograd.grad(o.sum(), v)
    compare(d_v.flatten(), torch.tensor([3, 4, 5, 6, 9, 6, 5, 4, 3]).double(), F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone(backend):
    w, v = (t.requires_grad_() for t in inputs(dtype=F32))
    o = hw.na2d_av(w, v, kernel_size=3, backend=backend)
    every = torch.autograd.grad(o.sum(), (w, v))
    for n in range(2):
        given = [w.detach(), v.detach()]
        given[n].requires_grad_()
        o = hw.na2d_av(*given, kernel_size=3, backend=backend)
        assert_same_bits(*torch.autograd.grad(o.sum(), given[n]), every[n])


def test_one_hot_weights_shift_the_image():
    v = randn(1, 9, 9, 1, 4, dtype=F32)
    w = torch.zeros(1, 9, 9, 1, 9)
    w[..., 3] = 1  # the left neighbour, where there is one
    assert_same_bits(hw.na2d_av(w, v, kernel_size=3)[:, 1:-1, 1:-1], v[:, 1:-1, :-2])


@pytest.mark.parametrize("k, y, x", [(3, 4, 5), ((1, 3), 1, 6), (5, 5, 6)])
def test_gradcheck(k, y, x):
    w, v = (t.requires_grad_() for t in inputs(y, x, k, b=1, d=2))

    def call(w, v):
        return hw.na2d_av(w, v, kernel_size=k, backend="cpu")

    assert torch.autograd.gradcheck(call, (w, v))
    compare(call(w, v), hw.na2d_av(w, v, kernel_size=k, backend="reference"), F64)


@pytest.mark.no_comparison
def test_more_than_two_to_the_31_elements():
    w = torch.empty(64, 512, 512, 8, 49, device="meta")
    v = torch.empty(64, 512, 512, 8, 32, device="meta", requires_grad=True)
    o = hw.na2d_av(w, v, kernel_size=7)
    (d_v,) = torch.autograd.grad(o.sum(), v)
    assert o.numel() > 2**31 and o.shape == v.shape == d_v.shape


def zeros(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


BAD = (
    Refused(ValueError, "w", "[6, 7, 2, 9]", "[B, Y, X, H, Ky Kx]", w=zeros(6, 7, 2, 9)),
    Refused(ValueError, "v", "[6, 7, 2, 4]", "[B, Y, X, H, D]", v=zeros(6, 7, 2, 4)),
    Refused(ValueError, "w", "[1, 6, 7, 2, 9]", "[1, 6, 7, 3, 9]", v=zeros(1, 6, 7, 3, 4)),
    Refused(ValueError, "w", "[1, 6, 7, 2, 9]", "[1, 6, 7, 2, 25]", kernel_size=5),
    Refused(ValueError, "kernel_size", "4", "odd", kernel_size=4),
    Refused(ValueError, "kernel_size", "(3, 2)", "odd", kernel_size=(3, 2)),
    Refused(ValueError, "kernel_size", "-3", kernel_size=-3),
    Refused(ValueError, "kernel_size", "0", kernel_size=(0, 3)),
    Refused(TypeError, "kernel_size", "3.0", "odd integer", kernel_size=3.0),
    Refused(TypeError, "kernel_size", "True", kernel_size=True),
    Refused(TypeError, "kernel_size", "(3, 3, 3)", "pair", kernel_size=(3, 3, 3)),
    Refused(ValueError, "kernel_size", "9 along Y", "6 tokens", "hw.nn.ContMix",
            w=zeros(1, 6, 7, 2, 9), kernel_size=(9, 1)),
    Refused(TypeError, "v", "bfloat16", "float32", "autocast",
            v=zeros(1, 6, 7, 2, 4, dtype=torch.bfloat16)),
    Refused(TypeError, "w", "int64", w=zeros(1, 6, 7, 2, 9, dtype=torch.int64)),
    Refused(TypeError, "w", "a float", w=1.0),
    Refused(RuntimeError, "v", "meta", "cpu", v=zeros(1, 6, 7, 2, 4, device="meta")),
    Refused(ValueError, "backend", "'sm70'", backend="sm70"),
    Refused(RuntimeError, "simt", "cpu", "emulate:simt", backend="simt"),
)  # fmt: skip


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", BAD, ids=repr)
def test_bad_input(case, monkeypatch):
    arguments = {"w": zeros(1, 6, 7, 2, 9), "v": zeros(1, 6, 7, 2, 4), "kernel_size": 3}
    arguments |= case.arguments
    allocates_nothing(monkeypatch)
    w, v = arguments.pop("w"), arguments.pop("v")
    case.check(lambda: hw.na2d_av(w, v, **arguments))
