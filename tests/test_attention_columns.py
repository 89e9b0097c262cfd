# SPDX-License-Identifier: Apache-2.0
"""What keys receive and chosen weights: column_stats, attention_transpose, attention_probs, and
merge_attention.

Column sums are compared with *relative* error: with an absolute one an implementation that
returns zeros would pass at long sequences, where every value is small.
"""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from headworks.reference import attention as reference
from headworks.testing import compare
from identities import randn
from specs.attention_cases import WEIGHTS

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32


def inputs(b=1, sq=70, sk=None, h=2, hq=None, d=16, dv=24, dtype=F64):
    sk = sq if sk is None else sk
    q, k = randn(b, sq, hq or h, d, dtype=dtype), randn(b, sk, h, d, dtype=dtype, seed=1)
    return q, k, randn(b, sq, hq or h, dv, dtype=dtype, seed=2)


def every_option(b, sq, sk, hq):
    return (
        {},
        {"is_causal": True},
        {"window_size": (9, 4)},
        {"scale": 0.7, "softcap": 2.0},
        {"bias": randn(b, 1, sq, sk, seed=3)},
        {"key_bias": randn(1, hq, sk, seed=4)},
        {"key_gain": randn(b, 1, sk, seed=5), "gain_rows": (-9, None)},
        {"row_temperature": randn(b, sq, 1, seed=6)},
        {
            "is_causal": True,
            "softcap": 3.0,
            "bias": randn(sq, sk, seed=3),
            "key_bias": randn(1, hq, sk, seed=4),
            "key_gain": randn(b, 1, sk, seed=5),
            "row_temperature": randn(b, sq, 1, seed=6),
        },
    )


NAMES = ("plain", "causal", "window", "softcap", "bias", "key_bias", "gain", "temperature", "all")
OPTIONS = [pytest.param(o, id=n) for o, n in zip(every_option(2, 70, 90, 4), NAMES, strict=True)]


def all_weights(q, k, **options):
    """P, from rows that are asked for one by one."""
    return hw.attention_probs(q, k, rows=torch.arange(q.shape[1]), **options)


# ---- replayed weights are the weights that were applied ----


@pytest.mark.parametrize("options", OPTIONS)
def test_replayed_rows_sum_to_one(options):
    q, k, _ = inputs(b=2, sk=90, hq=4)
    p = all_weights(q, k, **options)
    compare(p.sum(-1), torch.ones(2, 4, 70, dtype=F64), F64)
    by_key = hw.attention_probs(q, k, keys=torch.arange(90), **options)
    compare(by_key, p, F64)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_four_ways_to_the_same_weights(options, weights):
    """P v by attention, P^T x, column sums and maxima, all of P from attention_probs."""
    q, k, x = inputs(b=2, sk=90, hq=4)
    v = randn(2, 90, 2, 24, seed=8)
    options = {**options, "activation": weights[0], "normalizer": weights[1]}
    p = all_weights(q, k, **options)
    wide = v.repeat_interleave(2, 2)
    compare(hw.attention(q, k, v, **options), torch.einsum("bhij,bjhe->bihe", p, wide), F64)
    y = hw.attention_transpose(q, k, x, **options)
    compare(y, torch.einsum("bhij,bihe->bjhe", p, x), F64)
    compare(hw.column_stats(q, k, **options), p.sum(2), F64)
    compare(hw.column_stats(q, k, kind="max", **options), p.amax(2), F64)
    ones = hw.attention_transpose(q, k, torch.ones_like(x[..., :1]), **options)
    compare(ones[..., 0].transpose(1, 2), p.sum(2), F64)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_given_lse_is_the_one_computed_inside(options):
    """Up to its rounding, which the one inside carries with it."""
    q, k, x = inputs(b=2, sk=90, hq=4)
    lse = hw.attention_lse(q, k, **options)
    _, aux = hw.attention(q, k, k, return_aux=hw.Aux(lse=True), **options)
    compare(aux.lse, lse, F64)
    for function, arguments in (
        (hw.attention_transpose, {"x": x}),
        (hw.column_stats, {"kind": "mean"}),
        (hw.attention_probs, {"keys": torch.tensor([0, 7])}),
    ):
        given = function(q, k, lse=lse, **arguments, **options)
        compare(given, function(q, k, **arguments, **options), F64)


