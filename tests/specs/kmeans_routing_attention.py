# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.kmeans_routing_attention. Sizes: B, Sq, Sk, Hq, H, K, Wq, Wk, D, Dv; the lists."""

from __future__ import annotations

import importlib

import torch

import headworks as hw
from headworks.ops.routing import _native as native
from headworks.testing import EVERY_DTYPE, HALF, Case, Spec

from .pairs import pairwise
from .routing import forward_of, limit, operators_of

# The function shadows its module in the package.
module = importlib.import_module("headworks.ops.routing.kmeans_routing")


def case(
    Sq=100, K=4, Wq=25, D=16, Dv=24, B=1, H=2, Hq=None, *, Sk=None, Wk=None, lists="sorted",
    causal=False, mask_self=False, eps=0.0, scale=None, spread=1.0, keys=None,
    slots=False, label="",
):  # fmt: skip
    """`lists`: sorted, shuffled, twice (drawn with replacement), holes (a third is -1), beyond (as
    holes; native calls are given the position behind the last token instead of -1), popular
    (the same tokens in all clusters), empty (all -1), all (every token, in one cluster W = S), gap
    (all but the first slot), ends (rows the first tokens and keys the last ones, in every second
    cluster the other way round), common (those of all batch entries are one in memory). Keys have
    lists of their own where Wk is given or Sk is another length; or `keys`: rows (k_index is
    q_index), first (it is that of the first batch entry), head (that of the first head). `slots`: w
    and the row statistic of slots without token are outputs too."""
    own = keys is None and (Wk is not None or Sk is not None)
    sizes = {"B": B, "Sq": Sq, "Sk": Sq if Sk is None else Sk, "Hq": Hq or H, "H": H, "K": K,
             "Wq": Wq, "Wk": Wq if Wk is None else Wk, "D": D, "Dv": Dv, "lists": lists,
             "own": own, "keys": keys, "slots": slots, "spread": spread}  # fmt: skip
    options = {"is_causal": causal, "mask_self": mask_self, "mean_eps": eps}
    options |= {} if scale is None else {"scale": scale}
    words = [f"S{Sq}:{sizes['Sk']}", f"K{K}", f"W{Wq}:{sizes['Wk']}", f"D{D}:{Dv}", f"B{B}"]
    words += [f"H{Hq or H}:{H}", lists]
    words += ["causal"] if causal else []
    words += ["mask_self"] if mask_self else []
    words += [f"eps{eps:g}"] if eps else []
    words += [f"scale{scale:g}"] if scale is not None else []
    words += [f"spread{spread:g}"] if spread != 1.0 else []
    words += [f"keys_{keys}"] if keys else []
    words += ["slots"] if slots else []
    words += [label] if label else []
    return Case("-".join(words), sizes, options)


