# SPDX-License-Identifier: Apache-2.0
"""Attention: identities, gradients, parity with torch, hostile inputs.

What holds for every operator is in test_ops.py, bad input in test_attention_input.py, columns and
chosen weights in test_attention_columns.py, sinks in test_attention_sink.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import headworks as hw
from headworks.testing import assert_same_bits, compare
from identities import randn
from specs.attention_cases import STATISTICS, WEIGHTS

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
ALL = hw.Aux(lse=True, entropy=True, p_max=True, sq_norm=True)


def inputs(b=1, sq=70, sk=None, h=2, hq=None, d=16, dv=24, dtype=F64):
    sk = sq if sk is None else sk
    q, k = randn(b, sq, hq or h, d, dtype=dtype), randn(b, sk, h, d, dtype=dtype, seed=1)
    return q, k, randn(b, sk, h, dv, dtype=dtype, seed=2)


def sdpa(q, k, v, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def random_mask(*shape):
    """0 and -inf, with at least one 0 in each row."""
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4
    hidden[..., 0] = False
    return torch.zeros(shape, dtype=F64).masked_fill(hidden, -torch.inf)


# ---- parity with torch ----


@pytest.mark.parametrize("dtype", (F64, F32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("hq", (2, 6))
def test_parity_with_sdpa(dtype, causal, hq):
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(b=2, sq=130, hq=hq))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    g = randn(2, 130, hq, 24, seed=5).to(dtype)
    ours, oracle = hw.attention(q, k, v, is_causal=causal), sdpa(*wide, is_causal=causal)
    theirs = sdpa(q, k, v, is_causal=causal)
    compare(ours, oracle, dtype, reference=theirs)
    rough = torch.autograd.grad(theirs, (q, k, v), g)
    actual = torch.autograd.grad(ours, (q, k, v), g)
    expected = torch.autograd.grad(oracle, wide, g.double())
    for x, y, r in zip(actual, expected, rough, strict=True):
        compare(x, y, dtype, reference=r)


@pytest.mark.parametrize("shape", ((70, 90), (1, 2, 1, 90), (2, 1, 70, 90), (2, 2, 70, 1)), ids=str)
def test_parity_with_sdpa_under_a_bias(shape):
    q, k, v = (x.requires_grad_() for x in inputs(b=2, sk=90))
    bias = (randn(*shape, seed=4) + random_mask(*shape)).requires_grad_()
    g = randn(2, 70, 2, 24, seed=5)
    ours = hw.attention(q, k, v, bias=bias)
    theirs = sdpa(q, k, v, attn_mask=bias)
    compare(ours, theirs, F64)
    tensors = (q, k, v, bias)
    for x, y in zip(*(torch.autograd.grad(o, tensors, g) for o in (ours, theirs)), strict=True):
        compare(x, y, F64)


# ---- masks ----


@pytest.mark.parametrize("sq, sk", ((70, 70), (40, 90), (90, 40), (1, 200)))
def test_causal_is_a_window_and_a_bias(sq, sk):
    """Aligned at the lower right corner, in three ways."""
    q, k, v = inputs(sq=sq, sk=sk)
    causal, aux = hw.attention(q, k, v, is_causal=True, return_aux=ALL)
    window, more = hw.attention(q, k, v, window_size=(None, 0), return_aux=ALL)
    hidden = torch.arange(sk) > torch.arange(sq)[:, None] + sk - sq
    bias = torch.zeros(sq, sk, dtype=F64).masked_fill(hidden, -torch.inf)
    dense, dense_aux = hw.attention(q, k, v, bias=bias, return_aux=ALL)
    assert_same_bits(causal, window)
    compare(causal, dense, F64)
    for x, y, z in zip(aux[:4], more[:4], dense_aux[:4], strict=True):
        assert_same_bits(x, y)
        compare(x, z, F64)
    compare(causal[:, -1], hw.attention(q, k, v)[:, -1], F64)


def test_wide_window_is_full_attention():
    q, k, v = inputs(sq=130)
    for window in ((130, 130), (None, None), (10**9, None)):
        assert_same_bits(hw.attention(q, k, v, window_size=window), hw.attention(q, k, v))
    compare(hw.attention(q, k, v, window_size=(0, 0)), v, F64)


@pytest.mark.parametrize("window", (0, 1, 63, 64, 100))
def test_window_of_earlier_keys(window):
    """left = w: w earlier keys and the row's own."""
    q, k, v = inputs(sq=200)
    o = hw.attention(q, k, v, is_causal=True, window_size=(window, 0))
    for i in (0, 1, 64, 130, 199):
        keys = slice(max(i - window, 0), i + 1)
        compare(o[:, i : i + 1], hw.attention(q[:, i : i + 1], k[:, keys], v[:, keys]), F64)