def test_gradient_with_a_given_lse_is_complete():
    """No gradient flows to the lse; q and k get theirs as if it had been made inside."""
    q, k, x = (t.requires_grad_() for t in inputs())
    lse = hw.attention_lse(q, k)
    for call in (
        lambda lse: hw.attention_transpose(q, k, x, lse=lse).square().sum(),
        lambda lse: hw.column_stats(q, k, lse=lse).square().sum(),
    ):
        given, inside = (torch.autograd.grad(call(n), (q, k)) for n in (lse, None))
        for a, b in zip(given, inside, strict=True):
            compare(a, b, F64)


# ---- chosen weights ----


@pytest.mark.parametrize("sq, sk", ((70, 70), (40, 90), (90, 40)))
def test_diagonals(sq, sk):
    q, k, _ = inputs(sq=sq, sk=sk)
    p = all_weights(q, k, is_causal=True)
    offsets = torch.tensor([0, -1, -5, 1, -200])
    chosen = hw.attention_probs(q, k, offsets=offsets, is_causal=True)
    for n, offset in enumerate(offsets.tolist()):
        for i in (0, 1, sq // 2, sq - 1):
            j = i + sk - sq + offset
            expected = p[:, :, i, j] if 0 <= j < sk else torch.zeros(1, 2, dtype=F64)
            compare(chosen[:, :, i, n], expected, F64)


@pytest.mark.parametrize("chosen", ("keys", "rows", "offsets"))
def test_chosen_weights_of_packed_sequences(chosen):
    """All three count within each sequence."""
    lengths_q, lengths_k = (5, 0, 70), (9, 4, 66)
    ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths_q, lengths_k))
    q, k, _ = inputs(sq=75, sk=79)
    index = torch.tensor([0, 3, 8]) if chosen != "offsets" else torch.tensor([0, -2, 1])
    packed = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "is_causal": True}
    p = hw.attention_probs(q, k, **{chosen: index}, **packed)
    for n in range(3):
        rows, keys = slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])
        inside = index < (lengths_q if chosen == "rows" else lengths_k)[n]
        there = index if chosen == "offsets" else index[inside]
        alone = hw.attention_probs(q[:, rows], k[:, keys], is_causal=True, **{chosen: there})
        if chosen == "rows":
            compare(p[:, :, inside, keys], alone, F64)
            assert (p[:, :, ~inside, keys] == 0).all()
        elif chosen == "keys":
            compare(p[:, :, rows][..., inside], alone, F64)
            assert (p[:, :, rows][..., ~inside] == 0).all()
        else:
            compare(p[:, :, rows], alone, F64)


def test_probs_have_no_gradient():
    q, k, _ = (x.requires_grad_() for x in inputs())
    for backend in ("auto", "reference"):
        p = hw.attention_probs(q, k, keys=torch.tensor([0]), backend=backend)
        most = hw.column_stats(q, k, kind="max", backend=backend)
        assert not p.requires_grad and not most.requires_grad
    compare(p, hw.attention_probs(q, k, keys=torch.tensor([0])), F64)


# ---- columns ----


def relative_error(actual, oracle):
    return ((actual.double() - oracle) / oracle).abs().max()


SIZES = ((65, 65), (200, 200), (1000, 1000), (333, 777), (777, 333))


