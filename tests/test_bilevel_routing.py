# SPDX-License-Identifier: Apache-2.0
"""Bi-level routing: the definition token by token, degenerate cases, gradients, padding, the layer,
bad input."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import headworks as hw
from headworks import nn
from headworks.ops.routing._checks import check_grid
from headworks.reference import bilevel_routing as reference
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, randn
from routing_checks import cases_of, check_example, check_reference, on_both_backends
from specs import bilevel_route as route_spec
from specs import bilevel_routing_attention as spec

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
route = functools.partial(hw.bilevel_route, backend="reference")
attend = functools.partial(hw.bilevel_routing_attention, backend="reference")
on_both = on_both_backends(globals(), attend=hw.bilevel_routing_attention)


@pytest.mark.parametrize("case, dtype", cases_of(spec.SPEC))
def test_attention_reference(case, dtype):
    check_reference(spec.SPEC, case, dtype)


@pytest.mark.parametrize("case, dtype", cases_of(route_spec.SPEC))
def test_route_reference(case, dtype):
    check_reference(route_spec.SPEC, case, dtype)


def inputs(y=9, x=10, h=2, d=4, dv=3, b=1, yk=None, xk=None, hk=None):
    q = randn(b, y, x, h, d)
    k = randn(b, yk or y, xk or x, hk or h, d, seed=1)
    return q, k, randn(*k.shape[:4], dv, seed=2)


def region_numbers(height, width, regions):
    """For each token the number of its region, and the tokens of a region, padding included."""
    h, w = height // regions[0], width // regions[1]
    columns = -(-width // w)
    rows = -(-height // h)
    number = torch.tensor(
        [[y // h * columns + x // w for x in range(width)] for y in range(height)]
    )
    return number, rows * columns, h * w


@pytest.mark.no_comparison
def test_grids_are_those_of_the_reference():
    for height, rows in ((n, r) for n in range(1, 24) for r in range(1, n + 1)):
        image = torch.zeros(1, height, 25 - height, 1, 1)
        columns = 1 + (7 * rows) % (25 - height)
        expected = reference.grid_of(image, (rows, columns))
        made = check_grid("op", "num_regions", (rows, columns), image, "q")
        assert (*made, made.regions) == (*expected, expected.regions)


def by_tokens(q, k, v, graph, regions, kv_regions=None, mask_padding=True, scale=None):
    """The definition, one token and head at a time. o [B, Y, X, H, Dv] and L [B, H, Y, X]."""
    own, _, _ = region_numbers(*q.shape[1:3], regions)
    other, _, size = region_numbers(*k.shape[1:3], kv_regions or regions)
    batch, height, width, heads, d = q.shape
    scale = (heads * d) ** -0.5 if scale is None else scale
    o = q.new_zeros(batch, height, width, heads, v.shape[-1])
    lse = q.new_zeros(batch, heads, height, width)
    for b, y, x, h in torch.cartesian_prod(*map(torch.arange, q.shape[:4])).tolist():
        listed = graph[b, h, own[y, x]] if graph.dim() == 4 else graph[b, own[y, x]]
        scores, values = [], []
        group = heads // k.shape[3]
        for region in listed.tolist():
            inside = other == region
            scores.append(scale * k[b, inside, h // group] @ q[b, y, x, h])
            values.append(v[b, inside, h // group])
            missing = size - int(inside.sum())
            if missing and not mask_padding:
                scores.append(q.new_zeros(missing))
                values.append(v.new_zeros(missing, v.shape[-1]))
        s = torch.cat(scores)
        o[b, y, x, h] = s.softmax(0) @ torch.cat(values)
        lse[b, h, y, x] = s.logsumexp(0)
    return o, lse


@pytest.mark.parametrize("mask", (True, False))
@pytest.mark.parametrize("graph", ("shared", "head", "twice"))
@pytest.mark.parametrize("sizes", ({}, {"y": 7, "x": 11, "hk": 1}, {"yk": 5, "xk": 7}), ids=str)
@pytest.mark.usefixtures("on_both")
def test_is_the_definition(sizes, graph, mask):
    q, k, v = inputs(**sizes)
    regions, kv_regions = (3, 4), (2, 3)
    _, own, _ = region_numbers(*q.shape[1:3], regions)
    _, others, _ = region_numbers(*k.shape[1:3], kv_regions)
    shape = (1, 2, own, 3) if graph == "head" else (1, own, 3)
    listed = torch.randint(others, shape) if graph == "twice" else None
    if listed is None:
        listed = torch.rand(*shape[:-1], others).argsort(-1)[..., :3]
    options = {"mask_padding": mask, "kv_num_regions": kv_regions, "graph": listed}
    o, aux = attend(q, k, v, num_regions=regions, return_aux=hw.Aux(lse=True), **options)
    expected, lse = by_tokens(q, k, v, listed, regions, kv_regions, mask)
    compare(o, expected, F64)
    compare(aux.lse, lse, F64)
    assert aux.entropy is None and aux.p_max is None


@pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("topk", (1, 3))  # keys read where they lie, or gathered
@pytest.mark.parametrize("heads", ((16, 8), (12, 12)), ids=str)
def test_more_heads_than_a_thread_takes_at_once(heads, topk, dtype):
    q, k, v = inputs(16, 16, h=heads[0], hk=heads[1], d=16, dv=16, b=2)
    given = [x.to(dtype) for x in (q, k, v)]
    options = {"num_regions": (2, 2), "graph": route(q, k, num_regions=(2, 2), topk=topk)}
    made = hw.bilevel_routing_attention(*given, backend="cpu", **options)
    oracle = attend(*(x.double() for x in given), **options)
    compare(made, oracle, dtype, reference=attend(*given, **options))


@pytest.mark.parametrize("heads", ((2, 2), (4, 2), (3, 1)), ids=str)
@pytest.mark.parametrize("sizes", ((8, 12), (9, 11)), ids=str)
@pytest.mark.usefixtures("on_both")
def test_all_regions_are_full_attention(sizes, heads):
    q, k, v = inputs(*sizes, h=heads[0], hk=heads[1], b=2)
    _, count, _ = region_numbers(*sizes, (4, 3))
    o, aux = attend(
        q, k, v, num_regions=(4, 3), topk=count, return_aux=hw.Aux(True, True, True, True)
    )
    flat = [t.flatten(1, 2) for t in (q, k, v)]
    scale = (q.shape[3] * q.shape[4]) ** -0.5
    want = hw.Aux(True, True, True, True)
    full, full_aux = hw.attention(*flat, scale=scale, return_aux=want, backend="reference")
    compare(o.flatten(1, 2), full, F64)
    for actual, expected in zip(aux[:4], full_aux[:4], strict=True):
        compare(actual.flatten(2), expected, F64)


@pytest.mark.usefixtures("on_both")
def test_unmasked_padding_is_keys_of_zero():
    """2 x 2 regions asked of 5 x 5 tokens are 3 x 3 regions of 2 x 2, 36 places for 25 tokens."""
    q, k, v = inputs(5, 5)
    o = attend(q, k, v, num_regions=(2, 2), topk=9, mask_padding=False)
    zeros = [F.pad(t.flatten(1, 2), (0, 0, 0, 0, 0, 11)) for t in (k, v)]
    full = hw.attention(q.flatten(1, 2), *zeros, scale=8**-0.5, backend="reference")
    compare(o.flatten(1, 2), full, F64)
    hidden = attend(q, k, v, num_regions=(2, 2), topk=9)
    assert (hidden - o).abs().max() > 1e-3


@pytest.mark.usefixtures("on_both")
def test_one_token_regions_with_themselves_give_their_value():
    q, k, v = inputs(4, 4)
    graph = torch.arange(16)[None, :, None]
    compare(attend(q, k, v, num_regions=(4, 4), graph=graph), v, F64)


def pooled_scores(q, k, regions):
    """Region scores by average pooling, [B, H, R, R]."""
    size = (q.shape[1] // regions[0], q.shape[2] // regions[1])

    def pool(x):  # [B, Y, X, H, D] -> [B, H, R, D]
        channels = x.flatten(3).permute(0, 3, 1, 2)
        means = F.avg_pool2d(channels, size, ceil_mode=True, count_include_pad=False)
        return means.unflatten(1, x.shape[3:]).flatten(3).transpose(2, 3)

    return pool(q) @ pool(k).transpose(2, 3)


@pytest.mark.parametrize("per_head", (True, False))
@pytest.mark.parametrize("sizes", ((14, 21), (9, 11), (7, 8)), ids=str)
def test_routing_is_top_k_of_pooled_scores(sizes, per_head):
    """As sets, with a margin: what was left out scores no more than what was chosen."""
    q, k, _ = inputs(*sizes, b=2)
    graph = route(q, k, num_regions=(3, 3), topk=4, per_head=per_head)
    a = pooled_scores(q, k, (3, 3))
    a = a if per_head else a.sum(1)
    chosen = torch.zeros_like(a, dtype=torch.bool).scatter(-1, graph, True)
    assert (chosen.sum(-1) == 4).all()
    worst = torch.where(chosen, a, torch.inf).amin(-1)
    best_other = torch.where(chosen, -torch.inf, a).amax(-1)
    assert (worst > best_other - 1e-12).all()
    compare(a.gather(-1, graph), a.topk(4).values, F64)


def test_ties_and_nan_of_routing():
    q = torch.ones(1, 4, 4, 1, 2)
    graph = route(q, q, num_regions=(4, 4), topk=5)
    assert_same_bits(graph, torch.arange(5).expand(1, 16, 5).contiguous())
    k = q.clone()
    k[0, 0, 0] = torch.nan  # region 0 loses against every number
    k[0, 3, 3] = -torch.inf
    graph = route(q, k, num_regions=(4, 4), topk=15)
    assert_same_bits(graph, torch.tensor([*range(1, 15), 15]).expand(1, 16, 15).contiguous())
    k[0, 1, 1] = 7.0
    assert route(q, k, num_regions=(4, 4), topk=1).unique().tolist() == [5]


@pytest.mark.usefixtures("on_both")
def test_regions_that_nobody_chose():
    """Gradients of exactly 0, and values that are never read."""
    q, k, v = inputs(8, 8)
    graph = torch.tensor([3, 12]).expand(1, 16, 2)
    chosen = torch.isin(region_numbers(8, 8, (4, 4))[0], torch.tensor([3, 12]))
    o = attend(q, k, v, num_regions=(4, 4), graph=graph)
    k, v = (torch.where(chosen[..., None, None], t, torch.nan).requires_grad_() for t in (k, v))
    other = attend(q, k, v, num_regions=(4, 4), graph=graph)
    assert_same_bits(other, o)
    for grad in torch.autograd.grad((other * randn(*o.shape)).sum(), (k, v)):
        assert (grad[:, ~chosen] == 0).all()
        assert (grad[:, chosen] != 0).all()


@pytest.mark.usefixtures("on_both")
def test_routing_has_no_gradient():
    tensors = [t.requires_grad_() for t in inputs()]
    graph = route(*tensors[:2], num_regions=(3, 3), topk=2)
    assert not graph.requires_grad
    cotangent = randn(1, 9, 10, 2, 3, seed=5)
    routed = attend(*tensors, num_regions=(3, 3), topk=2)
    given = attend(*tensors, num_regions=(3, 3), graph=graph)
    for a, b in zip(
        *(torch.autograd.grad(o, tensors, cotangent) for o in (routed, given)), strict=True
    ):
        assert_same_bits(a, b)


@pytest.mark.no_comparison
@pytest.mark.parametrize("mask", (True, False))
@pytest.mark.usefixtures("on_both")
def test_gradcheck(mask):
    tensors = [t.requires_grad_() for t in inputs(3, 5, h=2, d=2, dv=2)]
    graph = torch.randint(9, (1, 2, 9, 2))

    def call(q, k, v):
        options = {"num_regions": (2, 2), "graph": graph, "mask_padding": mask}
        o, aux = attend(q, k, v, return_aux=hw.Aux(lse=True), **options)
        return o, aux.lse

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.usefixtures("on_both")
def test_autocast():
    q, k, v = (t.float() for t in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attend(q, k, v, num_regions=(3, 3), topk=2)
        graph = route(q, k, num_regions=(3, 3), topk=2)
    half = [t.bfloat16() for t in (q, k, v)]
    assert_same_bits(o, attend(*half, num_regions=(3, 3), topk=2))
    assert_same_bits(graph, route(*half[:2], num_regions=(3, 3), topk=2))


@pytest.mark.usefixtures("on_both")
def test_compiles():
    q, k, v = inputs()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    actual = compiled(q, k, v, num_regions=(3, 3), topk=2, mask_padding=False)
    compare(actual, attend(q, k, v, num_regions=(3, 3), topk=2, mask_padding=False), F64)


@pytest.mark.no_comparison
@pytest.mark.parametrize("function", (hw.bilevel_route, hw.bilevel_routing_attention))
def test_examples(function):
    check_example(function)


# The layer. Names and shapes of the official modules, of 32 channels, window 5 of the convolution.
LEGACY = {
    "lepe.weight": (32, 1, 5, 5), "lepe.bias": (32,),
    "qkv.qkv.weight": (64, 32), "qkv.qkv.bias": (64,),
    "wo.weight": (32, 32), "wo.bias": (32,),
}  # fmt: skip
NCHW = {
    "lepe.weight": (32, 1, 5, 5), "lepe.bias": (32,),
    "qkv_linear.weight": (96, 32, 1, 1), "qkv_linear.bias": (96,),
    "output_linear.weight": (32, 32, 1, 1), "output_linear.bias": (32,),
}  # fmt: skip


def layer(**options):
    made = nn.BiLevelRoutingAttention(32, 4, 3, topk=2, backend="reference", dtype=F64, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(2)
    return made


@pytest.mark.no_comparison
@pytest.mark.parametrize(
    "options, names",
    [({"qk_dim": 16, "side_dwconv": 5}, LEGACY), ({"layout": "NCHW", "side_dwconv": 5}, NCHW)],
    ids=("NHWC", "NCHW"),
)
def test_layer_has_the_official_names(options, names):
    actual = {n: tuple(p.shape) for n, p in layer(**options).state_dict().items()}
    assert actual == names and list(actual) == list(names)


def official_nchw(made, x):
    """The later official form, token by token: padding after the projection, not masked."""
    q, k, v = made.qkv_linear(x).unflatten(1, (3, 4, 8)).permute(1, 0, 4, 5, 2, 3).unbind(0)
    graph = pooled_scores(q, k, (3, 3)).sum(1).topk(2).indices
    o, _ = by_tokens(q, k, v, graph, (3, 3), mask_padding=False, scale=32**-0.5)
    o, v = (t.flatten(3).permute(0, 3, 1, 2) for t in (o, v))
    return made.output_linear(o + made.lepe(v))


@pytest.mark.parametrize("sizes", ((6, 6), (7, 8), (4, 5)), ids=str)
def test_layer_channels_first(sizes):
    made = layer(layout="NCHW", mask_padding=False)
    x = randn(2, 32, *sizes)
    with torch.no_grad():
        compare(made(x), official_nchw(made, x), F64)
    divides = sizes != (7, 8)  # 4 x 5: regions of one token
    masked = layer(layout="NCHW")
    masked.load_state_dict(made.state_dict())
    assert torch.allclose(masked(x), made(x)) == divides


@pytest.mark.parametrize("sizes", ((6, 9), (7, 8), (4, 5)), ids=str)
def test_layer_channels_last(sizes):
    """Padding before the projection: padded tokens have the bias as key and value."""
    made = layer(auto_pad=True)
    x = randn(2, *sizes, 32)
    padded = F.pad(x, (0, 0, 0, -sizes[1] % 3, 0, -sizes[0] % 3))
    q, k, v = made.qkv.qkv(padded).unflatten(-1, (3, 4, 8)).unbind(3)
    graph = pooled_scores(q, k, (3, 3)).sum(1).topk(2).indices
    with torch.no_grad():
        o, _ = by_tokens(q, k, v, graph, (3, 3), scale=32**-0.5)
        lepe = made.lepe(v.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        expected = made.wo(o.flatten(3) + lepe)[:, : sizes[0], : sizes[1]]
        compare(made(x), expected, F64)
    if any(n % 3 for n in sizes):
        with pytest.raises(ValueError, match=r"expected multiples of n_win = 3"):
            layer()(x)


def test_both_layouts_agree_where_regions_divide():
    last, first = layer(), layer(layout="NCHW", mask_padding=False)
    weights = last.state_dict()
    first.load_state_dict({
        "lepe.weight": weights["lepe.weight"], "lepe.bias": weights["lepe.bias"],
        "qkv_linear.weight": weights["qkv.qkv.weight"][..., None, None],
        "qkv_linear.bias": weights["qkv.qkv.bias"],
        "output_linear.weight": weights["wo.weight"][..., None, None],
        "output_linear.bias": weights["wo.bias"],
    })  # fmt: skip
    x = randn(2, 6, 9, 32)
    compare(first(x.permute(0, 3, 1, 2)), last(x).permute(0, 3, 1, 2), F64)


def test_layer_without_convolution_and_with_a_scale():
    made = layer(side_dwconv=0, qk_scale=0.0, qk_dim=8)
    assert "lepe.weight" not in made.state_dict()
    q, k, v = made.qkv.qkv(randn(1, 6, 6, 32)).split([8, 8, 32], -1)
    y = made(randn(1, 6, 6, 32))
    graph = route(*(t.unflatten(-1, (4, 2)) for t in (q, k)), num_regions=(3, 3), topk=2)
    means = v.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)).flatten(1, 2)  # [1, 9, 32]
    expected = made.wo(means[0, graph[0]].mean(1))  # scores of 0: the mean of the chosen regions
    compare(y[:, ::2, ::2].flatten(1, 2)[0], expected, F64)


@pytest.mark.no_comparison
def test_layer_refuses():
    for options, words in (
        ({"layout": "NHCW"}, "NHCW"),
        ({"qk_dim": 18}, "multiple of num_heads"),
        ({"side_dwconv": 4}, "odd"),
        ({"layout": "NCHW", "auto_pad": True}, "auto_pad"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(**options)
    for options, x in (({}, randn(6, 6, 32)), ({"layout": "NCHW"}, randn(1, 6, 6, 32))):
        with pytest.raises(ValueError, match=r"expected \["):
            layer(**options)(x)
    with pytest.raises(ValueError, match=r"num_regions is \(3, 3\).*size of the image"):
        layer(layout="NCHW")(randn(1, 32, 2, 6))


def zeros(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def graph_of(*shape, dtype=torch.int64, fill=0):
    return torch.full(shape, fill, dtype=dtype)


ROUTE = (
    Refused(TypeError, "q", "a list", q=[1.0]),
    Refused(ValueError, "q", "[6, 9, 4, 8]", "[B, Y, X, H, D]", q=zeros(6, 9, 4, 8)),
    Refused(TypeError, "q", "int64", q=zeros(1, 6, 9, 4, 8, dtype=torch.int64)),
    Refused(TypeError, "k", "float64", "autocast", k=zeros(1, 6, 9, 2, 8, dtype=F64)),
    Refused(RuntimeError, "k", "meta", k=zeros(1, 6, 9, 2, 8, device="meta")),
    Refused(ValueError, "k", "[2, 6, 9, 2, 8]", k=zeros(2, 6, 9, 2, 8)),
    Refused(ValueError, "k", "[1, 6, 9, 2, 9]", k=zeros(1, 6, 9, 2, 9)),
    Refused(ValueError, "heads", "4", "multiple of k's 3", k=zeros(1, 6, 9, 3, 8)),
    Refused(ValueError, "dimension D", q=zeros(1, 6, 9, 4, 0), k=zeros(1, 6, 9, 2, 0)),
    Refused(ValueError, "num_regions", "(7, 2)", "(6, 9)", "larger image", num_regions=(7, 2)),
    Refused(ValueError, "num_regions", "(2, 0)", num_regions=(2, 0)),
    Refused(TypeError, "num_regions", "3", "(rows, columns)", num_regions=3),
    Refused(TypeError, "num_regions", "(2.0, 2)", num_regions=(2.0, 2)),
    Refused(ValueError, "kv_num_regions", "(7, 1)", "image of k", kv_num_regions=(7, 1)),
    Refused(ValueError, "topk", "7", "from 1 to 6", "2 x 3 regions", topk=7),
    Refused(ValueError, "topk", "0", topk=0),
    Refused(TypeError, "topk", "1.5", topk=1.5),
    Refused(ValueError, "backend", "'gpu'", backend="gpu"),
    Refused(RuntimeError, "sm80", "emulate:sm80", backend="sm80"),
)
ATTEND = (
    Refused(ValueError, "v", "[1, 6, 9, 2]", v=zeros(1, 6, 9, 2)),
    Refused(ValueError, "v", "[1, 6, 8, 2, 5]", "[1, 6, 9, 2, 5]", v=zeros(1, 6, 8, 2, 5)),
    Refused(TypeError, "v", "float64", v=zeros(1, 6, 9, 2, 5, dtype=F64)),
    Refused(RuntimeError, "v", "meta", v=zeros(1, 6, 9, 2, 5, device="meta")),
    Refused(TypeError, "graph", "int32", "int64", graph=graph_of(1, 6, 2, dtype=torch.int32)),
    Refused(TypeError, "graph", "a list", graph=[[0]]),
    Refused(ValueError, "graph", "[1, 5, 2]", "R = 6", graph=graph_of(1, 5, 2)),
    Refused(ValueError, "graph", "[1, 2, 6, 2]", "H = 4", graph=graph_of(1, 2, 6, 2)),
    Refused(ValueError, "graph", "[6, 2]", graph=graph_of(6, 2)),
    Refused(ValueError, "graph", "from 6 to 6", "0 to 5", graph=graph_of(1, 6, 2, fill=6)),
    Refused(ValueError, "graph", "from -1", graph=graph_of(1, 6, 2, fill=-1)),
    Refused(RuntimeError, "graph", "meta", graph=graph_of(1, 6, 2).to("meta")),
    Refused(ValueError, "scale", "nan", "finite", scale=float("nan")),
    Refused(TypeError, "scale", "float32", scale=torch.ones(())),
    Refused(TypeError, "mask_padding", "None", mask_padding=None),
    Refused(TypeError, "return_aux", "a bool", "Aux", return_aux=True),
    Refused(NotImplementedError, "mass", return_aux=hw.Aux(mass=torch.tensor([0]))),
)


def good():
    return {"q": zeros(1, 6, 9, 4, 8), "k": zeros(1, 6, 9, 2, 8), "num_regions": (2, 3), "topk": 2}


ROUTE_ALONE = (
    Refused(TypeError, "per_head", "2", per_head=2),
    Refused(ValueError, "num_regions", "image of k", k=zeros(1, 1, 8, 2, 8)),
)


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", ROUTE + ROUTE_ALONE, ids=repr)
def test_route_refuses(case, monkeypatch):
    allocates_nothing(monkeypatch)
    case.check(lambda: hw.bilevel_route(**(good() | case.arguments)))


@pytest.mark.no_comparison
@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("case", ROUTE + ATTEND, ids=repr)
def test_attention_refuses(case, backend, monkeypatch):
    arguments = good() | {"v": zeros(1, 6, 9, 2, 5), "backend": backend} | case.arguments
    allocates_nothing(monkeypatch)
    case.check(lambda: hw.bilevel_routing_attention(**arguments))