def test_later_tokens_do_not_leak():
    q, k, v = inputs(sq=200, dtype=F32)
    expected = hw.attention(q, k, v, is_causal=True)
    for j in (1, 63, 64, 130, 199):
        changed = [x.clone() for x in (k, v)]
        for x in changed:
            x[:, j:] = 1e4
        actual = hw.attention(q, *changed, is_causal=True)
        assert_same_bits(actual[:, :j], expected[:, :j], f"rows before {j}")


@pytest.mark.parametrize("as_list", (True, False))
@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"window_size": (9, 4)}), ids=str)
def test_packed_equals_one_by_one(options, as_list):
    lengths_q, lengths_k = (0, 70, 1, 5, 130), (3, 70, 9, 0, 65)
    ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths_q, lengths_k))
    q, k, v = (x.requires_grad_() for x in inputs(sq=sum(lengths_q), sk=sum(lengths_k), hq=4))
    names = ("cu_seqlens_q", "cu_seqlens_k")
    bounds = (x.tolist() if as_list else x.int() for x in (ends_q, ends_k))
    packed = dict(zip(names, bounds, strict=True))
    o, aux = hw.attention(q, k, v, return_aux=ALL, **packed, **options)
    g = randn(*o.shape, seed=6)
    grads = torch.autograd.grad(o, (q, k, v), g)
    for n in range(len(lengths_q)):
        rows, keys = slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])
        one = [
            x[:, part].detach().requires_grad_() for x, part in ((q, rows), (k, keys), (v, keys))
        ]
        alone, more = hw.attention(*one, return_aux=ALL, **options)
        compare(o[:, rows], alone, F64)
        for x, y in zip(aux[:4], more[:4], strict=True):
            compare(x[:, :, rows], y, F64)
        expected = torch.autograd.grad(alone, one, g[:, rows])
        for x, y, part in zip(grads, expected, (rows, keys, keys), strict=True):
            compare(x[:, part], y, F64)


# ---- scores ----


def test_temperature_is_a_scaled_query():
    q, k, v = inputs(b=2)
    tau = randn(2, 70, 2, seed=7)
    compare(hw.attention(q, k, v, row_temperature=tau), hw.attention(q * tau[..., None], k, v), F64)


def test_key_bias_is_a_bias_of_keys():
    q, k, v = inputs(b=2)
    beta = randn(2, 2, 70, seed=7)
    both = hw.attention(q, k, v, key_bias=beta, bias=beta[:, :, None])
    compare(both, hw.attention(q, k, v, bias=2 * beta[:, :, None].expand(-1, -1, 70, -1)), F64)


