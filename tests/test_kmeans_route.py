# SPDX-License-Identifier: Apache-2.0
"""Who is in a cluster: the definition token by token, ties, leakage, the prefix rule, similarities
that depend on nothing else, what native code refuses."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import headworks as hw
from backends import targets
from headworks import _library
from headworks.ops.routing import _kmeans_route_native as native
from headworks.reference import kmeans_routing as reference
from headworks.testing import EVERY_DTYPE, assert_same_bits, compare, evaluate
from identities import randn
from specs.kmeans_route import SPEC

pytestmark = pytest.mark.operator

F64, F32, I64 = torch.float64, torch.float32, torch.int64
COMPILED = tuple(dict.fromkeys(b for b, device, _ in targets(SPEC) if device == "cpu"))
EVERYWHERE = pytest.mark.parametrize("backend", ("reference", *COMPILED))

# Of the similarity of unit vectors: what fp32 sums may be off by, many times over.
MARGIN = 2e-6


@pytest.mark.parametrize(
    "case", (*SPEC.cases, *SPEC.emulator_cases, *SPEC.sample_cases), ids=lambda case: case.name
)
def test_cases_have_one_answer(case, monkeypatch):
    """Comparisons are exact: no case may have similarities that rounding could exchange, except
    those that tie exactly."""
    exact = case.sizes["vectors"] in ("equal", "few")
    similarity = reference.similarity

    def disturbed(x, mu):
        d = similarity(x, mu)
        size = torch.einsum("bth,hc->bhct", x.double().norm(dim=-1), mu.double().norm(dim=-1))
        return d + MARGIN * size * torch.sign(torch.randn(d.shape))

    for dtype in EVERY_DTYPE:
        tensors = SPEC.make(case, dtype)
        wide = {n: x.double() for n, x in tensors.items()}
        expected = evaluate(SPEC, case, "reference", wide)["members"]
        assert_same_bits(evaluate(SPEC, case, "reference", tensors)["members"], expected)
        if not exact:
            with monkeypatch.context() as patch:
                patch.setattr(reference, "similarity", disturbed)
                assert_same_bits(evaluate(SPEC, case, "reference", wide)["members"], expected)


def vectors(s=20, h=2, k=3, b=1, d=4, kind="normal", dtype=F64):
    """x and centroids: of unit length, or small integers with many ties, or all equal."""
    x, mu = randn(b, s, h, d, seed=3), randn(h, k, d, seed=4)
    if kind == "normal":
        x, mu = F.normalize(x, dim=-1), F.normalize(mu, dim=-1)
    elif kind == "few":
        x, mu = x.round().clamp(-1, 1), mu.round()
    else:
        x, mu = torch.ones_like(x), mu.round()
    return x.to(dtype), mu.to(dtype)


def members_before(index, t):
    return [sorted(j for j in row if 0 <= j < t) for row in index.flatten(0, -2).tolist()]


@pytest.mark.no_comparison
@EVERYWHERE
def test_membership_leakage(backend):
    """Later tokens change who is in the clusters, by design, unless the prefix alone decides."""
    x, mu = vectors(s=40)
    route = functools.partial(hw.kmeans_route, centroids=mu, window=10, backend=backend)
    t = 25
    other = torch.cat([x[:, :t], -x[:, t:]], 1)
    assert members_before(route(other), t) != members_before(route(x), t)
    prefix = functools.partial(route, is_causal_prefix=True)
    assert members_before(prefix(other), t) == members_before(prefix(x), t)
    assert any(members_before(prefix(x), t))


def by_arrival(d, window, length):
    """The prefix rule of one cluster, one token at a time."""
    members = []
    for t in range(len(d)):
        place = sorted(range(t + 1), key=lambda j: (-d[j], j)).index(t)
        if place * length < (t + 1) * window and len(members) < window:
            members.append(t)
    return members + [-1] * (window - len(members))


@EVERYWHERE
@pytest.mark.parametrize("kind", ("normal", "few", "equal"))
@pytest.mark.parametrize(
    "sizes", ((40, 10, 40), (40, 10, 64), (33, 40, 50), (17, 17, 17), (290, 60, 310)), ids=str
)
def test_prefix_rule(sizes, kind, backend):
    """Token by token; and the members of a prefix of the sequence are a prefix of the members."""
    tokens, window, length = sizes
    x, mu = vectors(s=tokens, kind=kind)
    options = {"window": window, "is_causal_prefix": True, "length": length, "backend": backend}
    index = hw.kmeans_route(x, mu, **options)
    d = torch.einsum("bthd,hcd->bhct", x, mu)
    expected = [by_arrival(row, window, length) for row in d.flatten(0, 2).tolist()]
    assert_same_bits(index, torch.tensor(expected).view(1, 2, 3, window))
    for t in (0, 1, tokens // 2, tokens - 1):
        shorter = hw.kmeans_route(x[:, :t], mu, **options)
        assert members_before(shorter, t) == members_before(index, t)
        assert ((shorter >= 0).sum(-1) <= t).all()


@pytest.mark.no_comparison
@EVERYWHERE
def test_prefix_of_hostile_orders(backend):
    """Similarities that only grow (every token joins, until the cluster is full), that only fall
    (the first joins, and no other), and a length beyond any memory."""
    t = torch.arange(300, dtype=F64)
    x = torch.stack([t, -t], -1).view(1, 300, 2, 1)
    options = {"window": 50, "is_causal_prefix": True, "backend": backend}
    index = hw.kmeans_route(x, torch.ones(2, 1, 1, dtype=F64), **options)
    assert index[0, 0, 0].tolist() == list(range(50))
    assert index[0, 1, 0].tolist() == [0] + [-1] * 49
    huge = hw.kmeans_route(x, torch.ones(2, 1, 1, dtype=F64), length=2**60, **options)
    assert huge[0, 0, 0].tolist() == list(range(50))


@pytest.mark.no_comparison
@EVERYWHERE
def test_prefix_clusters_are_full_and_balanced(backend):
    x, mu = vectors(s=400, k=4)
    index = hw.kmeans_route(x, mu, window=100, is_causal_prefix=True, backend=backend)
    assert ((index >= 0).sum(-1) >= 85).all()
    assert (index[..., 1:] > index[..., :-1])[index[..., 1:] >= 0].all()
    assert (index[..., 1:] < 0)[index[..., :-1] < 0].all()


@EVERYWHERE
def test_routing_is_balanced_top_w(backend):
    x, mu = vectors(s=50, b=2)
    index = hw.kmeans_route(x, mu, window=12, backend=backend)
    d = torch.einsum("bthd,hcd->bhct", x, mu)
    assert_same_bits(index, d.topk(12).indices.sort(-1).values)
    assert not hw.kmeans_route(x.requires_grad_(), mu, window=12, backend=backend).requires_grad


@pytest.mark.no_comparison
@EVERYWHERE
def test_ties_and_nan(backend):
    route = functools.partial(hw.kmeans_route, centroids=torch.ones(1, 1, 2), backend=backend)
    x = torch.ones(1, 6, 1, 2)
    x[0, 2] = torch.nan
    assert route(x, window=4)[0, 0, 0].tolist() == [0, 1, 3, 4]
    assert route(x, window=6)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    prefix = route(x, window=3, is_causal_prefix=True)
    assert prefix[0, 0, 0].tolist() == [0, -1, -1]  # later equals rank behind the first
    x[0, 0] = torch.nan
    prefix = route(x, window=3, is_causal_prefix=True)
    assert prefix[0, 0, 0].tolist() == [0, 1, 3]  # the first of all; two NaNs rank behind 3


@pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("sizes", ((3, 40), (17, 37), (1, 1)), ids=str)
@pytest.mark.parametrize("backend", COMPILED)
def test_similarity_depends_on_nothing_else(backend, sizes, dtype):
    """Not a bit of it: not on other tokens, other batch elements, their number, the threads."""
    clusters, channels = sizes
    tokens = 200
    x = randn(2, tokens, 2, channels).to(dtype)
    mu = randn(2, clusters, channels, seed=1).to(F32)
    d = native.similarity(x, mu, backend)
    compare(d, reference.similarity(x.double(), mu.double()), F32)
    for t in (1, 5, 95, 96, 97, 127, 128, 129, 199):
        assert_same_bits(native.similarity(x[:, :t], mu, backend), d[..., :t], f"{t} tokens")
        assert_same_bits(native.similarity(x[1:, t:], mu, backend), d[1:, ..., t:], f"from {t}")
    torch.set_num_threads(1)
    assert_same_bits(native.similarity(x, mu, backend), d, "one thread")
    same = native.similarity(x[:, :1].expand(-1, tokens, -1, -1), mu, backend)
    assert_same_bits(same, d[..., :1].expand_as(same).contiguous(), "equal tokens")


@pytest.mark.parametrize("backend", COMPILED)
def test_autocast(backend):
    x, mu = vectors(dtype=F32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        index = hw.kmeans_route(x, mu, window=8, backend=backend)
    expected = hw.kmeans_route(x.bfloat16(), mu, window=8, backend="reference")
    assert_same_bits(index, expected)


@pytest.mark.parametrize("prefix", (False, True))
def test_empty_calls_reach_no_kernel(prefix, monkeypatch):
    def refuse(*args):
        raise AssertionError("native code was called")

    monkeypatch.setattr(_library, "call", refuse)
    for b, s, h, k, w in ((0, 5, 2, 3, 2), (1, 5, 0, 3, 2), (1, 5, 2, 0, 2), (1, 5, 2, 3, 0)):
        x, mu = torch.ones(b, s, h, 4), torch.ones(h, k, 4)
        index = hw.kmeans_route(x, mu, window=w, is_causal_prefix=prefix)
        assert_same_bits(index, torch.empty(b, h, k, w, dtype=I64))
    x, mu = torch.ones(1, 0, 2, 4), torch.ones(2, 3, 4)
    assert_same_bits(hw.kmeans_route(x, mu, window=0), torch.empty(1, 2, 3, 0, dtype=I64))
    index = hw.kmeans_route(x, mu, window=2, is_causal_prefix=True, length=9)
    assert_same_bits(index, torch.full((1, 2, 3, 2), -1))
    with pytest.raises(AssertionError, match="native code was called"):
        hw.kmeans_route(x.new_ones(1, 5, 2, 4), mu, window=2)


X, MU, D = torch.ones(2, 9, 3, 4), torch.ones(3, 5, 4), torch.ones(2, 3, 5, 9)
INDEX = torch.ones(6, 4, dtype=I64)
WRONG = (
    ("similarity", (X, MU.double(), D), (), TypeError, "centroids is of float64"),
    ("similarity", (X.bfloat16(), MU, D.bfloat16()), (), TypeError, "d is of bfloat16"),
    ("similarity", (X, MU[:2], D), (), ValueError, "has size 2 at dimension 0, expected 3"),
    ("similarity", (X, MU[..., :3], D), (), ValueError, "has size 3 at dimension 2, expected 4"),
    ("similarity", (X, MU, D[..., :8]), (), ValueError, "has size 8 at dimension 3, expected 9"),
    ("similarity", (X, MU, D.mT.contiguous().mT), (), ValueError, "d has stride 5"),
    ("prefix", (D[0, 0], INDEX), (9,), ValueError, "has size 6 at dimension 0, expected 5"),
    ("prefix", (D[0, 0], INDEX[:5].float()), (9,), TypeError, "index is of float32"),
    ("prefix", (D[0, 0], INDEX[:5]), (8,), ValueError, "length is 8"),
)


@pytest.mark.no_comparison
@pytest.mark.parametrize("function, tensors, scalars, kind, words", WRONG)
def test_native_code_refuses(function, tensors, scalars, kind, words):
    with pytest.raises(kind, match=words):
        _library.call(_library.function(f"kmeans_route.{function}"), "cpu", tensors, scalars)


@pytest.mark.no_comparison
def test_there_is_one_prefix_kernel_for_32_bits():
    """Similarities of 16-bit tokens are fp32."""
    words = "no cpu kernel for kmeans_route.prefix"
    with pytest.raises(NotImplementedError, match=words):
        prefix = _library.function("kmeans_route.prefix")
        _library.call(prefix, "cpu", [D[0, 0].bfloat16(), INDEX[:5]], (9,))
