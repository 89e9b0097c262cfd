# SPDX-License-Identifier: Apache-2.0
"""Attention where numbers are large, rounded or few: weights that are replayed are those that were
applied, and a row of one key has no gradient of its score."""

from __future__ import annotations

import math

import pytest
import torch

import headworks as hw
from backends import native_info
from headworks.testing import assert_same_bits, compare

pytestmark = pytest.mark.operator

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def backends(dtype):
    found = ["cpu"]
    if native_info().get("emulator"):
        found += ["emulate:simt"] + (["emulate:sm80"] if dtype in (BF16, F16) else [])
    return found


def every_backend(*dtypes):
    return [pytest.param(b, t, id=f"{b}-{str(t)[6:]}") for t in dtypes for b in backends(t)]


def large_rows(dtype):
    """q k v and a bias that is -1e9 over row 2, 1e6 over row 3, -3e4 over row 4."""
    q, k, v = torch.randn(3, 1, 6, 2, 8).to(dtype)
    bias = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    bias[:, :, 2], bias[:, :, 3], bias[:, :, 4] = -1e9, 1e6, -3e4
    return q, k, v, bias.clamp(*(torch.finfo(dtype).min, torch.finfo(dtype).max)).to(dtype)


@pytest.mark.parametrize("backend, dtype", every_backend(F32, torch.float64, BF16, F16))
def test_weights_of_large_rows_add_up_to_one(backend, dtype):
    q, k, _, bias = large_rows(dtype)
    probs = backend.replace("sm80", "simt")  # which has no kernel for chosen weights
    p = hw.attention_probs(q, k, rows=torch.arange(6), bias=bias, backend=probs)
    wide = F32 if dtype != torch.float64 else dtype
    compare(p.sum(-1), torch.ones(1, 2, 6, dtype=torch.float64), F32)
    total = hw.column_stats(q, k, bias=bias, backend=backend).sum(-1)
    compare(total, torch.full((1, 2), 6.0, dtype=torch.float64), F32)
    assert p.dtype == wide