def test_gain_of_keys():
    """s + gamma |s|, in the rows asked for and only there."""
    q, k, v = inputs()
    gamma = randn(1, 1, 70, seed=7)
    s = 0.25 * torch.einsum("bihd,bjhd->bhij", q, k)
    plain = hw.attention(q, k, v)
    for rows in ((None, None), (-1, None), (0, 5), (3, -60), (200, None), (-200, 2)):
        gained = s.clone()
        gained[:, :, slice(*rows)] += (gamma[:, :, None] * s.abs())[:, :, slice(*rows)]
        o = hw.attention(q, k, v, key_gain=gamma, gain_rows=rows)
        compare(o, torch.einsum("bhij,bjhe->bihe", gained.softmax(-1), v), F64)
        same = torch.ones(70, dtype=torch.bool)
        same[slice(*rows)] = False
        assert_same_bits(o[:, same], plain[:, same], f"rows outside {rows}")


def test_softmax1_is_a_key_without_value():
    """As softmax with one more key, of score 0 and value 0."""
    q, k, v = inputs()
    o, aux = hw.attention(q, k, v, activation="softmax1", return_aux=hw.Aux(lse=True))
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v)]
    expected, more = hw.attention(q, *longer, return_aux=hw.Aux(lse=True))
    compare(o, expected, F64)
    compare(aux.lse, more.lse, F64)


@pytest.mark.parametrize("activation", ("sigmoid", "relu", "relu2"))
def test_normalizers(activation):
    q, k, v = inputs()
    plain, length, total = (
        hw.attention(q, k, v, activation=activation, normalizer=n, is_causal=True)
        for n in (None, "length", "sum")
    )
    count = torch.arange(1, 71, dtype=F64)[None, :, None, None]
    compare(length * count, plain, F64)
    ones = hw.attention(q, k, torch.ones_like(v), activation=activation, is_causal=True)
    compare(total * ones, plain, F64)


def test_grouped_heads_equal_repeated_heads():
    q, k, v = (x.requires_grad_() for x in inputs(hq=6))
    wide = [x.detach().repeat_interleave(3, 2).requires_grad_() for x in (k, v)]
    u, gate = torch.rand(6, dtype=F64), randn(1, 70, 6, seed=3)
    options = {"identity_mix": u, "head_gate": gate, "is_causal": True}
    o, expected = hw.attention(q, k, v, **options), hw.attention(q, *wide, **options)
    compare(o, expected, F64)
    g = randn(*o.shape, seed=9)
    grads = torch.autograd.grad(o, (q, k, v), g)
    oracle = torch.autograd.grad(expected, (q, *wide), g)
    compare(grads[0], oracle[0], F64)
    for x, y in zip(grads[1:], oracle[1:], strict=True):
        compare(x, y.unflatten(2, (2, 3)).sum(3), F64)


def test_stride_zero_batch():
    """The same q and k for the whole batch, without copies; gradients add up."""
    q, k, _ = (x.requires_grad_() for x in inputs())
    v = randn(3, 70, 2, 24, seed=4)
    o = hw.attention(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v, is_causal=True)
    grads = torch.autograd.grad(o.square().sum(), (q, k))
    each = [hw.attention(q, k, v[b : b + 1], is_causal=True) for b in range(3)]
    compare(o, torch.cat(each), F64)
    expected = torch.autograd.grad(torch.cat(each).square().sum(), (q, k))
    for x, y in zip(grads, expected, strict=True):
        compare(x, y, F64)


# ---- gate and mix ----


def test_gate_and_mix():
    q, k, v = inputs(b=2)
    w = hw.attention(q, k, v)
    gate, u = randn(2, 70, 2, seed=3), torch.tensor([0.0, 0.4], dtype=F64)
    compare(hw.attention(q, k, v, head_gate=gate), gate[..., None] * w, F64)
    mixed = (1 - u[:, None]) * w + u[:, None] * v
    compare(hw.attention(q, k, v, identity_mix=u), mixed, F64)
    both = hw.attention(q, k, v, identity_mix=u, head_gate=gate)
    compare(both, gate[..., None] * mixed, F64)
    assert_same_bits(hw.attention(q, k, v, head_gate=torch.ones_like(gate)), w)
    assert_same_bits(hw.attention(q, k, v, identity_mix=torch.ones(2)), v)