@pytest.mark.parametrize("dtype", (F32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("d", (40, 64, 128))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("sq, sk", SIZES)
def test_column_statistics_relatively(sq, sk, causal, d, dtype):
    """Relative error, and the same keys in the top 5 %; zeros would fail."""
    q, k, _ = inputs(sq=sq, sk=sk, h=1, hq=2, d=d, dtype=dtype)
    wide = q.double(), k.double()
    for kind in ("sum", "mean", "max"):
        options = {"kind": kind, "is_causal": causal}
        actual = hw.column_stats(q, k, **options)
        oracle = hw.column_stats(*wide, backend="reference", **options)
        assert relative_error(actual, oracle) < 2e-4, kind
        assert relative_error(torch.zeros_like(actual), oracle) > 0.9
        top = max(sk // 20, 1)
        smallest = oracle.topk(top, -1).values[..., -1:] * (1 - 1e-4)
        assert (oracle.gather(-1, actual.topk(top, -1).indices) >= smallest).all()
        compare(actual, oracle, F32)


@pytest.mark.parametrize("window", (None, (9, 0), (9, 4), (None, 4)), ids=str)
@pytest.mark.parametrize("sq, sk", ((70, 70), (40, 90), (90, 40)))
def test_mean_divides_by_the_rows_that_see_the_key(sq, sk, window):
    q, k, _ = inputs(sq=sq, sk=sk)
    options = {"window_size": window} if window else {"is_causal": True}
    seen = (all_weights(q, k, **options)[0, 0] > 0).sum(0).clamp(min=1)
    total, mean = (hw.column_stats(q, k, kind=n, **options) for n in ("sum", "mean"))
    compare(mean * seen, total, F64)


def test_causal_mean_of_a_square():
    """Sk - j rows see key j."""
    q, k, _ = inputs()
    total, mean = (hw.column_stats(q, k, kind=n, is_causal=True) for n in ("sum", "mean"))
    compare(mean * (70 - torch.arange(70)), total, F64)


def test_reduced_heads_and_row_weights():
    q, k, _ = inputs(b=2, hq=4)
    p = all_weights(q, k)
    r = randn(2, 1, 70, seed=4)
    options = {"row_weight": r, "reduce_heads": True}
    compare(hw.column_stats(q, k, **options), (r[..., None] * p).sum((1, 2)), F64)
    mean = hw.column_stats(q, k, kind="mean", **options)
    compare(mean, (r[..., None] * p).mean((1, 2)), F64)
    compare(hw.column_stats(q, k, kind="max", reduce_heads=True), p.amax((1, 2)), F64)


@pytest.mark.parametrize("reduce_heads", (True, False))
@pytest.mark.parametrize("kind", ("sum", "mean", "max"))
def test_running_score(kind, reduce_heads):
    """`out` gathers the columns of several calls, in place."""
    shape = (1, 70) if reduce_heads else (1, 2, 70)
    out = torch.zeros(shape, dtype=F64)
    parts = []
    for seed in range(3):
        q, k = randn(1, 20, 2, 16, seed=seed), randn(1, 70, 2, 16, seed=seed + 9)
        options = {"kind": kind, "reduce_heads": reduce_heads}
        parts.append(hw.column_stats(q, k, **options))
        assert hw.column_stats(q, k, out=out, **options) is out
    expected = torch.stack(parts).amax(0) if kind == "max" else sum(parts)
    compare(out, expected, F64)


# ---- gradients ----


@pytest.mark.no_comparison
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("which", ("transpose", "sum", "mean"))
def test_gradcheck(which, weights):
    tensors = {
        "q": randn(1, 4, 2, 3),
        "k": randn(1, 5, 1, 3, seed=1),
        "bias": randn(1, 1, 4, 5, seed=3),
        "key_bias": randn(1, 2, 5, seed=4),
        "key_gain": randn(1, 1, 5, seed=5),
        "row_temperature": randn(1, 4, 1, seed=6),
    }
    name = "x" if which == "transpose" else "row_weight"
    tensors[name] = randn(1, 4, 2, 2, seed=2) if which == "transpose" else randn(1, 2, 4, seed=2)
    function = hw.attention_transpose if which == "transpose" else hw.column_stats
    options = {"activation": weights[0], "normalizer": weights[1], "is_causal": True}
    if which != "transpose":
        options |= {"kind": which, "reduce_heads": which == "mean"}

    def call(*given):
        return function(backend="cpu", **dict(zip(tensors, given, strict=True)), **options)

    given = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(call, given, atol=1e-6, rtol=1e-5)


def test_gradient_of_column_sums_in_bf16():
    """Computed on fp32 copies, rounded once at the end."""
    half = [x.bfloat16().requires_grad_() for x in inputs(sq=200, hq=4)[:2]]
    wide = [x.detach().double().requires_grad_() for x in half]
    g = randn(1, 4, 200, seed=3)
    actual = torch.autograd.grad(hw.column_stats(*half), half, g.float())
    oracle = torch.autograd.grad(hw.column_stats(*wide, backend="reference"), wide, g)
    for x, y in zip(actual, oracle, strict=True):
        assert x.dtype == torch.bfloat16
        compare(x, y, torch.bfloat16, reference=y.bfloat16(), floor=0.5)


# ---- merge ----


def halves(q, k, v, cuts, **options):
    parts = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, k.shape[1]), strict=True)]
    made = [
        hw.attention(q, k[:, p], v[:, p], return_aux=hw.Aux(lse=True), **options) for p in parts
    ]
    return [o for o, _ in made], [aux.lse for _, aux in made]


@pytest.mark.parametrize("cuts", ((35,), (0, 1, 64), (69,)), ids=str)
def test_merged_parts_equal_the_whole(cuts):
    """Outputs, lse and gradients."""
    q, k, _ = (x.requires_grad_() for x in inputs(b=2))
    v = randn(2, 70, 2, 24, seed=4).requires_grad_()
    o, lse = hw.merge_attention(*halves(q, k, v, cuts))
    whole, aux = hw.attention(q, k, v, return_aux=hw.Aux(lse=True))
    compare(o, whole, F64)
    compare(lse, aux.lse, F64)
    g, d_lse = randn(*o.shape, seed=5), randn(*lse.shape, seed=6)
    merged = torch.autograd.grad((o, lse), (q, k, v), (g, d_lse))
    expected = torch.autograd.grad((whole, aux.lse), (q, k, v), (g, d_lse))
    for x, y in zip(merged, expected, strict=True):
        compare(x, y, F64)


