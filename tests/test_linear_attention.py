# SPDX-License-Identifier: Apache-2.0
"""Linear attention: identities, gradients, parity with other code, long and hostile inputs.

What holds for every operator is in test_ops.py.
"""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from backends import targets
from headworks.reference.linear_attention import PRE, coefficients, features
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, fla_naive, randn
from specs.linear_attention import SPEC

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
MAPS = tuple(PRE)
TARGETS = [(backend, dtype) for backend, device, dtype in targets(SPEC) if device == "cpu"]


def inputs(b=1, s=150, h=2, d=16, dv=24, hq=None, dtype=F64, positive=False):
    q, k = randn(b, s, hq or h, d, dtype=dtype), randn(b, s, h, d, dtype=dtype, seed=1)
    q, k = (q.abs() + 0.1, k.abs() + 0.1) if positive else (q, k)
    return q, k, randn(b, s, h, dv, dtype=dtype, seed=2)


# ---- identities ----


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("cuts", ((0, 0, 1, 64, 65, 300), (128, 300), (299, 300)), ids=str)
def test_pieces_through_the_state_equal_the_whole(feature_map, cuts):
    q, k, v = inputs(s=300, positive=feature_map == "identity")
    options = {"feature_map": feature_map, "output_final_state": True}
    whole, final = hw.linear_attention(q, k, v, **options)
    state, pieces, begin = None, [], 0
    for end in cuts:
        rows = slice(begin, end)
        o, state = hw.linear_attention(
            q[:, rows], k[:, rows], v[:, rows], initial_state=state, **options
        )
        pieces.append(o)
        begin = end
    compare(torch.cat(pieces, 1), whole, F64)
    compare(state.kv, final.kv, F64)
    compare(state.z, final.z, F64)


def test_gradients_through_pieces_equal_the_whole():
    """Two calls joined by a differentiable state have the gradients of one call."""
    whole, parts = ([x.requires_grad_() for x in inputs(s=200)] for _ in range(2))
    g = randn(1, 200, 2, 24, seed=5)
    expected = torch.autograd.grad(hw.linear_attention(*whole), whole, g)
    first, state = hw.linear_attention(*(x[:, :90] for x in parts), output_final_state=True)
    second = hw.linear_attention(*(x[:, 90:] for x in parts), initial_state=state)
    actual = torch.autograd.grad(torch.cat([first, second], 1), parts, g)
    for x, y in zip(actual, expected, strict=True):
        compare(x, y, F64)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("index", (torch.int32, torch.int64))
def test_packed_equals_one_by_one(causal, index):
    lengths = (0, 70, 1, 0, 600, 9)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(index)
    q, k, v = inputs(s=sum(lengths))
    options = {"is_causal": causal, "output_final_state": True}
    o, state = hw.linear_attention(q, k, v, cu_seqlens=bounds, **options)
    for n, length in enumerate(lengths):
        rows = slice(int(bounds[n]), int(bounds[n]) + length)
        alone, last = hw.linear_attention(q[:, rows], k[:, rows], v[:, rows], **options)
        assert_same_bits(o[:, rows], alone, f"sequence {n}")
        assert_same_bits(state.kv[n : n + 1], last.kv, f"kv of sequence {n}")
        assert_same_bits(state.z[n : n + 1], last.z, f"z of sequence {n}")


def test_full_feature_form():
    """The quadratic form through the paper's 273 features, not through scores."""
    q, k, v = inputs()

    def phi(x):
        x = x / 16**0.25
        square = (x[..., None] * x[..., None, :]).flatten(-2) / 2**0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)

    w = torch.einsum("bihf,bjhf->bhij", phi(q), phi(k)).tril()
    expected = torch.einsum("bhij,bjhe->bihe", w / w.sum(-1, keepdim=True), v)
    compare(hw.linear_attention(q, k, v), expected, F64)