@pytest.mark.parametrize("backend, dtype", every_backend(F32, BF16, F16))
def test_gradients_of_large_rows(backend, dtype):
    """Weights of a large row are those of its scores as rounded: there all the same."""
    q, k, v, bias = large_rows(dtype)
    g = torch.randn(1, 6, 2, 8).to(dtype)

    def gradients(backend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o = hw.attention(*inputs, bias=bias.to(dtype), backend=backend)
        return torch.autograd.grad(o, inputs, g.to(dtype))

    # Scores of fp32 are made in fp32 by the reference, too: its rows are large in the same way.
    oracle = gradients("reference", F32)
    for name, x, y in zip("qkv", gradients(backend, dtype), oracle, strict=True):
        rough = y.to(dtype) if dtype != F32 else None
        compare(x, y.double(), dtype, reference=rough, floor=4.0, name=f"d_{name}")


@pytest.mark.parametrize("backend, dtype", every_backend(F32, BF16))
def test_columns_of_large_products(backend, dtype):
    """No bias: the products themselves are large. On tensor cores the forward pass may have rounded
    the score that the replay makes again: less large ones there."""
    size = 30.0 if backend.endswith("sm80") else 3e3
    q = torch.full((1, 3, 1, 8), size).to(dtype)
    k = torch.full((1, 40, 1, 8), size).to(dtype)
    total = hw.column_stats(q, k, backend=backend)
    compare(total, torch.full((1, 1, 40), 3 / 40, dtype=torch.float64), F32)


@pytest.mark.parametrize("backend, dtype", every_backend(BF16, F16))
@pytest.mark.parametrize("option", ["head_gate", "identity_mix"])
def test_one_key_has_no_gradient_of_its_score(option, backend, dtype):
    """p = 1 whatever the score: d_q and d_k are 0, not what rounding d_w leaves."""
    q, k, v = (x.to(dtype).requires_grad_() for x in torch.randn(3, 1, 1, 2, 64))
    values = {"head_gate": torch.full((1, 1, 2), 0.3), "identity_mix": torch.full((2,), 0.3)}
    o = hw.attention(q, k, v, backend=backend, **{option: values[option]})
    d_q, d_k = torch.autograd.grad(o, (q, k), torch.randn(o.shape).to(dtype))
    for name, x in (("d_q", d_q), ("d_k", d_k)):
        compare(x, torch.zeros(x.shape, dtype=torch.float64), F32, name=name)


@pytest.mark.parametrize("backend, dtype", every_backend(F32, BF16, F16))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_read_outs_of_rows_that_are_not_finite(backend, dtype, value):
    """As the reference has them: lse of a score of +inf is +inf, everything else of the row NaN."""
    q, k, v = torch.randn(3, 1, 5, 1, 8).to(dtype)
    key_bias = torch.zeros(1, 1, 5)
    key_bias[..., 4] = value
    asked = hw.Aux(lse=True, entropy=True, p_max=True, sq_norm=True)

    def read_outs(backend):
        options = {"is_causal": True, "key_bias": key_bias, "backend": backend}
        o, aux = hw.attention(q, k, v, return_aux=asked, **options)
        most = hw.column_stats(q, k, kind="max", **options)
        return {"o": o, "max": most} | {n: x for n, x in aux._asdict().items() if x is not None}

    expected = read_outs("reference")
    for name, x in read_outs(backend).items():
        compare(x, expected[name].double(), dtype, reference=expected[name], floor=8.0, name=name)


def test_a_given_lse_is_one_number():
    """What fp32 cannot hold of a given lse is lost: its weights are relative to the rounded one."""
    q, k, _, bias = large_rows(F32)
    lse = hw.attention_lse(q, k, bias=bias)
    rows = torch.arange(6)
    given = hw.attention_probs(q, k, lse=lse, rows=rows, bias=bias).sum(-1)
    own = hw.attention_probs(q, k, rows=rows, bias=bias).sum(-1)
    compare(own, torch.ones_like(own).double(), F32)
    compare(given[..., :2], torch.ones(1, 2, 2, dtype=torch.float64), F32)
    assert (given[..., 2] > 5).all()


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_long_keys_are_cut_the_same_way_in_any_batch(queries, dtype):
    """Enough keys for several spans: outputs and gradients of a batch entry alone and among others,
    with any number of threads."""
    q, k, v = (torch.randn(9, n, 1, 16).to(dtype) for n in (queries, 2600, 2600))
    g = torch.randn(9, queries, 1, 16).to(dtype)

    def results(some):
        inputs = [x[some].requires_grad_() for x in (q, k, v)]
        o, aux = hw.attention(*inputs, return_aux=hw.Aux(lse=True))
        return o.detach(), aux.lse.detach(), *torch.autograd.grad(o, inputs, g[some])

    every = results(slice(None))
    for some in (slice(0, 1), slice(3, 5), slice(2, 9)):
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            for n, (x, y) in enumerate(zip(results(some), every, strict=True)):
                assert_same_bits(x, y[some], f"result {n} of {some} with {threads} threads")


def test_packed_neighbours_do_not_change_a_sequence():
    """The longest sequence decides nothing about the others."""
    lengths = (2500, 40, 3000)
    k, v = torch.randn(2, 1, sum(lengths), 1, 16)
    q = torch.randn(1, 3, 1, 16)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o = hw.attention(q, k, v, cu_seqlens_q=torch.arange(4), cu_seqlens_k=bounds)
    for n in range(3):
        keys = slice(int(bounds[n]), int(bounds[n + 1]))
        alone = hw.attention(q[:, n : n + 1], k[:, keys], v[:, keys])
        assert_same_bits(alone, o[:, n : n + 1], f"sequence {n}")


@pytest.mark.parametrize("tokens", [5, 257, 1000])
def test_merge_has_the_same_bits_at_any_thread_count(tokens):
    outs, lses = torch.randn(3, 2, tokens, 3, 20), torch.randn(3, 2, 3, tokens)
    torch.set_num_threads(1)
    expected = hw.merge_attention(list(outs), list(lses))
    for threads in (2, 3, 4, 7, 8, 16):
        torch.set_num_threads(threads)
        for x, y in zip(hw.merge_attention(list(outs), list(lses)), expected, strict=True):
            assert_same_bits(x, y, f"{threads} threads")


def test_merge_of_parts_that_are_not_finite():
    """lse: +inf and NaN stay; o of such a row is NaN."""
    outs, lses = torch.randn(2, 1, 4, 1, 8), torch.zeros(2, 1, 1, 4)
    lses[0, 0, 0] = torch.tensor([torch.inf, torch.nan, -torch.inf, 0.0])
    o, lse = hw.merge_attention(list(outs), list(lses))
    assert lse[0, 0, 0] == torch.inf and lse.isnan().tolist() == [[[0, 1, 0, 0]]]
    assert o.isnan().all(-1).flatten().tolist() == [True, True, False, False]
    compare(o[:, 2], outs[1, :, 2].double(), F32)


# ---- Lengths of 2^31 and more: tensors with zero strides ----------------------------------------

LONG = 2**31 + 5


def test_more_than_two_billion_keys():
    """All equal: L = s + log(n)."""
    q, k = torch.full((1, 1, 1, 8), 0.5), torch.full((1, 1, 1, 8), 0.25).expand(1, LONG, 1, 8)
    lse = hw.attention_lse(q, k, scale=1.0)
    compare(lse, torch.full((1, 1, 1), 1 + math.log(LONG), dtype=torch.float64), F32)


def test_windows_beyond_two_billion_keys():
    """The last rows of a causal map see the last keys; offsets count from the diagonal."""
    q, k = torch.ones(1, 2, 1, 8), torch.ones(1, 1, 1, 8).expand(1, LONG, 1, 8)
    lse = hw.attention_lse(q, k, is_causal=True, window_size=(6, 0))
    compare(lse, torch.full((1, 1, 2), 8**0.5 + math.log(7), dtype=torch.float64), F32)
    keys = torch.tensor([LONG - 1, LONG - 2, 0])
    p = hw.attention_probs(q, k, keys=keys, lse=lse, is_causal=True, window_size=(6, 0))
    oracle = torch.tensor([[0.0, 1, 0], [1, 1, 0]], dtype=torch.float64)[None, None] / 7
    compare(p, oracle, F32)


@pytest.mark.parametrize("backend", backends(BF16))
@pytest.mark.parametrize("bound", [2**31, 2**31 + 70, 2**40])
def test_bounds_of_packed_lengths_may_be_large(backend, bound):
    q, k, v = torch.randn(3, 1, 9, 1, 16).bfloat16()
    bounds = torch.tensor([0, 4, 9])
    options = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "backend": backend}
    expected = hw.attention(q, k, v, **options)
    o = hw.attention(q, k, v, max_seqlen_q=bound, max_seqlen_k=bound, **options)
    assert_same_bits(o, expected, "with a large bound")


@pytest.mark.no_comparison
@pytest.mark.parametrize("backend", [b for b in backends(BF16) if b != "cpu"])
def test_what_32_bits_cannot_number_is_refused(backend):
    q = torch.zeros(1, 1, 1, 16, dtype=BF16)
    k, index = q.expand(1, LONG, 1, 16), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="numbers have 32 bits"):
        hw.kmeans_routing_attention(q, k, k, q_index=index, k_index=index, backend=backend)
