# SPDX-License-Identifier: Apache-2.0
"""Attention within clusters and their centroids: the definition slot by slot, degenerate cases,
leakage, bad input. Who is in a cluster: test_kmeans_route.py; the layer: test_routing_layers.py."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import headworks as hw
from headworks import _library
from headworks.reference import kmeans_routing as reference
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, randn
from routing_checks import (
    cases_of,
    check_example,
    check_reference,
    on_both_backends,
    routing_transformer,
)
from specs import kmeans_routing_attention as spec

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
route = functools.partial(hw.kmeans_route, backend="reference")
attend = functools.partial(hw.kmeans_routing_attention, backend="reference")
on_both = on_both_backends(globals(), attend=hw.kmeans_routing_attention)
full = functools.partial(hw.attention, backend="reference")


@pytest.mark.parametrize("case, dtype", cases_of(spec.SPEC))
def test_attention_reference(case, dtype):
    check_reference(spec.SPEC, case, dtype)


def inputs(s=20, h=2, d=4, dv=3, b=1, sk=None, hk=None):
    k = randn(b, sk or s, hk or h, d, seed=1)
    return randn(b, s, h, d), k, randn(*k.shape[:3], dv, seed=2)


def routed(s=20, h=2, k=3, w=8, b=1, seed=3):
    """x and centroids of unit length, and the clusters."""
    x, mu = (F.normalize(randn(*n, seed=seed), dim=-1) for n in ((b, s, h, 4), (h, k, 4)))
    return x, mu, route(x, mu, window=w)


def by_slots(q, k, v, q_index, k_index, causal=False, mask_self=False, eps=0.0):
    """The definition, one slot at a time."""
    total = v.new_zeros(*q.shape[:3], v.shape[-1])
    count = v.new_zeros(q.shape[:3])
    shift = k.shape[1] - q.shape[1]
    for b, h, c, slot in torch.cartesian_prod(*map(torch.arange, q_index.shape)).tolist():
        i = int(q_index[b, h, c, slot])
        if i < 0:
            continue
        count[b, i, h] += 1
        group = h // (q.shape[2] // k.shape[2])
        keys = [j for j in k_index[b, h, c].tolist() if j >= 0]
        keys = [j for j in keys if not causal or j <= i + shift]
        if mask_self and any(j != i + shift for j in keys):
            keys = [j for j in keys if j != i + shift]
        if keys:
            p = (k[b, keys, group] @ q[b, i, h] * q.shape[-1] ** -0.5).softmax(0)
            total[b, i, h] += p @ v[b, keys, group]
    return total / torch.where(count == 0, 1, count + eps)[..., None]


@pytest.mark.parametrize("mask_self", (True, False))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize(
    "sizes", ({}, {"h": 4, "hk": 2}, {"s": 12, "sk": 20}, {"s": 20, "sk": 12}), ids=str
)
@pytest.mark.usefixtures("on_both")
def test_is_the_definition(sizes, causal, mask_self):
    q, k, v = inputs(**sizes)
    lists = []
    for tokens in (q.shape[1], k.shape[1]):
        index = torch.randint(-1, tokens, (1, q.shape[2], 5, 7))
        lists.append(torch.where(torch.rand(index.shape) < 0.3, -1, index))
    lists[0][0, 0, 0], lists[1][0, 0, 0] = 9, 9 + k.shape[1] - q.shape[1]  # sees itself alone
    options = {"is_causal": causal, "mask_self": mask_self, "mean_eps": 0.01}
    o = attend(q, k, v, q_index=lists[0], k_index=lists[1], **options)
    compare(o, by_slots(q, k, v, *lists, causal, mask_self, 0.01), F64)


@pytest.mark.parametrize("heads", ((2, 2), (4, 2)), ids=str)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.usefixtures("on_both")
def test_one_cluster_of_all_tokens_is_full_attention(causal, heads):
    q, k, v = inputs(h=heads[0], hk=heads[1], b=2)
    everyone = torch.arange(20).expand(2, heads[0], 1, 20)
    o = attend(q, k, v, q_index=everyone, is_causal=causal)
    compare(o, full(q, k, v, is_causal=causal), F64)
    # in any order, and the mean over equal clusters is the same again
    shuffled = everyone[..., torch.randperm(20)].expand(-1, -1, 3, -1)
    compare(attend(q, k, v, q_index=shuffled, is_causal=causal), o, F64)
    compare(attend(q, k, v, q_index=shuffled, is_causal=causal, mean_eps=0.5), o * 3 / 3.5, F64)


@pytest.mark.usefixtures("on_both")
def test_fewer_queries_than_keys_are_the_last_ones():
    q, k, v = inputs(s=5, sk=20)
    rows, keys = torch.arange(5).expand(1, 2, 1, 5), torch.arange(20).expand(1, 2, 1, 20)
    o = attend(q, k, v, q_index=rows, k_index=keys, is_causal=True)
    compare(o, full(q, k, v, is_causal=True), F64)


@pytest.mark.usefixtures("on_both")
def test_tokens_in_no_cluster():
    """Output 0, gradients 0, and never read."""
    q, k, v = inputs()
    index = torch.tensor([[1, 4, 7], [4, 9, -1]])
    member = torch.isin(torch.arange(20), index)
    index = index.expand(1, 2, 2, 3)
    o = attend(q, k, v, q_index=index)
    assert (o[:, ~member] == 0).all() and (o[:, member] != 0).all()
    given = [torch.where(member[:, None, None], t, torch.nan).requires_grad_() for t in (q, k, v)]
    other = attend(*given, q_index=index)
    assert_same_bits(other, o)
    for grad in torch.autograd.grad((other * randn(*o.shape)).sum(), given):
        assert (grad[:, ~member] == 0).all()
        assert (grad[:, member] != 0).all()


@pytest.mark.usefixtures("on_both")
def test_a_token_twice_counts_twice():
    q, k, v = inputs(h=1)
    once = torch.tensor([[2, 5, 9]])[None, None]
    twice = torch.tensor([[2, 5, 5, 9]])[None, None]
    o = attend(q, k, v, q_index=once, k_index=twice)
    bias = torch.tensor([0.0, 2.0, 0.0], dtype=F64).log().clamp(min=0)[None, None]
    rows = [2, 5, 9]
    expected = full(q[:, rows], k[:, rows], v[:, rows], key_bias=bias)
    compare(o[:, rows], expected, F64)
    # as queries: two equal slots have the mean of one
    compare(attend(q, k, v, q_index=twice, k_index=once), attend(q, k, v, q_index=once), F64)


@pytest.mark.usefixtures("on_both")
def test_a_row_sees_itself_only_if_nothing_else():
    q, _, v = inputs(h=1)
    index = torch.tensor([[3, 8, 12], [15, -1, -1]])[None, None]
    o = attend(q, q, v, q_index=index, is_causal=True, mask_self=True)
    compare(o[0, 3], v[0, 3], F64)  # the first of its cluster
    compare(o[0, 8], v[0, 3], F64)  # sees 3 alone
    compare(o[0, 15], v[0, 15], F64)
    huge = attend(100 * q, 100 * q, v, q_index=index, is_causal=True, mask_self=True)
    compare(huge[0, 8], v[0, 3], F64)


@pytest.mark.usefixtures("on_both")
def test_no_value_leakage():
    """Earlier outputs do not depend on later values, queries and keys, for given clusters."""
    q, k, v = inputs()
    _, _, index = routed()
    o = attend(q, k, v, q_index=index, is_causal=True)
    for t in (1, 7, 19):
        later = [torch.cat([x[:, :t], 50 * x[:, t:] + 1], 1) for x in (q, k, v)]
        assert_same_bits(attend(*later, q_index=index, is_causal=True)[:, :t], o[:, :t])


@pytest.mark.no_comparison
@pytest.mark.parametrize("mask_self", (True, False))
@pytest.mark.usefixtures("on_both")
def test_gradcheck(mask_self):
    tensors = [t.requires_grad_() for t in inputs(s=7, d=2, dv=2)]
    index = torch.tensor([[0, 3, 5, -1], [5, 1, 3, 3], [6, -1, -1, -1]]).expand(1, 2, 3, 4)
    options = {"q_index": index, "is_causal": True, "mask_self": mask_self, "mean_eps": 0.1}
    assert torch.autograd.gradcheck(lambda *t: attend(*t, **options), tensors)


@pytest.mark.usefixtures("on_both")
def test_autocast():
    q, k, v = (t.float() for t in inputs())
    _, mu, index = routed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, other = attend(q, k, v, q_index=index), route(q, mu, window=8)
    half = [t.bfloat16() for t in (q, k, v)]
    assert_same_bits(o, attend(*half, q_index=index))
    assert_same_bits(other, route(half[0], mu, window=8))


def test_lists_that_cannot_be_read():
    """Lists inside torch.func are refused by name: nobody reads them. Zeros without memory are made
    real first."""
    q, index = randn(1, 6, 2, 8).float(), torch.arange(6).view(1, 1, 2, 3).repeat(1, 2, 1, 1)

    def run(x):
        return hw.kmeans_routing_attention(q, q, q, q_index=x, backend="cpu")

    for call, x in ((torch.func.vmap(run), index[None]), (torch.func.functionalize(run), index)):
        with pytest.raises(NotImplementedError, match=r"torch\.func.*reference"):
            call(x)
    zeros = torch._efficientzerotensor(index.shape, dtype=index.dtype)
    assert_same_bits(run(zeros), run(torch.zeros_like(index)))
    with pytest.raises(TypeError, match="extremes"):
        _library.extremes(torch._efficientzerotensor(index.shape, dtype=index.dtype))


@pytest.mark.usefixtures("on_both")
def test_compiles():
    q, k, v = inputs()
    _, mu, _ = routed()

    def call(q, k, v):
        index = route(q, mu, window=8, is_causal_prefix=True)
        return attend(q, k, v, q_index=index, is_causal=True)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    compare(compiled(q, k, v), call(q, k, v), F64)


def test_update_moves_to_the_normalised_mean():
    x, mu, index = routed(s=50, w=12, b=2)
    sums = torch.zeros_like(mu)
    nearest = torch.einsum("bthd,hcd->bthc", x, mu).argmax(-1)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, nearest.shape)).tolist():
        sums[h, nearest[b, t, h]] += x[b, t, h]
    expected = 0.9 * mu + 0.1 * F.normalize(sums, dim=-1)
    before = mu.clone()
    compare(hw.kmeans_update(mu, x, decay=0.9), expected, F64)
    assert_same_bits(mu, before)
    members = torch.stack([x[b, index[b, h], h] for b in range(2) for h in range(2)])
    means = members.view(2, 2, 3, 12, 4).sum((0, 3))
    compare(hw.kmeans_update(mu, x, index, decay=0.0), F.normalize(means, dim=-1), F64)
    assert_same_bits(hw.kmeans_update(mu, x, decay=1.0), mu)


@pytest.mark.parametrize("dtype", (F64, F32, torch.bfloat16))
@pytest.mark.parametrize("with_index", (True, False))
def test_update_equals_the_reference(with_index, dtype):
    """With empty slots, a token that is in a cluster twice, ties, and tokens that do not count."""
    x, mu, index = (t.clone() for t in routed(s=40, w=9, b=3))
    x[0, 3], x[1, 5, 0, 2], mu[1, 2] = torch.nan, -torch.inf, mu[1, 0]
    index[0, :, 1, 4:], index[:, 1, 2], index[2, 0, 0, :2] = -1, -1, 7
    x, index = x.to(dtype), index if with_index else None
    sums = reference.cluster_sums(x.double(), mu, index)
    for decay in (0.0, 0.25, 1.0):
        expected = reference.kmeans_update(mu, sums, decay)
        moved = hw.kmeans_update(mu, x, index, decay=decay)
        compare(moved, expected, F64 if dtype == F64 else F32)


@pytest.mark.parametrize("with_index", (True, False))
def test_update_by_a_sum_that_overflows(with_index):
    """The sum is finite, its length in fp32 is not: the centroid stays; so it does beyond."""
    x = torch.tensor([[3e38, 3e38], [0.0, -1.0]])[None, :, None]
    mu = torch.tensor([[[0.6, 0.8], [0.0, -1.0]]])
    index = torch.tensor([[[[0], [1]]]]) if with_index else None
    for tokens in (x, torch.cat([x, x], 1)):
        moved = hw.kmeans_update(mu, tokens, index, decay=0.5)
        assert_same_bits(moved, mu)
        sums = reference.cluster_sums(tokens, mu, index)
        assert_same_bits(reference.kmeans_update(mu, sums, 0.5), mu)


@pytest.mark.parametrize("with_index", (True, False))
def test_update_by_tokens_that_do_not_count_alone(with_index):
    """A cluster of nothing but such tokens is an empty one; another one moves without them."""
    x = torch.tensor([[1.0, 0.0], [-1.0, torch.nan], [0.6, 0.8]])[None, :, None]
    mu = torch.tensor([[[0.0, -1.0], [0.8, 0.6]]])
    index = torch.tensor([[[[1, 1, -1], [0, 2, 1]]]]) if with_index else None
    moved = hw.kmeans_update(mu, x, index, decay=0.5)
    assert_same_bits(moved[:, 0], mu[:, 0])
    compare(
        moved[0, 1], 0.5 * mu[0, 1].double() + 0.5 * F.normalize(x[0, 0] + x[0, 2], dim=-1)[0], F32
    )


def test_update_of_empty_clusters():
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6]])[None, :, None]
    mu = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]])
    moved = hw.kmeans_update(mu, x, decay=0.0)
    assert_same_bits(moved[0, 1:], mu[0, 1:])  # nobody's, and the second of two equals
    compare(moved[0, 0], F.normalize(x.sum((0, 1, 2)), dim=-1).double(), F32)
    empty = torch.full((1, 1, 3, 4), -1)
    assert_same_bits(hw.kmeans_update(mu, x, empty, decay=0.5), mu)
    assert_same_bits(hw.kmeans_update(mu, x[:, :0], decay=0.5), mu)


def test_update_keeps_the_dtype_of_the_centroids():
    x, mu, _ = routed()
    moved = hw.kmeans_update(mu.float(), x.bfloat16())
    assert moved.dtype == F32
    compare(moved, hw.kmeans_update(mu.float().double(), x.bfloat16().double()), F32)


RANK = """
import sys, torch, torch.distributed as dist
import headworks as hw
rank, store, saved = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
x, mu = torch.load(saved)
moved = hw.kmeans_update(mu, x[rank : rank + 1], decay=0.5, group=dist.group.WORLD)
torch.save(moved, saved + str(rank))
dist.destroy_process_group()
"""


def test_update_over_a_process_group(tmp_path):
    """Two ranks with half of the batch each have the centroids of the whole."""
    x, mu, _ = routed(b=2)
    saved = str(tmp_path / "saved")
    torch.save((x, mu), saved)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), saved],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    whole = hw.kmeans_update(mu, x, decay=0.5)
    first, second = (torch.load(saved + str(rank)) for rank in range(2))
    assert_same_bits(first, second)
    compare(first, whole, F64)
    assert (hw.kmeans_update(mu, x[:1], decay=0.5) - whole).abs().max() > 1e-3


def lucidrains(**options):
    """KmeansAttention of PyPI's routing-transformer in fp64, with centroids set."""
    made = routing_transformer().KmeansAttention(3, 8, 2, 4, **options).double().eval()
    mu = F.normalize(randn(2, 3, 4, seed=8), dim=-1)
    made.kmeans.means.copy_(mu)
    made.kmeans.initted.fill_(True)
    return made, mu


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.usefixtures("on_both")
def test_parity_with_routing_transformer_shared(causal):
    made, mu = lucidrains(causal=causal, shared_qk=True)
    q, _, v = inputs(dv=4, b=2)
    with torch.no_grad():
        expected, _ = made(*(t.transpose(1, 2) for t in (q, q, v)))
    k = F.normalize(q, dim=-1)
    index = route(k, mu, window=8)
    o = attend(q, k, v, q_index=index, is_causal=causal, mask_self=True, mean_eps=1e-5)
    compare(o, expected.transpose(1, 2), F64)