@pytest.mark.parametrize("feature_map", ("taylor2", "elu1", "relu"))
def test_output_is_a_convex_combination(feature_map):
    """Weights are not negative there: no output exceeds the largest value."""
    q, k, v = inputs(s=700, dtype=F32)
    for causal in (True, False):
        o = hw.linear_attention(q, k, v, feature_map=feature_map, is_causal=causal)
        assert (o.abs().amax((1, 3)) <= v.abs().amax((1, 3)) * (1 + 1e-6)).all()
    ones = torch.ones_like(v)
    o = hw.linear_attention(q + 3, k + 3, ones, feature_map=feature_map)
    compare(o, ones.double(), F32)


@pytest.mark.parametrize("s", (130, 700))
def test_later_tokens_do_not_leak(s):
    q, k, v = inputs(s=s, dtype=F32)
    expected = hw.linear_attention(q, k, v)
    for j in (1, 63, 64, 100, s - 1):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, j:] = 1e6
        actual = hw.linear_attention(*changed)
        assert_same_bits(actual[:, :j], expected[:, :j], f"rows before {j}")
        assert not torch.equal(actual[:, j:], expected[:, j:])


def test_last_causal_row_is_the_full_row():
    q, k, v = inputs(s=200)
    full = hw.linear_attention(q, k, v, is_causal=False)
    compare(hw.linear_attention(q, k, v)[:, -1], full[:, -1], F64)
    order = torch.randperm(200)
    compare(hw.linear_attention(q, k[:, order], v[:, order], is_causal=False), full, F64)


def test_state_does_not_depend_on_the_scale():
    q, k, v = inputs()
    states = [
        hw.linear_attention(q, k, v, scale=s, normalize=n, output_final_state=True)[1]
        for s, n in ((0.1, True), (2.0, False))
    ]
    for a, b in zip(*states, strict=True):
        assert_same_bits(a, b)


def test_grouped_heads_equal_repeated_heads():
    q, k, v = (x.requires_grad_() for x in inputs(h=2, hq=6))
    o = hw.linear_attention(q, k, v)
    wide_k, wide_v = (x.detach().repeat_interleave(3, 2).requires_grad_() for x in (k, v))
    wide = hw.linear_attention(q, wide_k, wide_v)
    compare(o, wide, F64)
    g = randn(*o.shape, seed=9)
    d_q, d_k, d_v = torch.autograd.grad(o, (q, k, v), g)
    w_q, w_k, w_v = torch.autograd.grad(wide, (q, wide_k, wide_v), g)
    compare(d_q, w_q, F64)
    compare(d_k, w_k.unflatten(2, (2, 3)).sum(3), F64)
    compare(d_v, w_v.unflatten(2, (2, 3)).sum(3), F64)


def test_heads_are_independent():
    q, k, v = inputs(h=3, s=600)
    every = hw.linear_attention(q, k, v)
    for h in range(3):
        alone = hw.linear_attention(q[:, :, h : h + 1], k[:, :, h : h + 1], v[:, :, h : h + 1])
        assert_same_bits(alone[:, :, 0], every[:, :, h].contiguous(), f"head {h}")


def test_callable_map_is_applied_first():
    """As mapping by hand and "identity"; gradients flow through it."""
    q, k, v = inputs()
    mix = torch.nn.Linear(16, 40, dtype=F64)

    def feature_map(x):
        return mix(x).exp()

    o = hw.linear_attention(q, k, v, feature_map=feature_map)
    by_hand = hw.linear_attention(feature_map(q), feature_map(k), v, feature_map="identity")
    compare(o, by_hand, F64)
    w = torch.einsum("bihf,bjhf->bhij", feature_map(q), feature_map(k)).tril()
    direct = torch.einsum("bhij,bjhe->bihe", w / w.sum(-1, keepdim=True), v)
    compare(o, direct, F64)
    g = randn(*o.shape, seed=9)
    actual, expected = (torch.autograd.grad(x, mix.weight, g)[0] for x in (o, direct))
    compare(actual, expected, F64)