def test_gate_zero_and_mix_one_touch_nothing():
    """Rows that nobody sees may be skipped: not even a NaN in their scores comes through."""
    q, k, v = inputs(sq=200)
    q[:, :, 0] = torch.nan
    gate = torch.ones(1, 200, 2, dtype=F64)
    gate[:, :, 0] = 0
    o = hw.attention(q, k, v, head_gate=gate, identity_mix=torch.tensor([1.0, 0.0]))
    compare(o[:, :, 1], hw.attention(q, k, v)[:, :, 1], F64)
    mixed = hw.attention(q, k, v, identity_mix=torch.tensor([1.0, 0.0]))
    assert_same_bits(mixed[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("wanted", ("q", "v", "gate", "u"))
def test_gradient_where_rows_are_dead(wanted):
    q, k, v = inputs(sq=130)
    gate, u = randn(1, 130, 2, seed=3), torch.tensor([1.0, 0.3], dtype=F64)
    gate[:, 3:100] = 0
    tensors = {"q": q, "k": k, "v": v, "gate": gate, "u": u}
    x = tensors[wanted].requires_grad_()
    grads = []
    for backend in ("auto", "reference"):
        o = hw.attention(q, k, v, head_gate=gate, identity_mix=u, backend=backend)
        grads.append(torch.autograd.grad(o, x, randn(*o.shape, seed=6))[0])
    compare(*grads, F64)


# ---- gradients ----


OPTIONS = (
    {},
    {"is_causal": True, "softcap": 1.5},
    {"window_size": (2, 1), "scale": 1.3},
    {"gain_rows": (-3, None)},
)


@pytest.mark.no_comparison
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(weights, options):
    """Every differentiable argument at once, through the public function."""
    q, k, v = inputs(b=1, sq=5, hq=2, h=1, d=3, dv=2)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "bias": randn(1, 1, 5, 5, seed=3),
        "key_bias": randn(1, 2, 5, seed=4),
        "key_gain": randn(1, 1, 5, seed=5),
        "row_temperature": randn(1, 5, 1, seed=6),
        **({"sink": randn(2, seed=9)} if weights[0] == "softmax" else {}),
        "head_gate": randn(1, 5, 2, seed=7),
        "identity_mix": randn(2, seed=8),
    }
    activation, normalizer = weights
    aux = hw.Aux(lse=True) if activation.startswith("softmax") else None

    def call(q, k, v, *rest):
        named = dict(zip(list(tensors)[3:], rest, strict=True))
        result = hw.attention(
            q, k, v, activation=activation, normalizer=normalizer, return_aux=aux, backend="cpu",
            **options, **named,
        )  # fmt: skip
        return (result[0], result[1].lse) if aux else result

    given = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(call, given, atol=1e-6, rtol=1e-5)


@pytest.mark.no_comparison
@pytest.mark.parametrize("shape", ((2, 3), (1, 1, 2, 1), (2, 1, 1, 3), (1, 2, 2, 3)), ids=str)
def test_gradcheck_bias_shapes(shape):
    q, k, v = inputs(b=2, sq=2, sk=3, d=2, dv=2)
    bias = randn(*shape, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: hw.attention(q, k, v, bias=b, backend="cpu"), bias)


def test_gradient_of_lse_alone():
    q, k, _ = (x.requires_grad_() for x in inputs(sk=40, hq=4, h=2))
    g = randn(1, 4, 70, seed=3)
    lse = hw.attention_lse(q, k, is_causal=True, scale=0.3)
    s = 0.3 * torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2))
    s = s[:, :, 30:].masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf)
    compare(lse[:, :, 30:], s.logsumexp(-1), F64)
    assert (lse[:, :, :30] == -torch.inf).all()
    actual = torch.autograd.grad(lse, (q, k), g)
    expected = torch.autograd.grad(s.logsumexp(-1), (q, k), g[:, :, 30:])
    for x, y in zip(actual, expected, strict=True):
        compare(x, y, F64)


