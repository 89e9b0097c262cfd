# SPDX-License-Identifier: Apache-2.0
"""What a user would run instead: the peers of each operator, each as q, k, v -> o.

Our own torch code in its plainest fast form and in the strongest form we could find (both eager
and compiled), fla's functions where that package is installed, and torch's softmax attention,
which computes something else but is the user's alternative. All take [B, S, H, D].
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

CHUNK = 64  # the best of 64, 128 and 256 on the machines tried
SEGMENT = 512  # tokens whose features are alive at once: they stay in cache


def symmetric_features(x: Tensor) -> Tensor:
    """1, x_a, then x_a x_b for a <= b: [..., D] -> [..., 1 + D + D(D+1)/2].

    Slices and one concatenation: a third faster than indexing with two index tensors.
    """
    d = x.shape[-1]
    products = [x[..., a : a + 1] * x[..., a:] for a in range(d)]
    return torch.cat([torch.ones_like(x[..., :1]), x, *products], dim=-1)


def _coefficients(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    scale = d**-0.5
    a, b = torch.triu_indices(d, d)
    quadratic = torch.where(a == b, 0.5 * scale**2, scale**2)
    c = torch.cat([torch.ones(1), torch.full((d,), scale), quadratic])
    return c.to(device, dtype)


def _segment(q: Tensor, k: Tensor, v: Tensor, state: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks q, k, v [BH, n, C, *] (v with a column of ones) after `state` [BH, F, Dv + 1]."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    w = (1 + s + 0.5 * s * s).tril()
    sums = (symmetric_features(k).transpose(-1, -2) @ v).to(state.dtype).cumsum(1)
    before = torch.cat([state[:, None], state[:, None] + sums[:, :-1]], dim=1).to(v.dtype)
    o = torch.baddbmm(
        (w @ v).flatten(0, 1), (symmetric_features(q) * c).flatten(0, 1), before.flatten(0, 1)
    )
    o = o.view(v.shape)
    return o[..., :-1] / o[..., -1:], state + sums[:, -1]


def chunked(
    q: Tensor, k: Tensor, v: Tensor, *, segment: int | None = None, step: Callable = _segment
) -> Tensor:
    """Chunked causal taylor2 attention by batched matrix products.

    Without `segment` all chunks of the sequence go through each operation at once, the form that
    torch code usually takes; with it, a loop carries the state from segment to segment.
    """
    batch, tokens, heads, _ = q.shape
    padded = math.ceil(tokens / CHUNK) * CHUNK
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if padded != tokens:  # keys of zeros behind the last row disturb no row before them
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padded - tokens)) for x in (q, k, v))
    q, k, v = (
        x.transpose(1, 2).reshape(batch * heads, padded // CHUNK, CHUNK, -1) for x in (q, k, v)
    )
    c = _coefficients(q.shape[-1], q.dtype, q.device)
    accumulator = torch.float64 if v.dtype == torch.float64 else torch.float32
    state = torch.zeros(batch * heads, c.shape[0], v.shape[-1], dtype=accumulator, device=v.device)
    chunks = (segment or padded) // CHUNK
    parts = []
    for start in range(0, padded // CHUNK, chunks):
        part = slice(start, start + chunks)
        o, state = step(q[:, part], k[:, part], v[:, part], state, c)
        parts.append(o)
    o = torch.cat(parts, dim=1).view(batch, heads, padded, -1)
    return o[:, :, :tokens].transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, grouped: bool = False) -> Tensor:
    """Softmax attention of torch, on the same layout."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    more = {"enable_gqa": True} if grouped else {}
    return scaled_dot_product_attention(q, k, v, is_causal=causal, **more).transpose(1, 2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention as the formula says, by the whole map."""
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(hidden, -math.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)


def reference_peers(*, causal: bool) -> dict[str, Attention]:
    """Softmax attention written in torch: eager and compiled."""
    eager = functools.partial(eager_attention, causal=causal)
    return {"eager": eager, "compiled": compile_late(eager)}


def compile_late(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at the first call: to load the compiler takes seconds."""
    compiled: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, dynamic=False))
        return compiled[0](*arguments)

    return call


def forget_compiled() -> None:
    """Drops what was compiled, so that a case is not answered by code for another's shapes."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def linear_attention_peers(device: str, *, compiled: bool = True) -> dict[str, Attention]:
    """Causal taylor2 linear attention: name -> function of q, k, v."""
    peers: dict[str, Attention] = {
        "eager": chunked,
        "eager, segments": functools.partial(chunked, segment=SEGMENT),
    }
    if compiled:
        peers["compiled"] = compile_late(chunked)
        step = compile_late(_segment)
        peers["compiled, segments"] = functools.partial(chunked, segment=SEGMENT, step=step)
    peers.update(_fla_cuda() if device == "cuda" else _fla_naive())
    return peers


def sdpa_peers(device: str) -> dict[str, Attention]:
    """Causal softmax attention by torch: the default choice; on a GPU each fused backend."""
    peers = softmax_peers(device, causal=True)
    if device == "cuda":
        del peers["sdpa"]
    return peers


def softmax_peers(device: str, *, causal: bool, grouped: bool = False) -> dict[str, Attention]:
    """Softmax attention by torch: the default choice, and on a GPU each fused backend by name.

    `grouped`: there are fewer heads of keys than of queries."""
    default = functools.partial(sdpa, causal=causal, grouped=grouped)
    if device != "cuda":
        return {"sdpa": default}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend: SDPBackend) -> Attention:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return default(q, k, v)

        return call

    return {
        "sdpa": default,
        "sdpa flash": through(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": through(SDPBackend.CUDNN_ATTENTION),
    }


def sdpa_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Padded sequences: mask [B, 1, 1, Sk] is true where a key is there."""
    o = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return o.transpose(1, 2)