def test_rows_without_weight():
    """relu where nothing overlaps: output 0, gradients 0, no NaN, also long and bidirectional."""
    for s in (5, 600):
        for causal in (True, False):
            q, k, v = (x.requires_grad_() for x in inputs(s=s, d=4))
            o = hw.linear_attention(-q.abs() - 0.1, k, v, feature_map="relu", is_causal=causal)
            for x in (o, *torch.autograd.grad(o.sum(), (q, k, v))):
                compare(x, torch.zeros_like(x), F64)


# ---- gradients ----


def check_gradients(options, b=1, s=5, hq=1, h=1, d=3, dv=2, state=True, lengths=None):
    positive = options.get("feature_map") == "identity"
    tensors = [x.requires_grad_() for x in inputs(b, s, h, d, dv, hq, positive=positive)]
    if state:
        rows = features(torch.zeros(d), options.get("feature_map", "taylor2")).numel()
        n = b if lengths is None else len(lengths)
        earlier = randn(n, 2, h, d, seed=7)
        earlier = earlier.abs() + 0.1 if positive else earlier
        m = features(earlier, options.get("feature_map", "taylor2"))
        tensors.append(randn(n, h, rows, dv, seed=8).requires_grad_())
        tensors.append(m.sum(1).detach().requires_grad_())
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)

    def call(q, k, v, *start):
        o, end = hw.linear_attention(
            q, k, v, initial_state=start or None, output_final_state=True, cu_seqlens=bounds,
            backend="cpu", **options,
        )  # fmt: skip
        return o, *end

    assert torch.autograd.gradcheck(call, tensors, atol=1e-6, rtol=1e-5)
    o = call(*tensors)[0]
    expected = hw.linear_attention(
        *tensors[:3], initial_state=tensors[3:] or None, cu_seqlens=bounds, backend="reference",
        **options,
    )  # fmt: skip
    compare(o, expected, F64)


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck(feature_map, causal, normalize):
    """Every differentiable argument, through o, kv and z, the denominator included."""
    check_gradients({"feature_map": feature_map, "is_causal": causal, "normalize": normalize})


@pytest.mark.parametrize(
    "sizes",
    (
        {"b": 2, "hq": 4, "h": 2, "s": 3, "d": 2},
        {"state": False, "s": 7},
        {"s": 1, "d": 1, "dv": 1},
        {"s": 6, "lengths": (2, 0, 4), "d": 2},
        {"s": 66, "d": 1, "dv": 1, "state": False},
    ),
    ids=str,
)
def test_gradcheck_shapes(sizes):
    check_gradients({"scale": 0.8, "eps": 0.1}, **sizes)


# ---- other people's code ----


@pytest.mark.parametrize("normalize", (True, False))
def test_parity_with_fla_parallel(normalize):
    naive = fla_naive("based")
    q, k, v = inputs(s=256, dtype=F32)
    theirs = naive.naive_parallel_based(
        *(x.double().transpose(1, 2) for x in (q, k, v)), use_norm=normalize
    ).transpose(1, 2)
    ours = hw.linear_attention(q, k, v, normalize=normalize, eps=1e-6)
    compare(ours, theirs, F32)