def make(case, dtype, device="cpu", seed=0):
    """q k v q_index, and k_index where keys have lists of their own."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = draw(n["B"], n["Sq"], n["Hq"], n["D"]), draw(n["B"], n["Sk"], n["H"], n["D"])
    if n["spread"] != 1.0:  # few digits, so that large scores are exact in every dtype
        q, k = (n["spread"] * q).round(), (4 * k).round() / 4
    tensors = {"q": q.to(device, dtype), "k": k.to(device, dtype)}
    tensors["v"] = draw(n["B"], n["Sk"], n["H"], n["Dv"]).to(device, dtype)
    tensors["q_index"] = _lists(n, n["Sq"], n["Wq"], generator).to(device)
    if n["own"]:
        tensors["k_index"] = _lists(n, n["Sk"], n["Wk"], generator, keys=True).to(device)
    return tensors


def _lists(n, tokens, window, generator, keys=False):
    shape = (n["B"], n["Hq"], n["K"])
    if n["lists"] == "empty":
        return torch.full((*shape, window), -1)
    if n["lists"] == "twice":
        return torch.randint(tokens, (*shape, window), generator=generator)
    if n["lists"] == "ends":
        last = (torch.arange(n["K"]) + keys) % 2
        index = torch.arange(window) + (tokens - window) * last[:, None]
        return index.expand(*shape, -1).clone()
    if n["lists"] == "popular":
        return torch.randperm(tokens, generator=generator)[:window].expand(*shape, -1).clone()
    if n["lists"] == "common":
        index = torch.rand(*shape[1:], tokens, generator=generator).argsort(-1)[..., :window]
        return index.expand(*shape, -1)
    index = torch.rand(*shape, tokens, generator=generator).argsort(-1)[..., :window]
    if n["lists"] in ("sorted", "all"):
        return index.sort(-1).values
    if n["lists"] == "gap":
        index[..., 0] = -1
    if n["lists"] in ("holes", "beyond"):
        hole = torch.rand(index.shape, generator=generator) < 1 / 3
        return torch.where(hole, -1, index)
    return index


def run(tensors, case, backend):
    index, keys = tensors["q_index"], case.sizes["keys"]
    if keys:  # one memory
        of = {"rows": index, "first": index[:1], "head": index[:, :1]}[keys]
        tensors = tensors | {"k_index": of.expand_as(index)}
    if case.sizes["lists"] == "beyond" and backend != "reference":
        (q, k, v, *lists), _ = module._checked(**tensors, backend=backend, **case.options)
        for i, x in enumerate((q, k)):
            lists[i] = torch.where(lists[i] < 0, x.shape[1], lists[i])
        return {"o": native.kmeans_routing_attention(q, k, v, *lists, backend)}
    made = {"o": hw.kmeans_routing_attention(**tensors, backend=backend, **case.options)}
    return made | _empty_slots(tensors, case, backend) if case.sizes["slots"] else made


def _empty_slots(tensors, case, backend):
    """Of slots without token w, which is 0, and where the statistic is +inf: everywhere on cpu."""
    index, v = tensors["q_index"], tensors["v"]
    empty = index < 0  # [B, Hq, K, Wq]
    places = empty.permute(0, 2, 3, 1).flatten(1, 2)[..., None]  # [B, K Wq, Hq, 1]
    if backend == "reference":
        return {"w": v.new_zeros((*places.shape[:3], v.shape[3])), "row": empty.to(v.dtype)}
    given, _ = module._checked(**tensors, backend=backend, **case.options)
    forward, arguments = forward_of(*native._kmeans_arguments(*given), backend=backend)
    with torch.no_grad():
        _, w, row, *_ = forward(*arguments)
    infinite = row[0].view(index.shape) == torch.inf if backend == "cpu" else empty
    return {"w": torch.where(places, w, 0), "row": (infinite & empty).to(v.dtype)}


def operators(tensors, case):
    """The torch operators with the arguments this case gives them, for opcheck."""
    given, _ = module._checked(**tensors, backend="cpu", **case.options)
    return operators_of(*native._kmeans_arguments(*given))


CASES = (
    *(
        case(lists=s, causal=c)
        for s in ("sorted", "shuffled", "twice", "holes", "popular", "empty")
        for c in (True, False)
    ),
    *(case(Sq=s, K=1, Wq=s, lists="all", causal=c) for s in (1, 65, 130) for c in (True, False)),
    *(
        case(Sq=s, K=k, Wq=w, causal=True)
        for s, k, w in (
            (5, 1, 1),
            (64, 3, 63),
            (64, 3, 64),
            (130, 2, 65),
            (0, 3, 0),
            (9, 0, 3),
            (9, 3, 0),
        )
    ),
    *(case(mask_self=True, causal=c, lists="sorted") for c in (True, False)),
    case(mask_self=True, lists="twice", Wq=70),
    case(Sq=30, K=9, Wq=1, mask_self=True, causal=True, label="alone"),
    *(case(eps=e, causal=True) for e in (1e-5, 1e-2)),
    *(
        case(Sq=sq, Sk=sk, Wk=wk, causal=c, mask_self=m)
        for sq, sk, wk in ((40, 65, 20), (65, 40, 33), (1, 50, 30), (30, 0, 0))
        for c, m in ((True, False), (False, True))
    ),
    *(case(D=d, Dv=dv, causal=True) for d, dv in ((1, 1), (8, 0), (40, 64), (64, 100), (129, 128))),
    *(case(B=2, H=h, Hq=hq, causal=True) for hq, h in ((4, 2), (6, 1), (3, 3))),
    *(case(B=b, H=h) for b, h in ((0, 2), (2, 0))),
    *(case(scale=s) for s in (1.0, -0.7, 0.0)),
    *(case(spread=20.0, mask_self=m, causal=True) for m in (True, False)),
    case(Sq=500, K=8, Wq=150, B=2, causal=True, label="overlap"),
    case(Sq=90, K=2, Wq=4, Wk=80, mask_self=True, label="few rows"),
    case(Sq=20, K=3, Wq=8, B=8, H=1, D=8, Dv=8, label="parts"),  # that are no tasks
)

EMULATOR_CASES = (
    case(Sq=80, K=2, Wq=40, H=1, Hq=2, D=16, Dv=16, lists="holes", causal=True, mask_self=True),
    case(Sq=70, K=1, Wq=66, H=1, D=16, Dv=8, causal=True, eps=1e-2),
    case(Sq=40, Sk=60, K=2, Wq=20, Wk=70, H=1, D=8, Dv=8, lists="twice"),
    *(case(Sq=s, K=1, Wq=s, lists="all", H=1, D=8, Dv=8, causal=True) for s in (1, 63, 64, 65)),
    case(Sq=30, K=5, Wq=6, H=1, D=8, Dv=8, lists="empty"),
    case(Sq=20, K=1, Wq=16, H=1, D=100, Dv=8, lists="gap"),
    # One score is what stands for that of a token with itself.
    case(Sq=3, K=1, Wq=3, H=1, D=1, lists="all", mask_self=True, spread=16.2, scale=2e3),
    case(Sq=127, K=2, Wq=64, Wk=64, H=1, D=8, Dv=8, lists="ends", mask_self=True),
    case(Sq=20, K=3, Wq=10, B=2, H=1, Hq=2, D=8, Dv=12, lists="holes", slots=True),
    *(case(Sq=20, Sk=sk, K=3, Wq=10, H=1, D=8, Dv=8, lists="beyond") for sk in (None, 15)),
    case(Sq=40, K=2, Wq=32, H=1, D=8, Dv=8, lists="shuffled", causal=True),
    case(Sq=20, K=1, Wq=12, H=8, D=5, Dv=5, lists="twice"),
    *(case(Sq=30, K=2, Wq=15, H=1, D=d, Dv=dv) for d, dv in ((1, 1), (40, 8), (8, 70), (64, 64))),
    case(Sq=0, K=2, Wq=0, H=1, D=8, Dv=8),
    # Widths of the tensor-core kernels with short, middle and long lists; columns of v in parts.
    *(
        case(Sq=s, K=1, Wq=w, H=1, D=100, Dv=8, lists="shuffled", label="wide")
        for s, w in ((20, 12), (40, 33), (90, 80))
    ),
    *(case(Sq=20, K=1, Wq=12, H=1, D=8, Dv=dv) for dv in (0, 150)),
    # Lists of rows and of keys that have the same memory, or sizes, or batch entries in common.
    case(Sq=20, Sk=20, K=2, Wq=10, H=1, D=8, Dv=8, lists="shuffled"),
    case(Sq=20, Sk=25, K=2, Wq=10, H=1, D=8, Dv=8, lists="twice", keys="rows"),
    case(Sq=20, K=2, Wq=10, B=2, H=1, D=8, Dv=8, lists="shuffled", keys="first"),
    case(Sq=20, K=2, Wq=10, B=3, H=1, Hq=2, D=8, Dv=8, lists="common"),
    case(Sq=20, K=2, Wq=10, B=3, H=1, Hq=2, D=8, Dv=8, lists="common", keys="head"),
    case(Sq=2, K=1, Wq=1, H=1, Hq=2, D=8, Dv=8, lists="shuffled", keys="head"),
    *(case(Sq=2, K=1, Wq=1, B=9, H=h, D=8, Dv=8, lists="shuffled") for h in (1, 3)),
    # More tokens, and more slots, than the block that sorts them has threads.
    case(Sq=600, K=9, Wq=62, H=1, D=4, Dv=4, lists="twice", causal=True),
    *(
        case(Sq=37, K=2, B=2, Dv=8, label="pairs", **choice)
        for choice in pairwise(
            lists=("sorted", "twice", "holes", "popular"),
            lengths=({"Wq": 9}, {"Wq": 37}, {"Wq": 20, "Sk": 50, "Wk": 23}),
            heads=({"H": 1}, {"H": 2, "Hq": 4}, {"H": 1, "Hq": 3}),
            scale=(None, -0.7, 0.0),
            causal=(False, True),
            mask_self=(False, True),
            eps=(0.0, 1e-2),
            D=(8, 40),
        )
    ),
)

SAMPLE_CASES = (
    case(
        Sq=150,
        K=5,
        Wq=40,
        B=3,
        H=1,
        Hq=2,
        D=24,
        Dv=20,
        lists="holes",
        causal=True,
        mask_self=True,
        eps=1e-2,
    ),
    case(Sq=70, Sk=90, K=3, Wq=30, Wk=50, B=2, H=2, Hq=4, lists="twice", causal=True),
    case(Sq=300, K=4, Wq=100, B=2, lists="popular"),
)

BENCHMARK_CASES = (
    case(Sq=8192, K=16, Wq=512, H=8, D=64, Dv=64, causal=True),
    case(Sq=32768, K=32, Wq=1024, H=8, D=64, Dv=64, causal=True),
    *(
        case(Sq=s * s, K=s, Wq=s, H=8, D=64, Dv=64, causal=True, label="growth")
        for s in (32, 48, 64, 96)
    ),
)

SPEC = Spec(
    name="kmeans_routing_attention",
    function=hw.kmeans_routing_attention,
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