# ---- read-outs ----


@pytest.mark.parametrize("scale", (1.0, 19.0))
def test_entropy_in_fp32(scale):
    """Within 1e-5 of fp64 also where scores are near 300: the form without cancellation."""
    q, k, v = inputs(sq=200, h=4, d=64, dtype=F32)
    q, k = (q * 4).round() / 4, (k * 4).round() / 4  # scores without rounding
    o, aux = hw.attention(q, k, v, scale=scale / 8, return_aux=ALL)
    wide = (x.double() for x in (q, k, v))
    _, oracle = hw.attention(*wide, scale=scale / 8, return_aux=ALL, backend="reference")
    assert (aux.entropy - oracle.entropy).abs().max() < 1e-5
    for x, y in zip(aux[:4], oracle[:4], strict=True):
        compare(x, y, F32)
    assert o.isfinite().all()


def test_statistics_of_uniform_weights():
    q, k, v = inputs(sq=3, sk=130)
    _, aux = hw.attention(q * 0, k, v, return_aux=ALL)
    n = torch.full((1, 2, 3), 130.0, dtype=F64)
    for x, y in zip(aux[:4], (n.log(), n.log(), 1 / n, 1 / n), strict=True):
        compare(x, y, F64)


@pytest.mark.parametrize("shape", ((90,), (2, 90), (2, 4, 90), (1, 4, 90)), ids=str)
def test_mass_of_a_mask_and_of_its_indices(shape):
    q, k, v = inputs(b=2, sk=90, hq=4)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.2
    _, aux = hw.attention(q, k, v, return_aux=hw.Aux(mass=mask))
    values = mask.expand(2, 4, 90) if mask.dim() == 3 else mask.expand(2, 90)[:, None]
    p = hw.attention_probs(q, k, rows=torch.arange(70))
    compare(aux.mass, (p * values[:, :, None]).sum(-1), F64)
    if mask.dim() == 1:
        index = mask.nonzero()[:, 0]
        twice = torch.cat([index, index[:1]])
        for chosen in (index, twice, index.expand(2, -1)):
            _, again = hw.attention(q, k, v, return_aux=hw.Aux(mass=chosen))
            assert_same_bits(again.mass, aux.mass)


def test_only_what_was_asked_for():
    q, k, v = inputs()
    expected = hw.attention(q, k, v)
    every = hw.attention(q, k, v, return_aux=hw.Aux(True, True, True, True, torch.tensor([3])))[1]
    for name in STATISTICS:
        asked = hw.Aux(mass=torch.tensor([3])) if name == "mass" else hw.Aux(**{name: True})
        o, aux = hw.attention(q, k, v, return_aux=asked)
        assert_same_bits(o, expected)
        assert_same_bits(getattr(aux, name), getattr(every, name), name)
        assert [n for n, x in aux._asdict().items() if x is not None] == [name]
    assert hw.attention(q, k, v, return_aux=hw.Aux())[1] == hw.AuxResult()


# ---- hostile inputs ----


