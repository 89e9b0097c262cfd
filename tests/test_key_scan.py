# SPDX-License-Identifier: Apache-2.0
"""Key scan: identities, gradients, stability, bad input. The rest is in test_ops.py."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from backends import native_info
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, randn

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
BACKENDS = ["cpu"] + (["emulate:simt"] if native_info().get("emulator") else [])


def inputs(b=1, s=150, h=2, dv=24, dtype=F64):
    return randn(b, s, h, dtype=dtype), randn(b, s, h, dv, dtype=dtype, seed=1)


def test_equals_two_cumulative_sums():
    s, v = inputs(s=700)
    e = s.exp()[..., None]
    o, state = hw.key_scan(s, v, output_final_state=True)
    compare(o, (e * v).cumsum(1) / e.cumsum(1), F64)
    compare(state.lse, s.logsumexp(1), F64)


@pytest.mark.parametrize("cuts", ((0, 0, 1, 64, 65, 300), (128, 300)), ids=str)
def test_pieces_through_the_state_equal_the_whole(cuts):
    s, v = inputs(s=300)
    whole, final = hw.key_scan(s, v, output_final_state=True)
    state, pieces, begin = None, [], 0
    for end in cuts:
        rows = slice(begin, end)
        o, state = hw.key_scan(s[:, rows], v[:, rows], initial_state=state, output_final_state=True)
        pieces.append(o)
        begin = end
    compare(torch.cat(pieces, 1), whole, F64)
    for x, y in zip(state, final, strict=True):
        compare(x, y, F64)


def test_one_token_at_a_time():
    """Decoding is the same function on sequences of length 1."""
    s, v = inputs(s=20, dtype=F32)
    whole = hw.key_scan(s, v)
    state = hw.KeyScanState.initial(1, 2, 24)
    for i in range(20):
        o, state = hw.key_scan(
            s[:, i : i + 1], v[:, i : i + 1], initial_state=state, output_final_state=True
        )
        compare(o[:, 0], whole[:, i].double(), F32)


def test_state_is_one_more_key():
    s, v = inputs()
    o0, lse0 = randn(1, 2, 24, seed=5), randn(1, 2, seed=6)
    longer = hw.key_scan(torch.cat([lse0[:, None], s], 1), torch.cat([o0[:, None], v], 1))
    compare(hw.key_scan(s, v, initial_state=(o0, lse0)), longer[:, 1:], F64)


def test_constant_in_the_scores_cancels():
    s, v = inputs()
    o, state = hw.key_scan(s, v, output_final_state=True)
    for c in (-1e4, 3.0, 1e6):
        shifted, last = hw.key_scan(s + c, v, output_final_state=True)
        compare(shifted, o, F32)
        compare(last.lse - c, state.lse, F32)


def test_output_is_a_convex_combination():
    s, v = inputs(s=700, dtype=F32)
    o = hw.key_scan(10 * s, v)
    assert (o.abs().amax(1) <= v.abs().amax(1) * (1 + 1e-6)).all()
    compare(hw.key_scan(10 * s, torch.ones_like(v)), torch.ones_like(v).double(), F32)


@pytest.mark.parametrize("n", (130, 700))
def test_later_tokens_do_not_leak(n):
    s, v = inputs(s=n, dtype=F32)
    expected = hw.key_scan(s, v)
    for j in (1, 63, 64, n - 1):
        other_s, other_v = s.clone(), v.clone()
        other_s[:, j:], other_v[:, j:] = 50.0, 1e6
        assert_same_bits(hw.key_scan(other_s, other_v)[:, :j], expected[:, :j])


def test_scores_of_any_size():
    """Scores that overflow exp by far, rising, falling and mixed."""
    n = 300
    v = inputs(s=n, h=1, dtype=F32)[1]
    line = torch.linspace(-1e4, 1e4, n)
    for values in (line, -line, line[torch.randperm(n)]):
        s = values[None, :, None].contiguous()
        o, state = hw.key_scan(s, v, output_final_state=True)
        expected = hw.key_scan(s.double(), v.double(), backend="reference")
        compare(o, expected, F32)
        assert state.lse.isfinite().all()


def test_nothing_seen_yet():
    """Scores of -inf: output and gradients 0 until the first finite score."""
    s, v = (x.requires_grad_() for x in inputs(s=9))
    with torch.no_grad():
        s[:, :4] = -torch.inf
    o, state = hw.key_scan(s, v, output_final_state=True)
    compare(o[:, :4], torch.zeros_like(o[:, :4]), F64)
    assert_same_bits(o[:, 4], v[:, 4])
    d_s, d_v = torch.autograd.grad(o.sum() + state.lse.sum(), (s, v))
    assert d_s.isfinite().all() and d_v.isfinite().all()
    compare(d_v[:, :4], torch.zeros_like(d_v[:, :4]), F64)


def test_long_sequence_does_not_drift():
    n = 65536
    s, v = inputs(s=n, h=1, dv=8, dtype=F32)
    o, state = hw.key_scan(s, v, output_final_state=True)
    e = s.double().exp()[..., None]
    compare(o, (e * v.double()).cumsum(1) / e.cumsum(1), F32)
    compare(state.lse, s.double().logsumexp(1), F32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_weigh_nothing_change_nothing(backend):
    """A sum of 1.37 that e^-40 is added to: what is kept is kept by exactly 1, every time."""
    s = torch.full((1, 1000, 1), -40.0)
    s[:, :2] = torch.tensor([[0.0], [-1.0]])
    _, v = inputs(s=1000, h=1, dv=8, dtype=F32)
    o = hw.key_scan(s, v, backend=backend)
    assert_same_bits(o[:, 2:], o[:, 1:2].expand_as(o[:, 2:]))


@pytest.mark.no_comparison
def test_more_than_two_to_the_31_elements():
    n = 2**26
    s, v = torch.empty(1, n, 1, device="meta"), torch.empty(1, n, 1, 64, device="meta")
    o = hw.key_scan(s.requires_grad_(), v)
    (d_s,) = torch.autograd.grad(o.sum(), s)
    assert o.numel() > 2**31 and o.shape == v.shape and d_s.shape == s.shape


@pytest.mark.parametrize("with_state", (True, False))
@pytest.mark.parametrize("n", (1, 6, 66))
def test_gradcheck(n, with_state):
    tensors = list(inputs(s=n, h=1 if n > 6 else 2, dv=1 if n > 6 else 3))
    if with_state:
        tensors += [randn(*tensors[1][:, 0].shape, seed=3), randn(*tensors[0][:, 0].shape, seed=4)]
    tensors = [x.requires_grad_() for x in tensors]

    def call(s, v, *start):
        o, end = hw.key_scan(
            s, v, initial_state=start or None, output_final_state=True, backend="cpu"
        )
        return o, *end

    assert torch.autograd.gradcheck(call, tensors)
    expected = hw.key_scan(*tensors[:2], initial_state=tensors[2:] or None, backend="reference")
    compare(call(*tensors)[0], expected, F64)


def zeros(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def state(b=1, h=2, dv=5, dtype=F32):
    return hw.KeyScanState(zeros(b, h, dv, dtype=dtype), zeros(b, h, dtype=dtype))


BAD = (
    Refused(ValueError, "s", "[1, 6, 2, 1]", "[B, S, H]", s=zeros(1, 6, 2, 1)),
    Refused(ValueError, "v", "[1, 6, 2]", "[B, S, H, Dv]", v=zeros(1, 6, 2)),
    Refused(ValueError, "v", "[1, 7, 2, 5]", "[1, 6, 2, 5]", v=zeros(1, 7, 2, 5)),
    Refused(ValueError, "v", "[1, 6, 1, 5]", v=zeros(1, 6, 1, 5)),
    Refused(TypeError, "v", "bfloat16", "float32", "autocast",
            v=zeros(1, 6, 2, 5, dtype=torch.bfloat16)),
    Refused(TypeError, "s", "int64", s=zeros(1, 6, 2, dtype=torch.int64)),
    Refused(TypeError, "s", "a float", s=1.0),
    Refused(RuntimeError, "v", "meta", "cpu", v=zeros(1, 6, 2, 5, device="meta")),
    Refused(TypeError, "initial_state", "float32", "KeyScanState", initial_state=state().o),
    Refused(ValueError, "initial_state.o", "[1, 2, 4]", initial_state=state(dv=4)),
    Refused(ValueError, "initial_state.o", "[2, 2, 5]", initial_state=state(b=2)),
    Refused(ValueError, "initial_state.lse", "[1, 3]",
            initial_state=(state().o, zeros(1, 3))),
    Refused(TypeError, "initial_state.o", "float64", initial_state=state(dtype=F64)),
    Refused(ValueError, "backend", "'sm70'", backend="sm70"),
    Refused(RuntimeError, "simt", "cpu", "emulate:simt", backend="simt"),
)  # fmt: skip


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", BAD, ids=repr)
def test_bad_input(case, monkeypatch):
    arguments = {"s": zeros(1, 6, 2), "v": zeros(1, 6, 2, 5)} | case.arguments
    allocates_nothing(monkeypatch)
    s, v = arguments.pop("s"), arguments.pop("v")
    case.check(lambda: hw.key_scan(s, v, **arguments))


def test_long_sequences_have_the_same_bits_in_any_batch():
    """Enough tokens for segments, in batches on either side of what would fill the threads."""
    s, v = torch.randn(9, 1500, 1), torch.randn(9, 1500, 1, 8)
    g = torch.randn_like(v)

    def results(some):
        inputs = [x[some].requires_grad_() for x in (s, v)]
        o = hw.key_scan(*inputs)
        return o.detach(), *torch.autograd.grad(o, inputs, g[some])

    every = results(slice(None))
    for some in (slice(0, 1), slice(2, 9)):
        for n, (x, y) in enumerate(zip(results(some), every, strict=True)):
            assert_same_bits(x, y[some], f"result {n} of {some}")


@pytest.mark.no_comparison
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_initial_state_is_not_made_of_rounded_rows(dtype, backend):
    """1000 tokens that hardly weigh beside the state: every row rounds to the state's o."""
    torch.manual_seed(3)
    s, v = torch.full((1, 1000, 1), -20.0).to(dtype), torch.randn(1, 1000, 1, 8).to(dtype)
    o0, lse0, g = torch.randn(1, 1, 8), torch.zeros(1, 1), torch.randn(1, 1000, 1, 8).to(dtype)

    def gradient(backend, *tensors):
        s, v, o0, lse0, g = tensors
        lse0 = lse0.clone().requires_grad_()
        o = hw.key_scan(s, v, initial_state=(o0, lse0), backend=backend)
        return torch.autograd.grad(o, lse0, g)[0]

    oracle = gradient("reference", *(x.double() for x in (s, v, o0, lse0, g)))
    actual = gradient(backend, s, v, o0, lse0, g)
    # The sum over rows of <g, o - o0>, in which each o is rounded to fp32.
    rounding = torch.finfo(torch.float32).eps * (g.float().abs() * o0.abs()).sum()
    assert oracle.abs().max() < 0.01 and rounding < 0.001
    assert (actual - oracle).abs().max() <= rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [-1e9, 1e9, 3e4])