def test_parity_with_fla_chunk():
    naive = fla_naive("based")
    q, k, v = inputs(s=512)
    theirs = naive.naive_chunk_based(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    compare(hw.linear_attention(q, k, v, eps=1e-6), theirs, F64)


@pytest.mark.parametrize("normalize", (True, False))
def test_parity_with_fla_linear_attention(normalize):
    """Their state is that of mapped keys, and the z they carry is ours."""
    naive = fla_naive("linear_attn")
    q, k, v = inputs(s=130, dtype=F32, positive=True)
    o, state = naive.naive_recurrent_linear_attn(
        q, k, v, output_final_state=True, normalize=normalize
    )
    ours, last = hw.linear_attention(
        q, k, v, feature_map="identity", normalize=normalize, eps=1e-10, output_final_state=True
    )
    compare(ours, o.double(), F32)
    kv, z = state if normalize else (state, None)
    compare(last.kv, kv.double(), F32)
    if z is not None:
        compare(last.z, z[:, 0].double(), F32)


def test_parity_with_chunked_torch():
    """A chunk at a time: the features' state before it and the square tile within it."""
    q, k, v = inputs(s=640)
    c = coefficients(16, "taylor2", 0.25, q)
    kv, n, rows = 0, 0, []
    for begin in range(0, 640, 64):
        q_c, k_c, v_c = (x[:, begin : begin + 64] for x in (q, k, v))
        s = 0.25 * torch.einsum("bihd,bjhd->bhij", q_c, k_c)
        w = (1 + s + s * s / 2).tril()
        m_q, m_k = features(q_c, "taylor2") * c, features(k_c, "taylor2")
        o = torch.einsum("bhij,bjhe->bihe", w, v_c)
        z = w.sum(-1).transpose(1, 2)
        if begin:
            o = o + torch.einsum("bihf,bhfe->bihe", m_q, kv)
            z = z + torch.einsum("bihf,bhf->bih", m_q, n)
        rows.append(o / z[..., None])
        kv, n = kv + torch.einsum("bjhf,bjhe->bhfe", m_k, v_c), n + m_k.sum(1)
    o, state = hw.linear_attention(q, k, v, output_final_state=True)
    compare(o, torch.cat(rows, 1), F64)
    compare(state.kv, kv, F64)
    compare(state.z, n, F64)


# ---- long, huge, hostile ----


def test_long_sequence_does_not_drift():
    """64 K tokens in fp32: rows near the end against sums in fp64, and the state."""
    s = 65536
    q, k, v = inputs(s=s, h=1, dv=16, dtype=F32)
    o, state = hw.linear_attention(q, k, v, output_final_state=True)
    wide = [x.double()[0, :, 0] for x in (q, k, v)]
    for i in (0, 63, 4095, 32768, s - 1):
        x = 0.25 * wide[1][: i + 1] @ wide[0][i]
        w = 1 + x + x * x / 2
        compare(o[0, i, 0], w @ wide[2][: i + 1] / w.sum(), F32, name=f"row {i}")
    kv, z = 0, 0
    for rows in range(0, s, 8192):
        m = features(wide[1][rows : rows + 8192], "taylor2")
        kv, z = kv + m.T @ wide[2][rows : rows + 8192], z + m.sum(0)
    compare(state.kv[0, 0], kv, F32)
    compare(state.z[0, 0], z, F32)


@pytest.mark.no_comparison
def test_more_than_two_to_the_31_elements():
    """Shapes alone: no size is computed in 32 bits."""
    s = 2**27
    q, v = torch.empty(1, s, 1, 16, device="meta"), torch.empty(1, s, 1, 64, device="meta")
    o, state = hw.linear_attention(q, q, v.requires_grad_(), output_final_state=True)
    assert o.shape == (1, s, 1, 64) and o.numel() > 2**31 and state.kv.shape == (1, 1, 153, 64)
    (d_v,) = torch.autograd.grad(o.sum(), v)
    assert d_v.shape == v.shape


@pytest.mark.parametrize("dtype", (F64, F32))
def test_huge_scores(dtype):
    """Scores up to 1e6 and beyond: w grows with their square, the division takes it out."""
    q, k, v = inputs(s=130, dtype=dtype)
    o = hw.linear_attention(q * 1e3, k * 1e3, v)
    wide = [x.double() for x in (q * 1e3, k * 1e3, v)]
    compare(o, hw.linear_attention(*wide, backend="reference"), dtype)
    assert o.isfinite().all()


@pytest.mark.parametrize("backend, dtype", TARGETS, ids=str)
def test_bounds_of_any_stride(backend, dtype):
    """cu_seqlens that are every second number of a tensor, of sequences that are cut."""
    q, k, v = inputs(s=1500, h=1, d=8, dv=8, dtype=dtype)
    apart = torch.tensor([0, -5, 900, -5, 1300, -5, 1500])
    expected = hw.linear_attention(q, k, v, cu_seqlens=apart[::2].contiguous(), backend=backend)
    actual = hw.linear_attention(q, k, v, cu_seqlens=apart[::2], backend=backend)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("which", ("q", "k", "v"))
@pytest.mark.parametrize("j", (0, 70, 129))
def test_non_finite_inputs(which, value, j):
    """q_j spoils row j, k_j the rows from j on, v_j one column of the rows from j on.

    In the tile of 64 tokens of j, weights 0 of earlier rows meet v_j: they may be spoilt too.
    """
    names = ("q", "k", "v")
    clean = dict(zip(names, inputs(s=130, h=1, dtype=F32), strict=True))
    expected = hw.linear_attention(*clean.values())
    spoilt = {**clean, which: clean[which].clone()}
    spoilt[which][0, j, 0, 3] = value
    o = hw.linear_attention(*spoilt.values())
    bad = torch.zeros_like(o, dtype=torch.bool)
    if which == "q":
        bad[:, j] = True
    elif which == "k":
        bad[:, j:] = True
    else:
        bad[:, j:, :, 3] = True
    assert not o[bad].isfinite().any()
    if which == "v":
        bad[:, j - j % 64 : j, :, 3] = True
    assert_same_bits(o[~bad], expected[~bad])


# ---- bad input ----


def good(**changes):
    q, k, v = inputs(s=6, h=2, dv=5, dtype=F32)
    return {"q": q, "k": k, "v": v, **changes}


def zeros(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def state(n=1, h=2, f=153, dv=5, dtype=F32):
    return hw.LinearState(zeros(n, h, f, dv, dtype=dtype), zeros(n, h, f, dtype=dtype))


def bounds(*values):
    return torch.tensor(values)


BAD = (
    Refused(ValueError, "q", "[6, 2, 16]", "[B, S, H, D]", q=zeros(6, 2, 16)),
    Refused(ValueError, "v", "[1, 6, 2, 5, 1]", v=zeros(1, 6, 2, 5, 1)),
    Refused(ValueError, "k", "[1, 6, 2, 8]", "[1, 6, 2, 16]", k=zeros(1, 6, 2, 8)),
    Refused(ValueError, "k", "[1, 7, 2, 16]", k=zeros(1, 7, 2, 16)),
    Refused(ValueError, "v", "[2, 6, 2, 5]", v=zeros(2, 6, 2, 5)),
    Refused(ValueError, "v", "[1, 6, 1, 5]", v=zeros(1, 6, 1, 5)),
    Refused(ValueError, "heads", "3", "multiple", q=zeros(1, 6, 3, 16)),
    Refused(ValueError, "heads", "2", k=zeros(1, 6, 0, 16), v=zeros(1, 6, 0, 5)),
    Refused(ValueError, "dimension D", "0", q=zeros(1, 6, 2, 0), k=zeros(1, 6, 2, 0)),
    Refused(ValueError, "33", "32", "taylor2", q=zeros(1, 6, 2, 33), k=zeros(1, 6, 2, 33)),
    Refused(TypeError, "k", "float64", "float32", "autocast", k=zeros(1, 6, 2, 16, dtype=F64)),
    Refused(TypeError, "v", "bfloat16", v=zeros(1, 6, 2, 5, dtype=torch.bfloat16)),
    Refused(TypeError, "q", "int64", q=zeros(1, 6, 2, 16, dtype=torch.int64)),
    Refused(TypeError, "q", "a list", "torch.Tensor", q=[1.0]),
    Refused(TypeError, "v", "NoneType", v=None),
    Refused(RuntimeError, "k", "meta", "cpu", ".to(", k=zeros(1, 6, 2, 16, device="meta")),
    Refused(ValueError, "feature_map", "'exp'", "taylor2", feature_map="exp"),
    Refused(ValueError, "feature_map", "None", feature_map=None),
    Refused(ValueError, "scale", "nan", "finite", scale=float("nan")),
    Refused(ValueError, "scale", "inf", "finite", scale=float("inf")),
    Refused(TypeError, "scale", "float32", "Python number", scale=torch.ones(())),
    Refused(TypeError, "scale", "a str", scale="0.25"),
    Refused(ValueError, "eps", "-1.0", ">= 0", eps=-1),
    Refused(ValueError, "eps", "nan", eps=float("nan")),
    Refused(ValueError, "initial_state.kv", "[1, 2, 16, 5]", "153", initial_state=state(f=16)),
    Refused(ValueError, "initial_state.kv", "153", "16", feature_map="elu1",
            initial_state=state()),
    Refused(ValueError, "initial_state.kv", "[2, 2, 153, 5]", initial_state=state(n=2)),
    Refused(ValueError, "initial_state.kv", "[1, 1, 153, 5]", initial_state=state(h=1)),
    Refused(ValueError, "initial_state.z", "[1, 2, 16]",
            initial_state=(state().kv, zeros(1, 2, 16))),
    Refused(TypeError, "initial_state.kv", "float64", "float32", initial_state=state(dtype=F64)),
    Refused(TypeError, "initial_state.z", "NoneType", initial_state=(state().kv, None)),
    Refused(TypeError, "initial_state", "float32", "LinearState", initial_state=state().kv),
    Refused(RuntimeError, "initial_state.kv", "meta", "cpu",
            initial_state=(state().kv.to("meta"), state().z)),
    Refused(TypeError, "cu_seqlens", "a list", "int32", cu_seqlens=[0, 6]),
    Refused(TypeError, "cu_seqlens", "float32", cu_seqlens=zeros(2)),
    Refused(ValueError, "cu_seqlens", "[1, 2]", "[N + 1]", cu_seqlens=bounds([0, 6])),
    Refused(ValueError, "cu_seqlens", "[0]", cu_seqlens=bounds()[:0].long()),
    Refused(ValueError, "cu_seqlens[2]", "2", "4", cu_seqlens=bounds(0, 4, 2, 6)),
    Refused(ValueError, "cu_seqlens", "5", "6", cu_seqlens=bounds(0, 5)),
    Refused(ValueError, "cu_seqlens", "from 1", cu_seqlens=bounds(1, 6)),
    Refused(ValueError, "cu_seqlens", "9", cu_seqlens=bounds(0, 9)),
    Refused(ValueError, "batch", "2", "1", "cu_seqlens", q=zeros(2, 6, 2, 16),
            k=zeros(2, 6, 2, 16), v=zeros(2, 6, 2, 5), cu_seqlens=bounds(0, 6)),
    Refused(ValueError, "initial_state.kv", "[1, 2, 153, 5]", "[2, 2, 153, 5]",
            cu_seqlens=bounds(0, 3, 6), initial_state=state()),
    Refused(ValueError, "backend", "'gpu'", "one of", backend="gpu"),
    Refused(RuntimeError, "sm80", "cpu", "emulate:sm80", backend="sm80"),
)  # fmt: skip


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", BAD, ids=repr)
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_bad_input(case, backend, monkeypatch):
    arguments = good(backend=backend) | case.arguments
    allocates_nothing(monkeypatch)
    q, k, v = (arguments.pop(name) for name in ("q", "k", "v"))
    case.check(lambda: hw.linear_attention(q, k, v, **arguments))


def test_mixed_dtypes_with_fp64_under_autocast():
    """Autocast leaves fp64 alone, as torch does, so a mix with it stays an error."""
    q, k, v = inputs(s=6)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64"):
        hw.linear_attention(q, k.float(), v)
    with torch.autocast("cpu", torch.bfloat16):
        compare(hw.linear_attention(q, k, v), hw.linear_attention(q, k, v), F64)