@pytest.mark.parametrize("dtype", (F64, F32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("activation", ("softmax", "softmax1"))
def test_rows_that_see_nothing(dtype, activation):
    """0, lse -inf (softmax1: 0), zero gradients, in every way a row can be left without keys."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(sq=90, sk=70))
    hide = torch.zeros(90, 70, dtype=dtype)
    hide[5:80] = -torch.inf
    ways = (
        ({"bias": hide}, slice(5, 80)),
        ({"is_causal": True}, slice(0, 20)),
        ({"window_size": (2, 1)}, slice(0, 18)),
        ({"key_bias": torch.full((1, 1, 70), -torch.inf)}, slice(0, 90)),
    )
    for options, rows in ways:
        o, aux = hw.attention(q, k, v, activation=activation, return_aux=ALL, **options)
        assert (o[:, rows] == 0).all() and not o.isnan().any(), options
        empty = 0.0 if activation == "softmax1" else -torch.inf
        assert (aux.lse[:, :, rows] == empty).all()
        for x in aux[1:4]:
            assert (x[:, :, rows] == 0).all()
        finite = torch.where(aux.lse.isfinite(), aux.lse, 0)
        d_q, d_k, d_v = torch.autograd.grad(o.sum() + finite.sum(), (q, k, v))
        assert (d_q[:, rows] == 0).all(), options
        for x in (d_q, d_k, d_v):
            assert x.isfinite().all(), options
        compare(o[:, rows], torch.zeros_like(o[:, rows]).double(), F32)


@pytest.mark.parametrize("dtype", (F64, F32, torch.bfloat16, torch.float16), ids=str)
def test_one_finite_key(dtype):
    """The value of that key, and no NaN in the gradients."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(sq=130))
    bias = torch.full((130, 130), -torch.inf, dtype=dtype)
    keys = torch.arange(130).flip(0)
    bias[torch.arange(130), keys] = 300.0
    o, aux = hw.attention(q, k, v, bias=bias, return_aux=ALL)
    compare(o, v[:, keys].double(), dtype, reference=v[:, keys])
    assert (aux.entropy.abs() < 1e-6).all() and (aux.p_max - 1).abs().max() < 1e-4
    for x in torch.autograd.grad(o.float().square().sum() + aux.lse.sum(), (q, k, v)):
        assert x.isfinite().all()


@pytest.mark.no_comparison
@pytest.mark.parametrize("dtype", (F64, F32, torch.bfloat16), ids=str)
def test_scores_of_any_size(dtype):
    """Up to 1e6, where a softmax without a maximum overflows by far."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(sq=130))
    for factor in (75.0, 1e6):
        o, aux = hw.attention(q, k, v, scale=factor, return_aux=ALL)
        assert all(x.isfinite().all() for x in (o, *aux[:4]))
        bound = v.abs().amax(1, keepdim=True) * 1.01
        assert (o.abs() <= bound).all()
        for x in torch.autograd.grad(o.float().sum(), (q, k, v)):
            assert not x.isnan().any()


def test_output_is_a_convex_combination():
    q, k, v = inputs(sq=300, dtype=F32)
    o = hw.attention(10 * q, k, torch.ones_like(v), is_causal=True)
    compare(o, torch.ones_like(o).double(), F32)


@pytest.mark.parametrize("j", (0, 64, 129))
@pytest.mark.parametrize("which", ("q", "k"))
def test_non_finite_inputs(which, j):
    """A NaN in q_j spoils row j; in k_j the rows from j on, and no row before its tile."""
    tensors = dict(zip(("q", "k", "v"), inputs(sq=130, h=1, dtype=F32), strict=True))
    expected = hw.attention(*tensors.values(), is_causal=True)
    spoilt = {**tensors, which: tensors[which].clone()}
    spoilt[which][0, j, 0, 3] = torch.nan
    o = hw.attention(*spoilt.values(), is_causal=True)
    bad = torch.zeros(130, dtype=torch.bool)
    bad[j if which == "q" else slice(j, None)] = True
    assert o[:, bad].isnan().all()
    assert_same_bits(o[:, ~bad], expected[:, ~bad])


@pytest.mark.no_comparison
def test_more_than_two_to_the_31_elements():
    """Shapes alone: no size is computed in 32 bits."""
    s = 2**26
    q = torch.empty(1, s, 1, 64, device="meta")
    o, aux = hw.attention(q.requires_grad_(), q, q, is_causal=True, return_aux=ALL)
    assert o.shape == q.shape and o.numel() > 2**31 and aux.lse.shape == (1, 1, s)
    (d_q,) = torch.autograd.grad(o.sum(), q)
    assert d_q.shape == q.shape