def test_equal_scores_of_any_size(backend, size):
    """All equal: o is the mean, and every token has its share of the gradient."""
    s, v = torch.full((1, 70, 1), size), torch.randn(1, 70, 1, 8)
    g = torch.randn_like(v)

    def results(backend, s, v, g):
        inputs = [x.clone().requires_grad_() for x in (s, v)]
        o = hw.key_scan(*inputs, backend=backend)
        return o.detach(), *torch.autograd.grad(o, inputs, g)

    oracle = results("reference", *(x.double() for x in (s, v, g)))
    for x, y in zip(results(backend, s, v, g), oracle, strict=True):
        compare(x, y, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 3, 1100])
def test_a_state_without_weight_has_no_value(backend, tokens):
    """lse = -inf: o of the state is nothing, whatever it holds, and has no gradient."""
    o0 = torch.ones(1, 1, 8, requires_grad=True)
    s, v = torch.full((1, tokens, 1), -torch.inf), torch.ones(1, tokens, 1, 8)
    state = (o0, torch.full((1, 1), -torch.inf))
    o, end = hw.key_scan(s, v, initial_state=state, output_final_state=True, backend=backend)
    compare(o, torch.zeros(o.shape, dtype=torch.float64), torch.float32)
    compare(end.o, torch.zeros(1, 1, 8, dtype=torch.float64), torch.float32)
    (d_o0,) = torch.autograd.grad(end.o.sum() + o.sum(), o0)
    compare(d_o0, torch.zeros(1, 1, 8, dtype=torch.float64), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_score_that_is_not_finite_spoils_later_rows(backend, value):
    s, v = torch.randn(1, 1100, 1), torch.randn(1, 1100, 1, 8)
    s[:, 5] = value
    o, end = hw.key_scan(s, v, output_final_state=True, backend=backend)
    oracle, end_of_oracle = hw.key_scan(s, v, output_final_state=True, backend="reference")
    compare(o, oracle.double(), torch.float32)
    compare(end.lse, end_of_oracle.lse.double(), torch.float32)
    assert o[:, 5:].isnan().all() and not o[:, :5].isnan().any()
