# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.bilevel_routing_attention, and the inputs of hw.bilevel_route.

Sizes: B, Y, X, Yk, Xk, Hq, H, D, Dv; regions of q and of k; the sort of graph.
"""

from __future__ import annotations

import importlib

import torch

import headworks as hw
from headworks.ops.routing import _native as native
from headworks.reference.bilevel_routing import grid_of
from headworks.testing import EVERY_DTYPE, HALF, Case, Spec

from .pairs import pairwise
from .routing import limit, operators_of

STATISTICS = ("lse", "entropy", "p_max", "sq_norm")

# The function shadows its module in the package.
module = importlib.import_module("headworks.ops.routing.bilevel_routing")


def case(
    Y=14, X=14, regions=(7, 7), topk=4, D=16, Dv=24, B=1, H=2, Hq=None, *, Yk=None, Xk=None,
    kv_regions=None, graph=None, mask=True, scale=None, aux=(), spread=1.0, label="",
):  # fmt: skip
    """`graph`: None (routed), or one that is given: shared, head (one each), popular (all choose
    the same regions), twice (a region may be listed more than once), common (of each head, those of
    all batch entries are one in memory)."""
    sizes = {"B": B, "Y": Y, "X": X, "Yk": Y if Yk is None else Yk, "Xk": X if Xk is None else Xk,
             "Hq": Hq or H, "H": H, "D": D, "Dv": Dv, "regions": regions,
             "kv_regions": kv_regions or regions, "graph": graph, "topk": topk, "aux": aux,
             "spread": spread}  # fmt: skip
    options = {"num_regions": regions, "mask_padding": mask}
    options |= {"topk": topk} if graph is None else {}
    options |= {} if kv_regions is None else {"kv_num_regions": kv_regions}
    options |= {} if scale is None else {"scale": scale}
    words = [f"{Y}x{X}", f"R{regions[0]}x{regions[1]}", f"k{topk}", f"D{D}:{Dv}", f"B{B}"]
    words += [f"H{Hq or H}:{H}"]
    words += [f"kv{sizes['Yk']}x{sizes['Xk']}"] if Yk or Xk else []
    words += [f"Rk{kv_regions[0]}x{kv_regions[1]}"] if kv_regions else []
    words += [graph] if graph else []
    words += [] if mask else ["zeros"]
    words += [f"scale{scale:g}"] if scale is not None else []
    words += ["aux" if len(aux) == len(STATISTICS) else "+".join(aux)] if aux else []
    words += [f"spread{spread:g}"] if spread != 1.0 else []
    words += [label] if label else []
    return Case("-".join(words), sizes, options)


def make(case, dtype, device="cpu", seed=0):
    """q k v, and the graph that the case has."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = draw(n["B"], n["Y"], n["X"], n["Hq"], n["D"])
    k = draw(n["B"], n["Yk"], n["Xk"], n["H"], n["D"])
    v = draw(n["B"], n["Yk"], n["Xk"], n["H"], n["Dv"])
    if n["spread"] != 1.0:  # few digits, so that large scores are exact in every dtype
        q, k = (n["spread"] * q).round(), (4 * k).round() / 4
    tensors = {name: x.to(device, dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    if n["graph"]:
        tensors["graph"] = _graph(n, q, k, generator).to(device)
    return tensors


def _graph(n, q, k, generator):
    own = grid_of(q, n["regions"]).regions
    others = grid_of(k, n["kv_regions"]).regions
    heads = (n["Hq"],) if n["graph"] == "head" else ()
    shape = (n["B"], *heads, own)
    if n["graph"] == "twice":
        return torch.randint(others, (*shape, n["topk"]), generator=generator)
    if n["graph"] == "popular":
        return torch.randperm(others, generator=generator)[: n["topk"]].expand(*shape, n["topk"])
    if n["graph"] == "common":
        graph = torch.rand(n["Hq"], own, others, generator=generator).argsort(-1)[..., : n["topk"]]
        return graph.expand(n["B"], *graph.shape)
    return torch.rand(*shape, others, generator=generator).argsort(-1)[..., : n["topk"]]


ROUTE_OPTIONS = ("num_regions", "kv_num_regions", "topk")


def run(tensors, case, backend):
    q, k, v = (tensors[n] for n in ("q", "k", "v"))
    asked = case.sizes["aux"]
    aux = hw.Aux(**{n: n in asked for n in STATISTICS}) if asked else None
    graph = tensors.get("graph")
    if graph is None and backend.endswith("sm80"):  # a quick build has no routing of its dtypes
        options = {n: x for n, x in case.options.items() if n in ROUTE_OPTIONS}
        graph = hw.bilevel_route(q.detach(), k.detach(), backend="reference", **options)
    result = hw.bilevel_routing_attention(
        q, k, v, graph=graph, return_aux=aux, backend=backend, **case.options
    )
    if not asked:
        return {"o": result}
    o, aux = result
    return {"o": o} | {n: x for n, x in aux._asdict().items() if x is not None}


def operators(tensors, case):
    """The torch operators with the arguments this case gives them, for opcheck."""
    q, k, v = (tensors[n] for n in ("q", "k", "v"))
    given, read_outs, _ = module._checked(
        q, k, v, graph=tensors.get("graph"), return_aux=hw.Aux(lse=True), backend="cpu",
        **case.options,
    )  # fmt: skip
    return operators_of(*native._bilevel_arguments(*given), read_outs)


CASES = (
    *(case(topk=t) for t in (1, 4, 16, 49)),
    *(
        case(Y=y, X=x, mask=m, aux=("lse",))
        for y, x in ((17, 25), (7, 13), (20, 8))
        for m in (True, False)
    ),
    *(case(Y=56, X=56, topk=1, H=h, D=32, Dv=32) for h in (1, 2)),
    case(Y=28, X=28, topk=4, D=32, Dv=32),
    *(case(Y=8, X=9, regions=r, topk=1) for r in ((1, 1), (8, 9), (1, 9), (3, 2))),
    case(Y=1, X=1, regions=(1, 1), topk=1),
    *(
        case(Y=9, X=10, regions=(3, 3), topk=3, D=d, Dv=dv)
        for d, dv in ((1, 1), (8, 0), (8, 40), (40, 64), (64, 100), (100, 128))
    ),
    *(
        case(Y=9, X=10, regions=(3, 3), topk=3, B=2, H=h, Hq=hq)
        for hq, h in ((4, 2), (6, 1), (3, 3))
    ),
    *(
        case(Y=12, X=12, regions=(4, 4), topk=5, B=2, graph=g)
        for g in ("shared", "head", "popular", "twice")
    ),
    *(
        case(Y=11, X=13, regions=(4, 4), topk=5, Hq=4, graph=g, mask=m, aux=("lse",))
        for g in ("head", "twice")
        for m in (True, False)
    ),
    case(Y=12, X=12, regions=(4, 4), topk=0, graph="shared", aux=STATISTICS),
    *(
        case(Y=12, X=14, regions=(3, 2), Yk=9, Xk=5, topk=3, graph=g, mask=m)
        for g in (None, "head")
        for m in (True, False)
    ),
    *(
        case(Y=12, X=12, regions=(3, 3), kv_regions=(5, 4), topk=7, graph=g, mask=False)
        for g in (None, "shared")
    ),
    *(case(B=b, H=h, aux=STATISTICS) for b, h in ((0, 2), (2, 0))),
    *(case(Y=9, X=10, regions=(3, 3), scale=s) for s in (1.0, -0.7, 0.0)),
    case(Y=9, X=10, regions=(4, 4), topk=5, mask=False, aux=STATISTICS),
    case(Y=9, X=10, regions=(4, 4), topk=5, aux=STATISTICS, spread=20.0, scale=0.25),
    case(Y=9, X=10, regions=(4, 4), topk=5, aux=STATISTICS, spread=20.0, scale=0.25, mask=False),
)

EMULATOR_CASES = (
    case(Y=9, X=10, regions=(4, 4), topk=5, B=1, Hq=4, D=16, Dv=16, mask=False, aux=STATISTICS),
    case(Y=14, X=14, topk=3, H=1, D=16, Dv=8, graph="popular", aux=("lse",)),
    case(Y=9, X=8, regions=(2, 3), Yk=7, Xk=5, topk=2, H=1, D=8, Dv=8, graph="head"),
    case(Y=6, X=6, regions=(3, 3), topk=9, H=1, D=32, Dv=32),
    case(Y=6, X=6, regions=(3, 3), topk=4, H=1, D=8, Dv=8, graph="twice"),
    case(Y=7, X=6, regions=(3, 2), topk=3, H=1, D=8, Dv=8, graph="head", mask=False),
    case(Y=6, X=6, regions=(3, 3), topk=0, H=1, D=8, Dv=8, graph="shared", aux=("lse",)),
    case(Y=6, X=4, regions=(3, 2), topk=2, B=3, H=2, D=8, Dv=8, graph="common"),
    case(Y=4, X=4, regions=(1, 1), kv_regions=(4, 4), topk=1, H=3, D=8, Dv=8, graph="head"),
    *(
        case(Y=4, X=4, regions=(2, 2), topk=2, H=1, D=8, Dv=8, graph="shared", aux=(a,))
        for a in STATISTICS[1:]
    ),
    *(
        case(Y=5, X=6, regions=(2, 3), topk=2, H=1, D=d, Dv=dv)
        for d, dv in ((1, 1), (40, 8), (8, 70))
    ),
    case(B=0, H=1, D=8, Dv=8),
    case(Y=16, X=16, regions=(2, 2), topk=2, H=1, D=32, Dv=32),
    # Widths of the tensor-core kernels with small, middle and large regions; columns of v in parts.
    *(
        case(Y=y, X=9, regions=(2, 1), topk=2, H=1, D=100, Dv=8, graph="twice", mask=m)
        for y, m in ((2, True), (8, True), (16, True), (8, False))
    ),
    *(case(Y=4, X=5, regions=(2, 2), topk=2, H=1, D=8, Dv=dv) for dv in (0, 150)),
    # More regions than the block that counts who lists them has threads.
    case(Y=2, X=2, Yk=15, Xk=18, regions=(2, 2), kv_regions=(15, 18), topk=9, H=1, D=4, Dv=4),
    *(
        case(B=2, Dv=8, label="pairs", **choice)
        for choice in pairwise(
            image=(
                {"Y": 6, "X": 8, "regions": (2, 2)},
                {"Y": 5, "X": 7, "regions": (2, 3)},
                {"Y": 6, "X": 7, "Yk": 7, "Xk": 5, "regions": (3, 2)},
                {"Y": 5, "X": 4, "regions": (2, 2), "kv_regions": (3, 2)},
            ),
            graph=(None, "shared", "head", "popular", "twice"),
            topk=(1, 3),
            mask=(True, False),
            heads=({"H": 1}, {"H": 2, "Hq": 4}, {"H": 1, "Hq": 3}),
            scale=(None, -0.7, 0.0),
            aux=((), *((a,) for a in STATISTICS), STATISTICS),
            D=(8, 40),
        )
    ),
)

SAMPLE_CASES = (
    case(Y=15, X=13, topk=6, B=3, H=1, Hq=2, D=24, Dv=20, mask=False, aux=STATISTICS),
    case(Y=12, X=14, regions=(3, 3), Yk=8, Xk=9, topk=4, B=2, H=2, Hq=4, graph="head"),
    case(Y=28, X=28, topk=4, B=2, graph="popular", aux=("lse",)),
)

# BiFormer-S at 224 pixels, stages 1 to 3. For 128 images the peers' backward pass fills gigabytes.
BENCHMARK_CASES = tuple(
    case(Y=side, X=side, topk=topk, B=b, H=h, D=32, Dv=32, label="gpu" if b > 4 else "")
    for b in (4, 128)
    for side, topk, h in ((56, 1, 2), (28, 4, 4), (14, 16, 8))
)

SPEC = Spec(
    name="bilevel_routing_attention",
    function=hw.bilevel_routing_attention,
    make=make,
    run=run,
    differentiable=("q", "k", "v"),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE, "sm80": HALF},
    operators=operators,
    limit=limit,
)