def flex_peers(bias: Tensor) -> dict[str, Attention]:
    """torch's flex_attention, compiled: plain, and with bias [Sq, Sk] added to the scores."""
    from torch.nn.attention.flex_attention import flex_attention

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[i, j]

        turned = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(*turned, score_mod=add).transpose(1, 2)

    return {"flex": compile_late(plain), "flex, bias": compile_late(biased)}


def flex(tokens: int, device: str, *, causal: bool) -> Attention:
    """flex_attention, compiled; the causal mask is a block mask, which skips what is hidden."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def earlier(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mask = create_block_mask(earlier, None, None, tokens, tokens, device) if causal else None

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(*turned, block_mask=mask).transpose(1, 2)

    return compile_late(call)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """The whole map, [B, H, Sq, Sk]."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return scores.softmax(-1)


def eager_column_sums(q: Tensor, k: Tensor) -> Tensor:
    """Column sums of the map, which is made: [B, H, Sk]."""
    return _weights(q, k).sum(2)


def eager_transpose(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """P^T x by the whole map."""
    return torch.einsum("bhij,bihd->bjhd", _weights(q, k), x)


def step_eager(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor) -> Tensor:
    """One decode token, q and k [B, H, D], v [B, H, Dv], state kv [B, H, F, Dv], z [B, H, F]."""
    features = symmetric_features(k).to(kv.dtype)
    kv.addcmul_(features[..., None], v[..., None, :].to(kv.dtype))
    z.add_(features)
    weights = symmetric_features(q).to(kv.dtype) * _coefficients(q.shape[-1], kv.dtype, q.device)
    o = (weights[..., None, :] @ kv)[..., 0, :]
    return (o / (weights * z).sum(-1, keepdim=True)).to(v.dtype)


def key_scan_eager(s: Tensor, v: Tensor) -> Tensor:
    """Key-only softmax scan by two cumulative sums: s [B, S, H], v [B, S, H, Dv]."""
    e = (s - s.amax(1, keepdim=True)).exp()[..., None]
    return (e * v).cumsum(1) / e.cumsum(1)


def key_scan_stable(s: Tensor, v: Tensor) -> Tensor:
    """The same without underflow: doubling steps on pairs (log-sum, mean)."""
    mean, lse, shift = v, s[..., None], 1
    tokens = s.shape[1]
    while shift < tokens:
        before = torch.nn.functional.pad(lse, (0, 0, 0, 0, shift, 0), value=-math.inf)[:, :tokens]
        earlier = torch.nn.functional.pad(mean, (0, 0, 0, 0, shift, 0))[:, :tokens]
        total = torch.logaddexp(lse, before)
        mean = (lse - total).exp() * mean + (before - total).exp() * earlier
        lse, shift = total, 2 * shift
    return mean


def key_scan_peers(*, compiled: bool = True) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Key-only softmax scan: name -> function of s, v."""
    peers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "eager": key_scan_eager,
        "eager, stable": key_scan_stable,
    }
    if compiled:
        peers["compiled"] = compile_late(key_scan_eager)
    return peers


def _fla_naive() -> dict[str, Attention]:
    """fla's reference functions, read from their file: importing the package needs triton."""
    spec = importlib.util.find_spec("fla")
    roots = list(spec.submodule_search_locations or []) if spec else []
    path = next((f for r in roots if (f := Path(r, "ops/based/naive.py")).is_file()), None)
    if path is None:
        return {}
    naive_spec = importlib.util.spec_from_file_location("fla_based_naive", path)
    if naive_spec is None or naive_spec.loader is None:
        return {}
    naive = importlib.util.module_from_spec(naive_spec)
    try:
        naive_spec.loader.exec_module(naive)
    except ImportError:  # einops is missing
        return {}
    return {
        "fla naive parallel": _fla_layout(naive.naive_parallel_based),
        "fla naive chunk": _fla_layout(naive.naive_chunk_based),
    }


def _fla_layout(function: Attention) -> Attention:
    """fla's naive functions take [B, H, S, D]."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return call


def _fla_cuda() -> dict[str, Attention]:
    """fla's Triton kernels; the general linear attention gets the features of taylor2."""
    try:
        from fla.ops.based import fused_chunk_based, parallel_based
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return {}

    def through_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = _coefficients(q.shape[-1], q.dtype, q.device)
        phi_q, phi_k = symmetric_features(q) * c, symmetric_features(k)
        return chunk_linear_attn(phi_q, phi_k, v, scale=1.0, normalize=True)[0]

    return {
        "fla fused_chunk_based": fused_chunk_based,
        "fla parallel_based": parallel_based,
        "fla chunk_linear_attn": through_features,
    }