@pytest.mark.usefixtures("on_both")
def test_parity_with_routing_transformer_apart():
    made, mu = lucidrains()
    q, k, v = inputs(dv=4, b=2)
    with torch.no_grad():
        expected, _ = made(*(t.transpose(1, 2) for t in (q, k, v)))
    q_index, k_index = (route(F.normalize(t, dim=-1), mu, window=8) for t in (q, k))
    o = attend(q, k, v, q_index=q_index, k_index=k_index, mean_eps=1e-5)
    compare(o, expected.transpose(1, 2), F64)


def test_parity_with_routing_transformer_update():
    made, mu = lucidrains(shared_qk=True)
    x, _, _ = routed(b=2)
    made.train().kmeans(x.transpose(1, 2), True)
    made.kmeans.update()
    compare(hw.kmeans_update(mu, x), made.kmeans.means, F64)


@pytest.mark.no_comparison
@pytest.mark.parametrize(
    "function", (hw.kmeans_route, hw.kmeans_routing_attention, hw.kmeans_update)
)
def test_examples(function):
    check_example(function)


def zeros(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def index_of(*shape, fill=0, dtype=torch.int64):
    return torch.full(shape, fill, dtype=dtype)


ROUTE = (
    Refused(TypeError, "x", "a float", x=1.0),
    Refused(ValueError, "x", "[9, 2, 8]", "[B, S, H, D]", x=zeros(9, 2, 8)),
    Refused(TypeError, "x", "int64", x=zeros(1, 9, 2, 8, dtype=torch.int64)),
    Refused(TypeError, "centroids", "a list", centroids=[0.0]),
    Refused(TypeError, "centroids", "int64", centroids=zeros(2, 3, 8, dtype=torch.int64)),
    Refused(ValueError, "centroids", "[3, 8]", "[H, K, D]", centroids=zeros(3, 8)),
    Refused(ValueError, "centroids", "[2, 3, 7]", "[2, 3, 8]", centroids=zeros(2, 3, 7)),
    Refused(ValueError, "centroids", "[3, 3, 8]", centroids=zeros(3, 3, 8)),
    Refused(RuntimeError, "centroids", "meta", centroids=zeros(2, 3, 8, device="meta")),
)
ROUTE_ALONE = (
    Refused(ValueError, "window", "10", "from 0 to 9", window=10),
    Refused(ValueError, "window", "-1", window=-1),
    Refused(TypeError, "window", "2.5", window=2.5),
    Refused(TypeError, "is_causal_prefix", "None", is_causal_prefix=None),
    Refused(ValueError, "length", "12", "is_causal_prefix", length=12),
    Refused(ValueError, "length", "8", "at least 9", length=8, is_causal_prefix=True),
    Refused(
        ValueError, "window", "13", "from 0 to 12", window=13, length=12, is_causal_prefix=True
    ),
    Refused(ValueError, "backend", "'gpu'", backend="gpu"),
    Refused(RuntimeError, "simt", "emulate:simt", backend="simt"),
)
UPDATE = (
    Refused(TypeError, "index", "float32", "int64", index=zeros(1, 2, 3, 4)),
    Refused(ValueError, "index", "[1, 2, 3]", index=index_of(1, 2, 3)),
    Refused(ValueError, "clusters of index", "4", "3", index=index_of(1, 2, 4, 4)),
    Refused(ValueError, "index", "from 9 to 9", "-1 to 8", index=index_of(1, 2, 3, 4, fill=9)),
    Refused(ValueError, "decay", "1.5", "from 0 to 1", decay=1.5),
    Refused(ValueError, "decay", "nan", decay=float("nan")),
    Refused(TypeError, "decay", "NoneType", decay=None),
    Refused(RuntimeError, "group", "init_process_group", group="everyone"),
)
ATTEND = (
    Refused(ValueError, "q", "[6, 4, 8]", "[B, S, H, D]", q=zeros(6, 4, 8)),
    Refused(ValueError, "k", "[1, 7, 2, 9]", k=zeros(1, 7, 2, 9)),
    Refused(ValueError, "v", "[1, 6, 2, 5]", "[1, 7, 2, 5]", v=zeros(1, 6, 2, 5)),
    Refused(TypeError, "v", "float64", v=zeros(1, 7, 2, 5, dtype=F64)),
    Refused(ValueError, "heads", "multiple", q=zeros(1, 6, 3, 8)),
    Refused(
        TypeError, "q_index", "int32", "int64", q_index=index_of(1, 4, 3, 2, dtype=torch.int32)
    ),
    Refused(TypeError, "q_index", "NoneType", q_index=None),
    Refused(ValueError, "q_index", "[1, 2, 3, 2]", "H = 4", q_index=index_of(1, 2, 3, 2)),
    Refused(ValueError, "q_index", "[1, 4, 3]", q_index=index_of(1, 4, 3)),
    Refused(ValueError, "q_index", "from 6 to 6", "-1 to 5", q_index=index_of(1, 4, 3, 2, fill=6)),
    Refused(ValueError, "q_index", "from -2", q_index=index_of(1, 4, 3, 2, fill=-2)),
    Refused(RuntimeError, "q_index", "meta", q_index=index_of(1, 4, 3, 2).to("meta")),
    Refused(ValueError, "k_index", "from 7 to 7", "-1 to 6", k_index=index_of(1, 4, 3, 2, fill=7)),
    Refused(ValueError, "clusters of k_index", "2", "3", k_index=index_of(1, 4, 2, 2)),
    Refused(TypeError, "k_index", "a list", k_index=[[0]]),
    Refused(TypeError, "is_causal", "0", is_causal=0),
    Refused(TypeError, "mask_self", "None", mask_self=None),
    Refused(ValueError, "scale", "inf", "finite", scale=float("inf")),
    Refused(ValueError, "mean_eps", "-0.1", ">= 0", mean_eps=-0.1),
    Refused(TypeError, "mean_eps", "NoneType", mean_eps=None),
    Refused(ValueError, "backend", "'gpu'", backend="gpu"),
)


def refuse(case, function, arguments, monkeypatch):
    allocates_nothing(monkeypatch)
    case.check(lambda: function(**(arguments | case.arguments)))


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", ROUTE + ROUTE_ALONE, ids=repr)
def test_route_refuses(case, monkeypatch):
    arguments = {"x": zeros(1, 9, 2, 8), "centroids": zeros(2, 3, 8), "window": 4}
    refuse(case, hw.kmeans_route, arguments, monkeypatch)


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", ROUTE + UPDATE, ids=repr)
def test_update_refuses(case, monkeypatch):
    monkeypatch.setattr(spec.module, "cluster_sums", lambda *a: (zeros(1), zeros(1)))
    arguments = {"x": zeros(1, 9, 2, 8), "centroids": zeros(2, 3, 8)}
    refuse(case, hw.kmeans_update, arguments, monkeypatch)


@pytest.mark.no_comparison
@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("case", ATTEND, ids=repr)
def test_attention_refuses(case, backend, monkeypatch):
    arguments = {"q": zeros(1, 6, 4, 8), "k": zeros(1, 7, 2, 8), "v": zeros(1, 7, 2, 5),
                 "q_index": index_of(1, 4, 3, 2), "backend": backend}  # fmt: skip
    refuse(case, hw.kmeans_routing_attention, arguments, monkeypatch)
