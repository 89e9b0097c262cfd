# SPDX-License-Identifier: Apache-2.0
"""How calls with a gradient reach native code: at once, or through torch's dispatcher where
somebody records or replaces operations, or a tensor is not what it looks like."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import headworks as hw
from headworks.testing import assert_same_bits
from identities import randn


def clusters(q, k, v, _):
    index = torch.arange(6).view(1, 1, 2, 3).expand(1, 2, 2, 3)
    return hw.kmeans_routing_attention(q, k, v, q_index=index)


def regions(q, k, v, _):
    images = (x[:, None] for x in (q, k, v))
    return hw.bilevel_routing_attention(*images, num_regions=(1, 3), topk=2)[:, 0]


def windows(q, k, v, gate):
    images = [x.unflatten(1, (2, 3)) for x in (q, k, v)]
    return hw.window_attention(*images, window=(2, 2), bias_table=gate[0, :4].T).flatten(1, 2)


def transposed(q, k, v, gate):
    return hw.attention_transpose(q, k, v, key_bias=gate.transpose(1, 2))


def mixed(q, k, v, _):
    w = torch.cat((q, k, v), -1)[..., :3]  # [1, 6, 2, 3]
    return hw.na2d_av(w[:, None], v[:, None], kernel_size=(1, 3))[:, 0]


def contmixed(q, k, v, _):
    weight = torch.ones(4, 4, dtype=q.dtype).tril()
    return hw.contmix(
        q[:, None, :, :1], weight, None, v[:, None], kernel_size=(1, 3), small_kernel_size=1
    )[:, 0]  # fmt: skip


# By name: the call of q, k, v [1, 6, 2, 4] and a gate [1, 6, 2], and its operators.
CALLS = {
    "attention": (lambda q, k, v, _: hw.attention(q, k, v), "attention"),
    "attention, gate and sink": (
        lambda q, k, v, gate: hw.attention(q, k, v, head_gate=gate, sink=gate[0, 0]), "attention",
    ),
    "attention, sigmoid": (
        lambda q, k, v, _: hw.attention(q, k, v, activation="sigmoid"), "attention",
    ),
    "attention_lse": (lambda q, k, *_: hw.attention_lse(q, k)[..., None], "attention"),
    "attention_transpose": (transposed, "attention"),
    "linear_attention": (lambda q, k, v, _: hw.linear_attention(q, k, v), "linear_attention"),
    "key_scan": (lambda q, k, v, gate: hw.key_scan(gate, v), "key_scan"),
    "moh_attention": (hw.moh_attention, "routing_attention"),
    "kmeans_routing_attention": (clusters, "routing_attention"),
    "bilevel_routing_attention": (regions, "routing_attention"),
    "window_attention": (windows, "window_attention"),
    "na2d_av": (mixed, "na2d_av"),
    "contmix": (contmixed, "contmix"),
}  # fmt: skip


def tensors(of=lambda x: x.requires_grad_()):
    q, k, v = (of(randn(1, 6, 2, 4, seed=seed)) for seed in range(3))
    return q, k, v, of(randn(1, 6, 2, seed=3).abs() + 0.1)


def gradients(call, given, change=lambda d_o: d_o):
    o = call(*given)
    d_o = change(randn(*o.shape, seed=7))
    return torch.autograd.grad(o, given, d_o, allow_unused=True)


def assert_all_same(made, want):
    for x, y in zip(made, want, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert_same_bits(x, y)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("of", [lambda x: x.requires_grad_(), torch.nn.Parameter])
def test_ordinary_tensors_pass_by_the_dispatcher(name, of):
    call, _ = CALLS[name]
    given = tensors(of)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        gradients(call, given)
    assert not [e.name for e in recorded.events() if e.name.startswith("headworks::")]


@pytest.mark.parametrize("name", CALLS)
def test_who_records_sees_the_operators_and_changes_nothing(name):
    call, operator = CALLS[name]
    want = gradients(call, tensors())
    with Recorder() as mode:
        made = gradients(call, tensors())
    assert_all_same(made, want)
    own = {x for x in mode.seen if x.startswith("headworks.")}
    assert {f"headworks.{operator}_bwd.default"} < own


@pytest.mark.parametrize("name", CALLS)
def test_a_cotangent_that_is_not_what_it_looks_like(name):
    """With its sign kept beside it, or without memory."""
    call, _ = CALLS[name]
    want = gradients(call, tensors())
    made = gradients(call, tensors(), lambda x: torch._neg_view(-x))
    assert_all_same(made, want)
    want = gradients(call, tensors(), torch.zeros_like)
    made = gradients(call, tensors(), lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype))
    assert_all_same([None if x is None else x.abs() for x in made],
                    [None if x is None else x.abs() for x in want])  # fmt: skip


# Options whose gradients are made of operations of torch besides.
MORE = CALLS | {
    "attention, gate": (lambda q, k, v, gate: hw.attention(q, k, v, head_gate=gate), "attention"),
    "attention, mix": (
        lambda q, k, v, gate: hw.attention(q, k, v, identity_mix=gate[0, 0]), "attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MORE)
def test_a_tensor_of_two_tensors(name, dtype):
    """A subclass, whose parts go their own ways."""
    call, _ = MORE[name]
    a = [x.detach().to(dtype) for x in tensors()]
    b = [x.flip(1) for x in a]
    both = [TwoTensor(x, y).requires_grad_() for x, y in zip(a, b, strict=True)]
    o = call(*both)
    d_o = TwoTensor(*(randn(*o.shape, seed=seed).to(o.dtype) for seed in (7, 8)))
    made = torch.autograd.grad(o, both, d_o, allow_unused=True)
    for part in ("a", "b"):
        given = [getattr(x, part).detach().requires_grad_() for x in both]
        want = torch.autograd.grad(call(*given), given, getattr(d_o, part), allow_unused=True)
        assert_all_same([None if x is None else getattr(x, part) for x in made], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MORE)
def test_cotangents_in_a_batch(name, dtype):
    call, _ = MORE[name]
    given = [x.detach().to(dtype).requires_grad_() for x in tensors()]
    o = call(*given)
    d_o = randn(3, *o.shape, seed=7).to(o.dtype)
    made = torch.autograd.grad(
        o, given, d_o, allow_unused=True, is_grads_batched=True, retain_graph=True
    )
    rows = [torch.autograd.grad(o, given, x, allow_unused=True, retain_graph=True) for x in d_o]
    want = [None if x[0] is None else torch.stack(x) for x in zip(*rows, strict=True)]
    assert_all_same(made, want)


def test_calls_of_zeros_without_memory_come_again():
    k = randn(1, 6, 2, 4, seed=1)
    q = torch._efficientzerotensor(k.shape, dtype=k.dtype)
    want = hw.attention_lse(torch.zeros_like(k), k)
    for _ in range(4):
        assert_same_bits(hw.attention_lse(q, k), want)
