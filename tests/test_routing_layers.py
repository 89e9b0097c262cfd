# SPDX-License-Identifier: Apache-2.0
"""hw.nn.KMeansRoutingAttention: parts, recurrence, centroids, the published conventions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import headworks as hw
from headworks import nn
from headworks.nn.kmeans_routing import Members
from headworks.testing import assert_same_bits, compare
from identities import randn
from routing_checks import routing_transformer

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
WIDTH, TOKENS = 32, 40

NAMES = {
    "centroids": (2, 5, 8), "initialized": (), "local_qkv.weight": (48, 32),
    "to_q.weight": (16, 32), "to_v.weight": (16, 32), "out_proj.weight": (32, 32),
}  # fmt: skip
LAYERS = {
    "shared": {},
    "apart": {"shared_qk": False, "rotary_dim": 4},
    "google": {"norm": "layer", "mean_eps": 1e-2},
    "google_apart": {"norm": "layer", "shared_qk": False},
    "routing_alone": {"local_heads": 0, "rotary_dim": 8, "bias": True},
    "long": {"length": 60, "local_window": 3},
}


def layer(**options):
    made = nn.KMeansRoutingAttention(
        WIDTH, 4, **{"local_heads": 2, "num_clusters": 5, "window": 8, "local_window": 6,
                     "backend": "reference", "dtype": F64, **options},
    ).double().eval()  # fmt: skip
    with torch.no_grad():  # weights of size 1 / sqrt(width) say little about the scores
        for p in made.parameters():
            p.mul_(2)
    return made


@pytest.fixture(params=LAYERS)
def options(request):
    return LAYERS[request.param]


@pytest.mark.no_comparison
def test_names():
    assert {n: tuple(x.shape) for n, x in layer().state_dict().items()} == NAMES
    assert "to_k.weight" in layer(shared_qk=False).state_dict()


def test_steps_equal_the_parallel_form(options):
    made, x = layer(is_causal_prefix=True, **options), randn(2, TOKENS, WIDTH)
    state = made.init_state(2)
    stepped = torch.stack([made.step(x[:, t], state) for t in range(TOKENS)], dim=1)
    with torch.no_grad():
        whole, after = made(x, return_state=True)
    compare(stepped, whole, F64)
    assert state.position == TOKENS
    for a, b in zip(state.tensors(), after.tensors(), strict=True):
        compare(a, b, F64)


@pytest.mark.parametrize("cut", (0, 1, 17))
def test_steps_after_the_parallel_form(options, cut):
    made, x = layer(is_causal_prefix=True, **options), randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        whole = made(x)
        _, state = made(x[:, :cut], return_state=True)
    for t in range(cut, min(cut + 4, TOKENS)):
        compare(made.step(x[:, t], state), whole[:, t], F64)


@pytest.mark.no_comparison
@pytest.mark.parametrize("prefix", (True, False))
def test_later_tokens(options, prefix):
    """With prefix routing nothing later matters; without it the membership does."""
    made, x = layer(is_causal_prefix=prefix, **options), randn(1, TOKENS, WIDTH)
    other = torch.cat([x[:, :30], -3 * x[:, 30:]], 1)
    with torch.no_grad():
        same = torch.allclose(made(x)[:, :30], made(other)[:, :30], rtol=0, atol=1e-12)
    assert same == prefix


@pytest.mark.parametrize(("window", "length"), [(6, 30), (10, 45), (30, 30)])
def test_one_by_one_as_all_at_once(window, length):
    """Members decided one at a time, with many ties, are those of hw.kmeans_route."""
    x, mu = randn(2, 30, 1, 3).round().clamp(-1, 1), randn(1, 4, 3, seed=1).round()
    d = torch.einsum("bthd,hcd->bhct", x, mu)
    none = torch.full((2, 1, 4, window), -1)
    members, joined = Members(d[..., :0], none), []
    for t in range(30):
        joined.append(members.append(d[..., t], length))
    options = {"window": window, "length": length, "is_causal_prefix": True}
    index = hw.kmeans_route(x, mu, backend="reference", **options)
    assert_same_bits(members.index, index)
    assert_same_bits(members.seen, d)
    expected = (index[..., None] == torch.arange(30)).any(-2)
    assert_same_bits(torch.stack(joined, -1), expected)


def test_parts():
    """Local heads are windowed attention, routing heads attention in clusters, side by side."""
    made, x = layer(), randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        q, k, v = made.local_qkv(x).view(2, TOKENS, 3, 2, 8).unbind(2)
        window = {"is_causal": True, "window_size": (6, 0), "backend": "reference"}
        local = hw.attention(q, k, v, **window)
        q, v = (p(x).view(2, TOKENS, 2, 8) for p in (made.to_q, made.to_v))
        k = F.normalize(q, dim=-1)
        index = hw.kmeans_route(k, made.centroids, window=8, backend="reference")
        routed = hw.kmeans_routing_attention(
            q, k, v, q_index=index, is_causal=True, mask_self=True, backend="reference"
        )
        expected = made.out_proj(torch.cat([local, routed], 2).flatten(2))
        compare(made(x), expected, F64)


@pytest.mark.parametrize(("causal", "shared"), [(True, True), (False, True), (False, False)])
def test_parity_with_routing_transformer(causal, shared):
    """The peer, where causal and not shared, adds keys of its own."""
    peer = routing_transformer().SelfAttention(
        WIDTH, 1, TOKENS, 4, 0, 8, causal=causal, shared_qk=shared
    ).double().eval()  # fmt: skip
    made = layer(local_heads=0, is_causal=causal, shared_qk=shared, mean_eps=1e-5)
    weights = {n.replace("to_out", "out_proj"): p for n, p in peer.state_dict().items()}
    weights["centroids"] = F.normalize(randn(4, 5, 8, seed=4), dim=-1)
    kept = {n: weights[n] for n in made.state_dict() if n in weights}
    made.load_state_dict(kept | {"initialized": torch.tensor(True)})
    peer.global_attn.kmeans.means.copy_(weights["centroids"])
    peer.global_attn.kmeans.initted.fill_(True)
    x = randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        compare(made(x), peer(x)[0], F64)
    # in training: the commitment loss and the next centroids
    made.train(), peer.train()
    _, loss = peer(x)
    made(x)
    compare(made.pop_loss(), loss.detach(), F64)
    peer.global_attn.kmeans.update()
    compare(made.centroids, peer.global_attn.kmeans.means, F64)


def test_centroids_from_data():
    """The first forward in training sets them, ten rounds of k-means from tokens of the batch."""
    made = layer().train()
    centers = F.normalize(randn(5, WIDTH, seed=2), dim=-1)
    x = centers.repeat(2, 8, 1) + 0.01 * randn(2, TOKENS, WIDTH, seed=3)
    before = made.centroids.clone()
    made.eval()(x)
    assert_same_bits(made.centroids, before)
    made.train()(x)
    assert bool(made.initialized)
    first = made.centroids.clone()
    assert torch.allclose(first.norm(dim=-1), torch.ones(2, 5, dtype=F64), atol=1e-2)
    routed = F.normalize(made.to_q(x).view(2, TOKENS, 2, 8), dim=-1).detach()
    nearest = torch.einsum("bthd,hcd->bhtc", routed, first).amax(-1)
    assert nearest.mean() > 0.9  # of 1: every token is close to a centroid
    made(x)
    expected = hw.kmeans_update(first, routed, decay=0.999)
    compare(made.centroids, expected, F64)
    loaded = layer().train()
    loaded.load_state_dict(made.state_dict())
    loaded.decay = 1.0
    loaded(x)
    assert_same_bits(loaded.centroids, made.centroids)  # not initialised again
    loaded.load_state_dict(layer().state_dict())
    loaded(x)
    assert bool(loaded.initialized)  # but after weights that were not


@pytest.mark.no_comparison
def test_centroids_of_fewer_tokens_than_clusters():
    made = layer().train()
    made(randn(1, 3, WIDTH))
    assert bool(made.initialized) and made.centroids.isfinite().all()
    empty = layer().train()
    empty(randn(1, 0, WIDTH))
    assert not bool(empty.initialized)


@pytest.mark.no_comparison
def test_commitment_loss(options):
    made, x = layer(commitment=0.5, **options), randn(2, TOKENS, WIDTH)
    made(x)
    assert made.pop_loss() == 0  # not in training
    made.train()(x)
    loss = made.pop_loss()
    assert loss > 0 and made.pop_loss() == 0
    (grad,) = torch.autograd.grad(loss, made.to_q.weight)
    assert grad.abs().sum() > 0
    copy.deepcopy(made)


@pytest.mark.no_comparison
def test_gradients_reach_every_weight(options):
    made = layer(**options).train()
    y = made(randn(2, TOKENS, WIDTH))
    (y * randn(*y.shape, seed=3)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())


@pytest.mark.no_comparison
def test_refuses():
    for options, words in (
        ({"local_heads": 4}, "SlidingWindowAttention"),
        ({"num_clusters": 0}, "num_clusters is 0"),
        ({"window": 0}, "window is 0"),
        ({"is_causal": False, "is_causal_prefix": True}, "without is_causal"),
        ({"norm": "batch"}, "'batch'"),
        ({"rotary_dim": 3}, "even number"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(**options)
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        nn.KMeansRoutingAttention(30, 4, local_heads=2, num_clusters=2, window=4)
    with pytest.raises(NotImplementedError, match="is_causal_prefix=True"):
        layer().init_state(1)
    made = layer(is_causal_prefix=True)
    with pytest.raises(ValueError, match=r"expected \[B, S, 32\]"):
        made(randn(4, WIDTH))
    with pytest.raises(NotImplementedError, match="packed"):
        made(randn(1, 8, WIDTH), cu_seqlens=torch.tensor([0, 8]))
    _, state = made(randn(1, TOKENS, WIDTH), return_state=True)
    with pytest.raises(NotImplementedError, match="single steps"):
        made(randn(1, 8, WIDTH), state)
    with pytest.raises(ValueError, match="fewer than length = 40"):
        made.step(randn(1, WIDTH), state)
    with pytest.raises(ValueError, match="length is 40"):
        made(randn(1, TOKENS + 1, WIDTH))