@pytest.mark.parametrize("dtype", (F64, F32, torch.bfloat16))
def test_merge_equals_the_reference(dtype):
    """Outputs and gradients, with parts without keys that are NaN."""
    o, lse = randn(4, 2, 9, 3, 5), randn(4, 2, 3, 9, seed=1)
    lse[1, :, :, 4:], lse[:, 1, 0], lse[2:, 0, 1] = -torch.inf, -torch.inf, -torch.inf
    o[1, :, 5:] = torch.nan
    o, lse = o.to(dtype), lse.to(F64 if dtype == F64 else F32)
    leaves = [(o.requires_grad_(), lse.requires_grad_())]
    leaves += [tuple(x.detach().double().requires_grad_() for x in leaves[0])]
    if dtype == torch.bfloat16:
        leaves += [tuple(x.detach().clone().requires_grad_() for x in leaves[0])]
    functions = (hw.merge_attention, reference.merge_attention, reference.merge_attention)
    made = []
    for function, inputs in zip(functions, leaves, strict=False):
        merged, total = function(*(list(x) for x in inputs))
        finite = torch.where(total.isfinite(), total, 0)
        loss = (merged * randn(2, 9, 3, 5, seed=2)).sum() + (finite * randn(2, 3, 9, seed=3)).sum()
        made.append([merged, total, *torch.autograd.grad(loss, inputs)])
    for n, (x, y) in enumerate(zip(*made[:2], strict=True)):
        rough = made[2][n] if dtype == torch.bfloat16 else None
        compare(x, y, dtype, reference=rough, floor=0.5)


def test_merge_with_parts_that_see_nothing():
    """-inf beside a number does not count; -inf alone gives 0 and -inf, with zero gradients."""
    o = randn(3, 1, 4, 2, 8).requires_grad_()
    lse = randn(3, 1, 2, 4, seed=1)
    lse[0] = -torch.inf
    lse[:, :, :, 2] = -torch.inf
    lse.requires_grad_()
    merged, total = hw.merge_attention(list(o), list(lse))
    assert (merged[:, 2] == 0).all() and (total[..., 2] == -torch.inf).all()
    rest, others = hw.merge_attention(list(o[1:]), list(lse[1:]))
    compare(merged, rest, F64)
    compare(total, others, F64)
    finite = torch.where(total.isfinite(), total, 0)
    for x in torch.autograd.grad(merged.sum() + finite.sum(), (o, lse)):
        assert x.isfinite().all()


def test_merge_of_sixteen_bits_is_fp32_inside():
    o = [randn(1, 4, 2, 8, dtype=torch.bfloat16, seed=s) for s in range(9)]
    lse = [randn(1, 2, 4, dtype=F32, seed=s + 9) for s in range(9)]
    merged, total = hw.merge_attention(o, lse)
    oracle, wide = hw.merge_attention([x.double() for x in o], [x.double() for x in lse])
    compare(merged, oracle, torch.bfloat16, reference=oracle.bfloat16(), floor=0.5)
    compare(total, wide, F32)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_merge_does_not_look_at_parts_without_keys(value):
    o, lse = randn(2, 1, 5, 2, 4), randn(2, 1, 2, 5, seed=1)
    lse[1, :, :, 2:] = -torch.inf
    o[1, :, 2:] = value
    whole = o.clone().requires_grad_()
    merged, total = hw.merge_attention(list(whole), list(lse))
    compare(merged[:, 2:].detach(), o[0, :, 2:], F64)
    compare(total[..., 2:], lse[0, :, :, 2:], F64)
    (grad,) = torch.autograd.grad(merged.sum(), whole)
    assert not grad[1, :, 2:].any()
    assert grad.isfinite().all()


@pytest.mark.no_comparison
def test_merge_gradcheck():
    o = [randn(1, 3, 2, 2, seed=s).requires_grad_() for s in range(2)]
    lse = [randn(1, 2, 3, seed=s + 3).requires_grad_() for s in range(2)]
    assert torch.autograd.gradcheck(lambda a, b, c, d: hw.merge_attention([a, b], [c, d]), o + lse)
