# SPDX-License-Identifier: Apache-2.0
"""The decode step: equal to the last row of the parallel form, in place, without a gradient."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from headworks.reference.linear_attention import PRE
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, randn

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32


@pytest.mark.parametrize("feature_map", tuple(PRE))
@pytest.mark.parametrize("normalize", (True, False))
def test_prefill_then_decode_equals_parallel(feature_map, normalize):
    b, s, h, hq, d, dv = 2, 12, 2, 4, 16, 24
    q, k, v = randn(b, s, hq, d).abs(), randn(b, s, h, d, seed=1).abs(), randn(b, s, h, dv, seed=2)
    options = {"feature_map": feature_map, "normalize": normalize}
    whole, final = hw.linear_attention(q, k, v, output_final_state=True, **options)
    _, state = hw.linear_attention(q[:, :5], k[:, :5], v[:, :5], output_final_state=True, **options)
    kept = state.kv.data_ptr(), state.z.data_ptr()
    for i in range(5, s):
        o = hw.linear_attention_step(q[:, i], k[:, i], v[:, i], state, **options)
        compare(o, whole[:, i], F64)
    assert kept == (state.kv.data_ptr(), state.z.data_ptr())
    compare(state.kv, final.kv, F64)
    compare(state.z, final.z, F64)


@pytest.mark.parametrize("dtype", (F32, torch.bfloat16, torch.float16))
def test_decode_from_nothing(dtype):
    """From the initial state, 300 tokens: no drift, because the state is fp32."""
    s, d, dv = 300, 16, 32
    q, k, v = (randn(1, s, 1, n, dtype=dtype, seed=n) for n in (d, d + 1, dv))
    k = k[..., :d]
    state = hw.LinearState.initial(1, 1, d, dv)
    o = torch.stack(
        [hw.linear_attention_step(q[:, i], k[:, i], v[:, i], state) for i in range(s)], 1
    )
    wide = [x.double() for x in (q, k, v)]
    expected = hw.linear_attention(*wide, backend="reference")
    compare(o, expected, dtype, reference=expected.to(dtype), floor=1.0)


def test_strided_state_is_updated_where_it_is():
    """A slice of a larger cache, last dimension strided too; its neighbours stay untouched."""
    q, k, v = randn(2, 1, 4, dtype=F32), randn(2, 1, 4, dtype=F32), randn(2, 1, 6, dtype=F32)
    cache = torch.zeros(4, 1, 15, 12)
    norms = torch.zeros(4, 1, 30)
    state = hw.LinearState(cache[1:3, :, :, ::2], norms[1:3, :, ::2])
    plain = hw.LinearState.initial(2, 1, 4, 6)
    for _ in range(2):
        o = hw.linear_attention_step(q, k, v, state)
        assert_same_bits(o, hw.linear_attention_step(q, k, v, plain))
    assert_same_bits(state.kv, plain.kv)
    assert_same_bits(state.z, plain.z)
    assert not cache[[0, 3]].any() and not cache[..., 1::2].any() and not norms[..., 1::2].any()


def test_update_is_seen_by_autograd():
    """A state saved for a backward pass and then stepped is an error, not a wrong gradient."""
    q, k, v = (randn(1, 3, 1, 4, dtype=F32, seed=n) for n in range(3))
    state = hw.LinearState.initial(1, 1, 4, 4)
    o = hw.linear_attention(q.requires_grad_(), k, v, initial_state=state)
    with torch.no_grad():
        hw.linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
    compare(
        state.z, hw.linear_attention(q, k, v, output_final_state=True)[1].z[:] * 0 + state.z, F32
    )


def test_under_inference_mode():
    q, k, v = (randn(1, 1, 4, dtype=F32, seed=n) for n in range(3))
    with torch.inference_mode():
        state = hw.LinearState.initial(1, 1, 4, 4)
        first = hw.linear_attention_step(q, k, v, state)
    second = hw.LinearState.initial(1, 1, 4, 4)
    assert_same_bits(first, hw.linear_attention_step(q, k, v, second))


def test_gradient_is_refused():
    q, k, v = (randn(1, 1, 4, dtype=F32, seed=n) for n in range(3))
    state = hw.LinearState.initial(1, 1, 4, 4)
    for backend in ("auto", "reference"):
        case = Refused(RuntimeError, "requires grad", "torch.no_grad()")
        case.check(lambda b=backend: hw.linear_attention_step(
            q.clone().requires_grad_(), k, v, state, backend=b))  # fmt: skip
    assert not state.kv.any()
    with torch.no_grad():
        o = hw.linear_attention_step(q.requires_grad_(), k, v, state)
    compare(o, v.double(), F32)


def zeros(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


def state(b=2, h=2, f=153, dv=5, dtype=F32):
    return hw.LinearState(zeros(b, h, f, dv, dtype=dtype), zeros(b, h, f, dtype=dtype))


BAD = (
    Refused(ValueError, "q", "[2, 1, 2, 16]", "[B, H, D]", q=zeros(2, 1, 2, 16)),
    Refused(ValueError, "k", "[2, 2, 8]", k=zeros(2, 2, 8)),
    Refused(ValueError, "v", "[3, 2, 5]", v=zeros(3, 2, 5)),
    Refused(ValueError, "heads", "3", q=zeros(2, 3, 16)),
    Refused(ValueError, "33", "taylor2", q=zeros(2, 2, 33), k=zeros(2, 2, 33)),
    Refused(TypeError, "v", "float64", v=zeros(2, 2, 5, dtype=F64)),
    Refused(TypeError, "state", "NoneType", "LinearState", state=None),
    Refused(ValueError, "state.kv", "[2, 2, 16, 5]", "153", state=state(f=16)),
    Refused(ValueError, "state.kv", "[1, 2, 153, 5]", state=state(b=1)),
    Refused(TypeError, "state.kv", "float64", state=state(dtype=F64)),
    Refused(RuntimeError, "state.kv", "meta", "cpu", state=(state().kv.to("meta"), state().z)),
    Refused(ValueError, "state.kv", "strides", "in place", "contiguous",
            state=(state(b=1).kv.expand(2, 2, 153, 5), state().z)),
    Refused(ValueError, "scale", "inf", scale=float("inf")),
    Refused(ValueError, "feature_map", "'softmax'", feature_map="softmax"),
    Refused(ValueError, "backend", "'tpu'", backend="tpu"),
)  # fmt: skip


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", BAD, ids=repr)
def test_bad_input(case, monkeypatch):
    arguments = {"q": zeros(2, 2, 16), "k": zeros(2, 2, 16), "v": zeros(2, 2, 5), "state": state()}
    arguments |= case.arguments
    allocates_nothing(monkeypatch)
    q, k, v, kept = (arguments.pop(name) for name in ("q", "k", "v", "state"))
    case.check(lambda: hw.linear_attention_step(q, k, v, kept, **arguments))
