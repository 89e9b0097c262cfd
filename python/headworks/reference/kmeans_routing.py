# SPDX-License-Identifier: Apache-2.0
"""Routing by online k-means (Routing Transformer, arXiv 2003.05997) in plain PyTorch.

    d_tc = <x_t, mu_c>                     similarity of token t to the centroid of cluster c
    I_c  = the W tokens of largest d_tc    W in every cluster; a token is in any number of them
    o_i  = (1 / (n_i + eps)) sum_{c: i in I_c} sum_{j in I_c} softmax_j(s_ij) v_j
    s_ij = scale <q_i, k_j>

n_i counts the slots that hold token i; where n_i = 0, o_i = 0. A slot of -1 is empty. Row i has the
position i + Sk - Sq among the keys: keys after it are hidden if causal, and the key at it is the
token itself, whose score mask_self replaces by SELF_SCORE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import _per_query_head
from .select_topk import ranked, select_topk

# Finite: a row that sees no other key attends to itself. exp(SELF_SCORE - L) is 0 beside any other.
SELF_SCORE = -5e4


def similarity(x: Tensor, centroids: Tensor) -> Tensor:
    """d [B, H, K, S] of x [B, S, H, D] and centroids [H, K, D]. No gradient."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.einsum("bthd,hcd->bhct", x.detach().to(dtype), centroids.detach().to(dtype))


def kmeans_route(
    x: Tensor,  # [B, S, H, D]
    centroids: Tensor,  # [H, K, D]
    *,
    window: int,
    is_causal_prefix: bool = False,
    length: int | None = None,
) -> Tensor:
    """The members of every cluster by position, int64 [B, H, K, W].

    With is_causal_prefix a token joins when it comes, and stays: it joins if it is among the first
    ceil((t + 1) W / length) of tokens 0 .. t by (-d, position), while there are fewer than W.
    """
    d = similarity(x, centroids)
    if not is_causal_prefix:
        return select_topk(d, window)
    place = ranked(d).argsort(-1)  # [B, H, K, S]
    outranked = (place[..., None, :] < place[..., :, None]).tril().sum(-1)  # by earlier tokens
    t = torch.arange(d.shape[-1], device=d.device)
    length = d.shape[-1] if length is None else length
    quota = -(-(t + 1) * window // max(length, 1))
    joins = outranked < quota
    slot = joins.cumsum(-1) - 1
    slot = torch.where(joins & (slot < window), slot, window)
    index = torch.full((*d.shape[:3], window + 1), -1, device=d.device)
    return index.scatter(3, slot, t.expand_as(slot))[..., :window]


def kmeans_routing_attention(
    q: Tensor,  # [B, Sq, Hq, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, Dv]
    *,
    q_index: Tensor,  # [B, Hq, K, Wq]
    k_index: Tensor | None = None,  # [B, Hq, K, Wk]
    is_causal: bool = False,
    scale: float | None = None,
    mean_eps: float = 0.0,
    mask_self: bool = False,
) -> Tensor:
    """The output [B, Sq, Hq, Dv]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k_index = q_index if k_index is None else k_index
    rows, keys = q.shape[1], k.shape[1]
    q_slots = _gathered(q, q_index)  # [B, Hq, K, Wq, D]
    k_slots, v_slots = (_gathered(_per_query_head(x, q), k_index) for x in (k, v))

    s = torch.einsum("bhcid,bhcjd->bhcij", q_slots.to(dtype), k_slots.to(dtype))
    s = s * (q.shape[-1] ** -0.5 if scale is None else scale)
    position, key = (q_index + keys - rows)[..., :, None], k_index[..., None, :]
    if mask_self:
        s = torch.where(position == key, SELF_SCORE, s)
    seen = _held(q_index, rows)[..., :, None] & _held(k_index, keys)[..., None, :]
    if is_causal:
        seen = seen & (key <= position)
    p = _softmax(torch.where(seen, s, -torch.inf))
    o_slots = torch.einsum("bhcij,bhcje->bhcie", p.to(v.dtype), v_slots).to(dtype)
    return _scatter_mean(o_slots, q_index, rows, mean_eps).to(v.dtype)


def cluster_sums(x: Tensor, centroids: Tensor, index: Tensor | None) -> Tensor:
    """Of every cluster the sum of its members and their number, [H, K, D + 1].

    Members are those of index [B, H, K, W]; without it every token belongs to the cluster of the
    largest similarity, the first of them where several are equal. A token that is not finite
    belongs to none.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.detach().to(dtype)
    is_finite = x.isfinite().all(-1, keepdim=True)
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)  # [B, S, H, D + 1]
    x = torch.where(is_finite, x, 0.0)
    if index is not None:
        return _gathered(x, index).sum((0, 3))
    nearest = select_topk(similarity(x[..., :-1], centroids).transpose(-1, -2), 1)  # [B, H, S, 1]
    member = nearest == torch.arange(centroids.shape[1], device=x.device)  # [B, H, S, K]
    return torch.einsum("bhtc,bthd->hcd", member.to(dtype), x)


def kmeans_update(centroids: Tensor, sums: Tensor, decay: float) -> Tensor:
    """mu <- decay mu + (1 - decay) m / |m|, m the mean of a cluster; empty clusters stay, and those
    whose sum has no finite length."""
    total, count = sums[..., :-1], sums[..., -1:]
    mu = centroids.detach().to(sums.dtype)
    moved = decay * mu + (1 - decay) * torch.nn.functional.normalize(total, dim=-1)
    moves = (count > 0) & total.norm(dim=-1, keepdim=True).isfinite()
    return torch.where(moves, moved, mu).to(centroids.dtype)


def _softmax(s: Tensor) -> Tensor:
    """Over the last dimension; 0 where every score is -inf."""
    empty = (s == -torch.inf).all(-1, keepdim=True)
    return torch.where(empty, 0, torch.where(empty, 0, s).softmax(-1))


def _held(index: Tensor, tokens: int) -> Tensor:
    """Whether a slot holds a token."""
    return (index >= 0) & (index < tokens)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, H, D] at index [B, H, K, W]: [B, H, K, W, D]; 0 in empty slots."""
    held = _held(index, x.shape[1])
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).transpose(1, 2)  # a row of zeros at the end
    index = torch.where(held, index, x.shape[2] - 1).flatten(2)[..., None]
    taken = x.gather(2, index.expand(-1, -1, -1, x.shape[3]))
    return taken.reshape(*held.shape, x.shape[3])


def _scatter_mean(o: Tensor, index: Tensor, tokens: int, eps: float) -> Tensor:
    """[B, S, H, Dv]: the sum of a token's slots o [B, H, K, W, Dv] over their number plus eps."""
    held = _held(index, tokens)
    index = torch.where(held, index, tokens).flatten(2)  # empty slots go to a row that is cut off
    count = o.new_zeros(*index.shape[:2], tokens + 1)
    count = count.scatter_add(2, index, torch.ones_like(index, dtype=o.dtype))
    total = o.new_zeros(*index.shape[:2], tokens + 1, o.shape[-1])
    total = total.scatter_add(2, index[..., None].expand(-1, -1, -1, o.shape[-1]), o.flatten(2, 3))
    n = torch.where(count == 0, 1, count + eps)[..., None]
    return (total / n)[:, :, :tokens].transpose(1, 2)
