# SPDX-License-Identifier: Apache-2.0
"""A middle-sized call of every operator, and the process that times them for bench/compare.py.

Nothing here imports more of headworks than its public functions, so that the same cases run in
trees of other days. Results are CPU seconds of the process: other work on the machine takes wall
time away, but little of these.

    python -m bench.compare_cases      answers requests, a line of JSON each (serve)
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import headworks as hw

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD, BOTH = ("forward",), ("forward", "train")
Made = tuple[Callable[..., Any], tuple[Tensor, ...]]  # a function and what it is called with


class Draw(NamedTuple):
    """Random tensors in a dtype, the same in every process."""

    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *size: int) -> Tensor:
        """Normally distributed."""
        return torch.randn(size, generator=self.generator).to(self.dtype)


class Case(NamedTuple):
    """A call of an operator; `modes`: without gradient, or forward and backward together."""

    operator: str
    label: str
    make: Callable[[Draw], Made]
    modes: tuple[str, ...] = BOTH


def _qkv(draw: Draw, s: int = 1024, heads: int = 8, dim: int = 64) -> tuple[Tensor, ...]:
    return tuple(draw(1, s, heads, dim) for _ in range(3))


def _attention(**options: Any) -> Callable[[Draw], Made]:
    return lambda draw: (lambda q, k, v: hw.attention(q, k, v, **options), _qkv(draw))


def _biased(draw: Draw) -> Made:
    bias = draw(1, 8, 1024, 1024)
    return (lambda q, k, v, bias: hw.attention(q, k, v, bias=bias)), (*_qkv(draw), bias)


def _biased_keys(draw: Draw) -> Made:
    bias = draw(1, 8, 1024).to(torch.float32)
    return (lambda q, k, v, bias: hw.attention(q, k, v, key_bias=bias)), (*_qkv(draw), bias)


def _packed(draw: Draw) -> Made:
    lengths = [64 + (37 * i) % 449 for i in range(16)]
    cut = torch.tensor([0, *lengths]).cumsum(0)
    options: dict[str, Any] = {"cu_seqlens_q": cut, "cu_seqlens_k": cut}
    options |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    return (lambda q, k, v: hw.attention(q, k, v, **options)), _qkv(draw, sum(lengths))


def _decode(draw: Draw) -> Made:
    _, k, v = _qkv(draw, 8192)
    return hw.attention, (draw(1, 1, 8, 64), k, v)


def _replay(function: Callable[..., Any]) -> Callable[[Draw], Made]:
    """Of q and k, with their log-sum-exp given."""

    def make(draw: Draw) -> Made:
        q, k, _ = _qkv(draw)
        lse = hw.attention_lse(q, k)
        return (lambda q, k: function(q, k, lse=lse)), (q, k)

    return make


def _transpose(draw: Draw) -> Made:
    return hw.attention_transpose, _qkv(draw)


def _probs(draw: Draw) -> Made:
    rows = torch.arange(0, 1024, 8)[None]
    return _replay(lambda q, k, lse: hw.attention_probs(q, k, lse=lse, rows=rows))(draw)


def _merge(draw: Draw) -> Made:
    outs, sums = draw(4, 1, 1024, 8, 64), torch.randn(4, 1, 8, 1024, generator=draw.generator)
    return (lambda outs: hw.merge_attention(list(outs), list(sums))[0]), (outs,)


def _linear(**options: Any) -> Callable[[Draw], Made]:
    def make(draw: Draw) -> Made:
        q, k = (draw(1, 4096, 8, 16) for _ in range(2))
        function = hw.linear_attention
        return (lambda q, k, v: function(q, k, v, **options)), (q, k, draw(1, 4096, 8, 64))

    return make


def _linear_step(draw: Draw) -> Made:
    state = hw.LinearState(torch.zeros(16, 16, 153, 64), torch.zeros(16, 16, 153))
    q, k, v = draw(16, 16, 16), draw(16, 16, 16), draw(16, 16, 64)
    return (lambda q, k, v: hw.linear_attention_step(q, k, v, state)), (q, k, v)


def _key_scan(draw: Draw) -> Made:
    return hw.key_scan, (draw(1, 4096, 8), draw(1, 4096, 8, 64))


def _select_topk(draw: Draw) -> Made:
    return (lambda score: hw.select_topk(score, 512)), (draw(32, 8192),)


def _image(side: int, heads: int) -> Callable[[Draw], tuple[Tensor, ...]]:
    return lambda draw: tuple(draw(2, side, side, heads, 32) for _ in range(3))


def _bilevel_route(draw: Draw) -> Made:
    q, k, _ = _image(28, 4)(draw)
    return (lambda q, k: hw.bilevel_route(q, k, num_regions=(7, 7), topk=4)), (q, k)


def _bilevel(side: int, topk: int, heads: int, regions: int = 7) -> Callable[[Draw], Made]:
    def make(draw: Draw) -> Made:
        q, k, v = _image(side, heads)(draw)
        wanted: dict[str, Any] = {"num_regions": (regions, regions)}
        wanted["graph"] = hw.bilevel_route(q, k, topk=topk, **wanted)
        function = hw.bilevel_routing_attention
        return (lambda q, k, v: function(q, k, v, **wanted)), (q, k, v)

    return make


def _windows(draw: Draw) -> Made:
    q, k, v = (draw(16, 14, 14, 4, d) for d in (16, 16, 32))
    function = hw.window_attention
    return (lambda q, k, v, t: function(q, k, v, window=7, bias_table=t)), (q, k, v, draw(4, 49))


def _clusters(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = _qkv(draw, 4096)
    centroids = torch.nn.functional.normalize(draw(8, 16, 64).float(), dim=-1)
    return q, k, v, centroids.to(draw.dtype)


def _kmeans_route(draw: Draw) -> Made:
    q, _, _, centroids = _clusters(draw)
    return (lambda q: hw.kmeans_route(q, centroids, window=256)), (q,)


def _kmeans(draw: Draw) -> Made:
    q, k, v, centroids = _clusters(draw)
    index = hw.kmeans_route(q, centroids, window=256)
    function = hw.kmeans_routing_attention
    return (lambda q, k, v: function(q, k, v, q_index=index, is_causal=True)), (q, k, v)


def _kmeans_update(draw: Draw) -> Made:
    q, _, _, centroids = _clusters(draw)
    return (lambda q: hw.kmeans_update(centroids, q)), (q,)


def _moh(draw: Draw) -> Made:
    q, k, v = _qkv(draw, 512, heads=32)
    best = draw(1, 512, 32).float().softmax(-1).topk(16, dim=-1)
    gate = torch.zeros(1, 512, 32).scatter(-1, best.indices, best.values).to(draw.dtype)
    return (lambda q, k, v, g: hw.moh_attention(q, k, v, g, is_causal=True)), (q, k, v, gate)


def _na2d_av(draw: Draw) -> Made:
    w, v = draw(2, 28, 28, 8, 49), draw(2, 28, 28, 8, 32)
    return (lambda w, v: hw.na2d_av(w, v, kernel_size=7)), (w, v)


def _contmix(draw: Draw) -> Made:
    given = draw(2, 28, 28, 8, 49), draw(194, 49), draw(194), draw(2, 28, 28, 16, 16)
    sizes = {"kernel_size": 13, "small_kernel_size": 5}
    return (lambda a, w, b, v: hw.contmix(a, w, b, v, **sizes)), given


def _cascade(draw: Draw) -> Made:
    """Stage 1 of EfficientViT M0."""
    layer = hw.nn.CascadedGroupAttention(64, 16, 4, resolution=7)
    weights = layer.eval().folded().to(draw.dtype)
    return (lambda x: hw.cascaded_group_attention(x, weights, window=7)), (draw(16, 14, 14, 64),)


CASES = (
    Case("linear_attention", "causal", _linear()),
    Case("linear_attention", "full", _linear(is_causal=False)),
    Case("linear_attention_step", "16 sequences", _linear_step, FORWARD),
    Case("attention", "full", _attention()),
    Case("attention", "causal", _attention(is_causal=True)),
    Case("attention", "window 128", _attention(is_causal=True, window_size=(128, 0))),
    Case("attention", "bias per head", _biased),
    Case("attention", "key bias", _biased_keys),
    Case("attention", "packed", _packed),
    Case("attention", "decode", _decode, FORWARD),
    Case("attention_lse", "full", lambda draw: (hw.attention_lse, _qkv(draw)[:2])),
    Case("attention_transpose", "full", _transpose),
    Case("column_stats", "sums", _replay(hw.column_stats)),
    Case("attention_probs", "128 rows", _probs, FORWARD),
    Case("merge_attention", "four parts", _merge),
    Case("key_scan", "4096 tokens", _key_scan),
    Case("select_topk", "512 of 8192", _select_topk, FORWARD),
    Case("bilevel_route", "28 x 28", _bilevel_route, FORWARD),
    Case("cascaded_group_attention", "M0 stage 1", _cascade, FORWARD),
    Case("bilevel_routing_attention", "56 x 56, topk 1", _bilevel(56, 1, 2)),
    Case("bilevel_routing_attention", "28 x 28, topk 4", _bilevel(28, 4, 4)),
    Case("bilevel_routing_attention", "14 x 14, topk 16", _bilevel(14, 16, 8)),
    Case("kmeans_route", "16 clusters", _kmeans_route, FORWARD),
    Case("kmeans_routing_attention", "16 clusters, causal", _kmeans),
    Case("kmeans_update", "16 clusters", _kmeans_update, FORWARD),
    Case("moh_attention", "half of 32 heads, causal", _moh),
    Case("window_attention", "14 x 14, window 7", _windows),
    Case("na2d_av", "28 x 28, K 7", _na2d_av),
    Case("contmix", "28 x 28, K 13", _contmix),
)


def named_calls() -> dict[str, tuple[Case, str, torch.dtype]]:
    """Every call by its name: operator, label, mode, dtype."""
    return {
        f"{case.operator}: {case.label}, {mode} {short}": (case, mode, dtype)
        for case in CASES
        for mode in case.modes
        for short, dtype in DTYPES.items()
    }


def call_of(case: Case, mode: str, dtype: torch.dtype) -> Callable[[], Any]:
    """The call, with its inputs made."""
    function, given = case.make(Draw(dtype, torch.Generator().manual_seed(0)))
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*given)

        return forward
    wanted = [x.requires_grad_() for x in given]
    cotangent = torch.ones_like(function(*wanted))
    return lambda: torch.autograd.grad(function(*wanted), wanted, cotangent)


def seconds_of(call: Callable[[], Any], count: int) -> float:
    """CPU seconds a call, all threads of the process together."""
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def _answers(calls: dict[str, Callable[[], Any]], request: dict[str, Any]) -> Any:
    """`start`: makes the call of that name. `time`: its seconds, as the mean of so many."""
    if "start" in request:
        calls.clear()
        calls["now"] = call_of(*named_calls()[request["start"]])
        calls["now"]()
        return None
    return seconds_of(calls["now"], int(request["time"]))


def serve(lines: Iterator[str], threads: int) -> Iterator[str]:
    """Lines of JSON, {"ok": ..} or {"error": ..}: first where headworks was found and the names of
    all calls, then an answer to each line that comes."""
    torch.set_num_threads(threads)
    yield json.dumps({"ok": [os.fspath(hw.__file__), [*named_calls()]]})
    calls: dict[str, Callable[[], Any]] = {}
    for line in lines:
        try:
            yield json.dumps({"ok": _answers(calls, json.loads(line))})
        except Exception as error:
            yield json.dumps({"error": f"{type(error).__name__}: {error}"[:400]})


if __name__ == "__main__":
    for answer in serve(iter(sys.stdin.readline, ""), int(sys.argv[1])):
        print(answer, flush=True)
