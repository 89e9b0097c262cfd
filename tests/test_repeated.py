# SPDX-License-Identifier: Apache-2.0
"""Calls that come again: they give what the first gave, and refuse what the first would."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import torch

import headworks as hw
from headworks import _library
from headworks._repeated import Repeated
from headworks.testing import assert_same_bits
from identities import randn


def images():
    return tuple(randn(1, 9, 10, 2, 4, seed=seed) for seed in range(3))


@pytest.fixture
def none_ready(monkeypatch):
    """As if nothing had been called; returns how many calls are ready."""
    repeated = Repeated("bilevel_routing_attention")
    monkeypatch.setattr("headworks.ops.routing.bilevel_routing._repeated", repeated)
    return lambda: sum(call is not None for call in repeated._calls.values())


@pytest.mark.parametrize("graph", ["chosen by the call", "given", "given per head"])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("options", [{}, {"mask_padding": False, "scale": 0.3, "topk": 2}])
def test_a_call_that_comes_again(graph, strided, options, none_ready):
    for seed in range(3):
        q, k, v = (randn(2, 9, 10, 4, 8, seed=seed + 5 * i)[:, :, :, ::2] for i in range(3))
        if not strided:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        regions = {"num_regions": (3, 2)}
        if graph != "chosen by the call":
            shape = {"topk": options.get("topk", 4), "per_head": graph == "given per head"}
            options = {**options, "graph": hw.bilevel_route(q, k, **shape, **regions)}
        arguments = {**regions, **options}
        made = hw.bilevel_routing_attention(q, k, v, backend="cpu", **arguments)
        assert made.shape == v.shape and made.is_contiguous()
        torch.testing.assert_close(
            made,
            hw.bilevel_routing_attention(q, k, v, backend="reference", **arguments),
            rtol=1e-12,
            atol=1e-12,
        )
    assert none_ready() == 1


def test_a_call_that_comes_again_with_other_strides(none_ready):
    q, k, v = images()
    layouts = {
        "as they come": lambda x: x,
        "of fewer heads": lambda x: torch.stack((x, x), 4).flatten(3, 4)[:, :, :, ::2],
        "of a wider image": lambda x: torch.cat((x, x), 2)[:, :, :10],  # no view as a sequence
        "heads first": lambda x: x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4),
    }
    want = hw.bilevel_routing_attention(q, k, v, num_regions=(3, 2), topk=2, backend="reference")
    for _ in range(2):
        for name, layout in layouts.items():
            given = (layout(x) for x in (q, k, v))
            made = hw.bilevel_routing_attention(*given, num_regions=(3, 2), topk=2, backend="cpu")
            torch.testing.assert_close(made, want, msg=f"{name}: not the same")
    assert none_ready() == 3


def test_a_call_that_comes_again_has_its_graph_checked(none_ready):
    q, k, v = images()
    graph = hw.bilevel_route(q, k, num_regions=(3, 2), topk=2)
    for _ in range(2):
        hw.bilevel_routing_attention(q, k, v, num_regions=(3, 2), graph=graph)
        for wrong in (-1, 6):
            other = graph.clone()
            other[0, 3, 1] = wrong
            with pytest.raises(ValueError, match="graph"):
                hw.bilevel_routing_attention(q, k, v, num_regions=(3, 2), graph=other)
    assert none_ready() == 1


def test_a_call_that_comes_again_with_gradient(none_ready):
    q, k, v = images()
    plain = hw.bilevel_routing_attention(q, k, v, num_regions=(3, 2), topk=2)
    learnt = hw.bilevel_routing_attention(
        q, k, v.clone().requires_grad_(), num_regions=(3, 2), topk=2
    )
    assert learnt.requires_grad and not plain.requires_grad
    assert_same_bits(learnt.detach(), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
        hw.bilevel_routing_attention(q, k, v, num_regions=(3, 2), topk=2)
        hw.bilevel_routing_attention(q, k, v, num_regions=(3, 2), topk=2)
        half = hw.bilevel_routing_attention(q, k, v, num_regions=(3, 2), topk=2)
    assert half.dtype == torch.bfloat16 and none_ready() == 0


@pytest.mark.parametrize(
    "wrong",
    [{"mask_padding": 1}, {"num_regions": (3.0, 2)}, {"topk": True}, {"scale": "1"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_call_that_comes_again_knows_equal_options_apart(wrong, none_ready):
    q, k, v = images()
    right = {"num_regions": (3, 2), "topk": 1, "mask_padding": True, "scale": 1.0}
    for _ in range(2):
        hw.bilevel_routing_attention(q, k, v, **right)
        with pytest.raises(TypeError):
            hw.bilevel_routing_attention(q, k, v, **{**right, **wrong})
    assert none_ready() == 1


def ready_calls(monkeypatch, module, op, name="_repeated"):
    """As if nothing had been called; the calls that are ready, to be looked at."""
    repeated = Repeated(op)
    monkeypatch.setattr(import_module(f"headworks.ops.{module}"), name, repeated)
    return repeated._calls


def test_a_step_that_comes_again(monkeypatch):
    """The state is written to, and autograd told, whichever way a call takes."""
    ready = ready_calls(monkeypatch, "linear.linear_attention_step", "linear_attention_step")
    states = [hw.LinearState.initial(2, 3, 8, 16, dtype=torch.float64) for _ in range(2)]
    for token in range(4):
        q, k = (randn(2, 3, 8, seed=token + 10 * i) for i in range(2))
        v = randn(2, 3, 16, seed=token + 20)
        made = hw.linear_attention_step(q, k, v, states[0], scale=0.5)
        want = hw.linear_attention_step(q, k, v, states[1], scale=0.5, backend="reference")
        for x, y in ((made, want), *zip(*states, strict=True)):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        assert [x._version for x in states[0]] == [token + 1] * 2
        assert len(ready) == (token > 0)
    with pytest.raises(RuntimeError, match="requires grad"):
        hw.linear_attention_step(q.requires_grad_(), k, v, states[0], scale=0.5)
    with pytest.raises(ValueError, match="memory of its own"):
        spread = hw.LinearState(*(x[:1].expand_as(x) for x in states[0]))
        hw.linear_attention_step(q.detach(), k, v, spread, scale=0.5)


def test_row_statistics_that_come_again(monkeypatch):
    ready = ready_calls(monkeypatch, "attention.attention_lse", "attention_lse")
    for seed in range(3):
        q, k = randn(2, 7, 4, 8, seed=seed), randn(2, 9, 2, 8, seed=seed + 5)
        for options in ({}, {"window_size": (2, 1)}, {"is_causal": True, "activation": "softmax1"}):
            made = hw.attention_lse(q, k, **options)
            want = hw.attention_lse(q, k, backend="reference", **options)
            torch.testing.assert_close(made, want, rtol=1e-12, atol=1e-12)
        with pytest.raises(TypeError):
            hw.attention_lse(q, k, is_causal=1)
        hw.attention_lse(q, k, key_bias=randn(1, 1, 9))  # a tensor more: never ready
    assert len(ready) == 3


@pytest.mark.parametrize("gate_dtype", [torch.float64, torch.float32])
def test_a_mixture_that_comes_again(gate_dtype, monkeypatch):
    """Which rows a gate chooses is seen anew in each call; a gate that is cast has no short way."""
    ready = ready_calls(monkeypatch, "routing.moh_attention", "moh_attention")
    for seed in range(4):
        q = randn(2, 9, 4, 8, seed=seed)
        k, v = (randn(2, 9, 2, 8, seed=seed + 5 * i) for i in (1, 2))
        gate = randn(2, 9, 4, seed=seed + 20).clamp(min=0).to(gate_dtype)
        for options in ({}, {"is_causal": True, "scale": 0.3}):
            made = hw.moh_attention(q, k, v, gate, **options)
            want = hw.moh_attention(q, k, v, gate, backend="reference", **options)
            torch.testing.assert_close(made, want, rtol=1e-12, atol=1e-12)
            assert made[gate == 0].count_nonzero() == 0
    assert [call is not None for call in ready.values()] == [gate_dtype == torch.float64] * 2


@pytest.mark.parametrize("table_dtype", [None, torch.float64, torch.float32])
def test_windows_that_come_again(table_dtype, monkeypatch):
    """A table that is cast has no short way."""
    ready = ready_calls(monkeypatch, "windows.window_attention", "window_attention")
    for seed in range(3):
        q = randn(2, 5, 7, 4, 8, seed=seed)
        k, v = (randn(2, 5, 7, 2, 8, seed=seed + 5 * i) for i in (1, 2))
        table = None if table_dtype is None else randn(4, 12, seed=seed + 20).to(table_dtype)
        for options in (
            {"window": (3, 4)},
            {"window": (3, 4), "scale": 0.3},
            {"window": (4, 3), "scale": 0.3},
        ):
            options["bias_table"] = table
            made = hw.window_attention(q, k, v, **options)
            want = hw.window_attention(q, k, v, backend="reference", **options)
            torch.testing.assert_close(made, want, rtol=1e-12, atol=1e-12)
    assert len(ready) == (0 if table_dtype is torch.float32 else 3) and None not in ready.values()


@pytest.mark.parametrize("keys_given", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.3, "mask_self": True}])
def test_clusters_that_come_again(keys_given, options, monkeypatch):
    """Lists are other ones in each call, and are looked at in each."""
    ready = ready_calls(monkeypatch, "routing.kmeans_routing", "kmeans_routing_attention")
    for seed in range(3):
        q = randn(2, 9, 4, 8, seed=seed)
        k, v = (randn(2, 9 + keys_given, 2, 8, seed=seed + 5 * i) for i in (1, 2))
        lists = {"q_index": torch.randint(-1, 9, (2, 4, 3, 5))}
        if keys_given:
            lists["k_index"] = torch.randint(-1, 10, (2, 4, 3, 7))
        made = hw.kmeans_routing_attention(q, k, v, **lists, **options)
        want = hw.kmeans_routing_attention(q, k, v, backend="reference", **lists, **options)
        torch.testing.assert_close(made, want, rtol=1e-12, atol=1e-12)
        for name, index in lists.items():
            for wrong in (-2, 10):
                spoilt = index.clone()
                spoilt[1, 2, 0, 3] = wrong
                with pytest.raises(ValueError, match=name):
                    hw.kmeans_routing_attention(q, k, v, **{**lists, name: spoilt}, **options)
    assert len(ready) == 1 and None not in ready.values()


def test_lists_for_fewer_keys_than_queries_that_come_again(monkeypatch):
    """A list that serves queries and keys is checked for both."""
    ready = ready_calls(monkeypatch, "routing.kmeans_routing", "kmeans_routing_attention")
    q, k, v = randn(1, 9, 2, 4), randn(1, 5, 2, 4, seed=1), randn(1, 5, 2, 4, seed=2)
    for _ in range(3):
        hw.kmeans_routing_attention(q, k, v, q_index=torch.randint(-1, 5, (1, 2, 3, 4)))
        with pytest.raises(ValueError, match="for k too"):
            hw.kmeans_routing_attention(q, k, v, q_index=torch.full((1, 2, 3, 4), 5))
    assert len(ready) == 1


def draw(*size, seed=0, dtype=torch.float64):
    return randn(*size, seed=seed).to(dtype)


def clusters(n, seed, dtype):
    return draw(1, n, 2, 8, seed=seed, dtype=dtype), draw(2, 3, 8, seed=9, dtype=dtype)


def image_pair(n, seed, dtype):
    return tuple(draw(1, n, 10, 2, 4, seed=seed + 5 * i, dtype=dtype) for i in range(2))


def sequences(n, seed, dtype):
    return tuple(draw(1, n, 2, 8, seed=seed + 5 * i, dtype=dtype) for i in range(3))


# By name: the function, the module and the name of its kept calls, tensors of n tokens, a seed and
# a dtype, options that it needs, and others.
ROUTES = {
    "select_topk": (
        hw.select_topk, "select_topk", "_repeated",
        lambda n, seed, dtype: (draw(3, 2, n, seed=seed, dtype=dtype),),
        {"k": 4}, ({"k": 3}, {"keep_order": False}),
    ),
    "kmeans_route": (
        hw.kmeans_route, "kmeans_routing", "_routes", clusters,
        {"window": 4}, ({"window": 3}, {"is_causal_prefix": True}),
    ),
    "kmeans_route, prefix": (
        hw.kmeans_route, "kmeans_routing", "_routes", clusters,
        {"window": 4, "is_causal_prefix": True}, ({"is_causal_prefix": False}, {"length": 30}),
    ),
    "bilevel_route": (
        hw.bilevel_route, "bilevel_routing", "_routes", image_pair,
        {"num_regions": (3, 2), "topk": 2},
        ({"topk": 3}, {"per_head": True}, {"kv_num_regions": (2, 2)}, {"num_regions": (2, 2)}),
    ),
}  # fmt: skip
ATTENTIONS = {
    "kmeans_routing_attention": (
        lambda q, k, v, **o: hw.kmeans_routing_attention(
            q, k, v, q_index=torch.arange(8).view(1, 1, 2, 4).expand(1, 2, 2, 4), **o
        ),
        "routing.kmeans_routing", sequences,
        ({"is_causal": True}, {"scale": 0.3}, {"mean_eps": 0.5}, {"mask_self": True}),
    ),
    "attention": (
        hw.attention, "attention.attention", sequences,
        ({"is_causal": True}, {"scale": 0.3}, {"softcap": 2.0}, {"window_size": (1, 1)}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTES)
def test_routes_that_come_again(name, monkeypatch):
    """What is kept is for calls of the same kind alone; a gradient that is wanted is none."""
    call, module, kept, tensors, needed, changes = ROUTES[name]
    ready = ready_calls(monkeypatch, f"routing.{module}", name.split(",")[0], kept)

    def compare(given, **options):
        options = {**needed, **options}
        made, want = (call(*given, backend=b, **options) for b in ("auto", "reference"))
        assert not made.requires_grad and made.is_contiguous()
        assert_same_bits(made, want)

    for seed in range(3):
        compare(tensors(12, seed, torch.float64))
    assert len(ready) == 1 and None not in ready.values()
    others = [tensors(n, 5, dtype) for n, dtype in ((13, torch.float64), (12, torch.float32))]
    others.append(tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in others[0]))
    for given in others[:2]:
        compare(given)
    for options in changes:
        compare(tensors(12, 5, torch.float64), **options)
    assert len(ready) == 1
    for _ in range(3):
        compare(others[2])
    assert len(ready) == 2
    learnt = [x.requires_grad_() for x in tensors(12, 7, torch.float64)]
    compare(learnt)
    compare([torch.nn.Parameter(x) for x in learnt])
    assert len(ready) == 2


@pytest.mark.parametrize("name", ROUTES)
def test_routes_that_come_again_under_autocast(name, monkeypatch):
    call, module, kept, tensors, needed, _ = ROUTES[name]
    ready = ready_calls(monkeypatch, f"routing.{module}", name.split(",")[0], kept)
    for _ in range(3):
        given = tensors(12, 3, torch.float32)
        call(*given, **needed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made, want = (call(*given, backend=b, **needed) for b in ("auto", "reference"))
        assert_same_bits(made, want)
    assert len(ready) == 1


@pytest.mark.parametrize("name", ATTENTIONS)
def test_what_a_kept_call_is_not_for(name, monkeypatch):
    """Other sizes, dtypes, strides and options, autocast, and gradients."""
    call, module, tensors, changes = ATTENTIONS[name]
    ready = ready_calls(monkeypatch, module, name)

    def compare(given, close=1e-12, **options):
        made, want = (call(*given, backend=b, **options) for b in ("auto", "reference"))
        assert made.dtype == want.dtype and made.requires_grad == want.requires_grad
        torch.testing.assert_close(made, want, rtol=close, atol=close)

    for seed in range(3):
        compare(tensors(12, seed, torch.float64))
    assert len(ready) == 1 and None not in ready.values()
    compare(tensors(13, 5, torch.float64))
    single = tensors(12, 5, torch.float32)
    compare(single, 1e-5)
    for options in changes:
        compare(tensors(12, 5, torch.float64), **options)
    compare([x.requires_grad_() for x in tensors(12, 6, torch.float64)])
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compare(single, 2e-2)
    assert len(ready) == 1
    with pytest.raises(TypeError):
        call(*tensors(12, 5, torch.float64), scale="1")
    with pytest.raises(TypeError):
        call(*tensors(12, 5, torch.float64), is_causal=0)


def test_calls_without_elements_have_no_short_way(monkeypatch):
    scores = ready_calls(monkeypatch, "routing.select_topk", "select_topk")
    routes = ready_calls(monkeypatch, "routing.kmeans_routing", "kmeans_route", "_routes")
    clustered = ready_calls(monkeypatch, "routing.kmeans_routing", "kmeans_routing_attention")
    q, narrow = randn(1, 4, 2, 8), randn(1, 4, 2, 0)
    index = torch.zeros(1, 2, 3, 2, dtype=torch.int64)
    for _ in range(3):
        assert hw.select_topk(torch.zeros(0, 3), 2).shape == (0, 2)
        assert hw.select_topk(torch.zeros(2, 3), 0).shape == (2, 0)
        assert hw.kmeans_route(q, randn(2, 0, 8), window=2).shape == (1, 2, 0, 2)
        assert hw.kmeans_route(q, randn(2, 3, 8), window=0).shape == (1, 2, 3, 0)
        assert_same_bits(hw.kmeans_route(narrow, randn(2, 3, 0), window=1), index[..., :1])
        assert hw.kmeans_routing_attention(q, q, narrow, q_index=index).shape == narrow.shape
        none = hw.kmeans_routing_attention(q, q, q, q_index=index[..., :0])
        assert_same_bits(none, torch.zeros_like(q))
    assert len(scores) == 2 and len(routes) == 3 and len(clustered) == 2
    assert not any((*scores.values(), *routes.values(), *clustered.values()))


@pytest.mark.parametrize(
    "op",
    [
        lambda q, k, v, **o: hw.attention(q, k, v, **o),
        lambda q, k, v, **o: hw.attention_lse(q, k, **o),
        lambda q, k, v, **o: hw.linear_attention(q, k, v, **o),
        lambda q, k, v, **o: hw.key_scan(q[..., 0], v, **o),
        lambda q, k, v, **o: hw.moh_attention(q, k, v, v[..., 0], **o),
        lambda q, k, v, **o: hw.bilevel_routing_attention(
            *(x[:, None] for x in (q, k, v)), num_regions=(1, 3), topk=2, **o
        ),
        lambda q, k, v, **o: hw.kmeans_routing_attention(
            q, k, v, q_index=torch.arange(6).expand(1, 2, 2, 6), **o
        ),
        lambda q, k, v, **o: hw.window_attention(*(x[:, None] for x in (q, k, v)), window=2, **o),
        lambda q, k, v, **o: hw.na2d_av(q[:, None, ..., :3], v[:, None], kernel_size=(1, 3), **o),
        lambda q, k, v, **o: hw.contmix(
            q[:, None, :, :1],
            k[0, :4, 0],
            None,
            v[:, None],
            kernel_size=(1, 3),
            small_kernel_size=1,
            **o,
        ),
    ],
    ids=[
        "attention",
        "attention_lse",
        "linear_attention",
        "key_scan",
        "moh",
        "bilevel",
        "kmeans",
        "window",
        "na2d_av",
        "contmix",
    ],
)
def test_calls_without_options_inside_transforms(op):
    """The reference composes with all of them; compiled backends say that they do not."""
    q, k, v = (randn(1, 6, 2, 4, seed=seed) for seed in range(3))
    plain = op(q, k, v, backend="reference")
    mapped = torch.func.vmap(lambda q: op(q, k, v, backend="reference"))(q[None])
    torch.testing.assert_close(mapped[0], plain, rtol=1e-12, atol=1e-12)
    gradient = torch.func.grad(lambda q: op(q, k, v, backend="reference").sum())(q)
    assert gradient.isfinite().all() and gradient.count_nonzero() > 0
    with pytest.raises(NotImplementedError, match="reference"):
        torch.func.vmap(lambda q: op(q, k, v))(q[None])


def test_few_functions_stand_between_a_call_and_native_code(monkeypatch):
    """docs/design.md counts them, these two and those of the libraries."""
    ready_calls(monkeypatch, "attention.attention", "attention")
    depths = []

    def count(*arguments):
        depths.append(len(inspect.stack()) - outside)

    monkeypatch.setattr(_library, "call", count)
    q, outside = randn(1, 4, 2, 8), len(inspect.stack()) + 1  # count itself
    for _ in range(3):
        hw.attention(q, q, q)
    assert depths == [2, 2, 2]


def test_only_so_many_calls_are_kept():
    repeated = Repeated("some_operator", most=2)
    x = torch.zeros(3)
    keys = [repeated.key((x,), n) for n in range(3)]
    for n, key in enumerate(keys):
        repeated.keep(key, lambda n=n: n)
        assert repeated.get(key)() == n
    assert [repeated.get(key) is not None for key in keys] == [False, False, True]
    assert [repeated.comes_again(keys[0]) for _ in range(2)] == [False, True]
    assert repeated.key((x.requires_grad_(),), 1) is None
    assert repeated.get(None) is None
