# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.kmeans_route. Sizes: B, S, H, K, D.

The centroids are the same for all batch elements; the tensor has a batch dimension nevertheless,
[max(B, 1), H, K, D], so that tests that take batch elements apart can treat all tensors alike.
"""

from __future__ import annotations

import random

import torch

import headworks as hw
from headworks.testing import EVERY_DTYPE, Case, Spec

from .pairs import pairwise
from .select_topk import one_hot


def case(S=100, K=4, W=25, D=16, B=1, H=2, *, prefix=False, length=None, vectors="normal"):
    """`vectors`: normal, equal (all similarities tie), few (many ties), nan (some), edge (whether a
    token joins a prefix is decided by one more or less that outranks it, for S up to 1024)."""
    sizes = {"B": B, "S": S, "K": K, "D": D, "H": H, "vectors": vectors}
    options = {"window": W, "is_causal_prefix": prefix}
    options |= {} if length is None else {"length": length}
    words = [f"S{S}", f"K{K}", f"W{W}", f"D{D}", f"B{B}", f"H{H}"]
    words += ["prefix"] if prefix else []
    words += [f"of{length}"] if length is not None else []
    words += [vectors] if vectors != "normal" else []
    return Case("-".join(words), sizes, options)


def make(case, dtype, device="cpu", seed=0):
    """x centroids."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, mu = draw(n["B"], n["S"], n["H"], n["D"]), draw(n["H"], n["K"], n["D"])
    if n["vectors"] == "few":
        x, mu = x.round().clamp(-1, 1), mu.round().clamp(-1, 1)
    elif n["vectors"] == "equal":
        # sums of eighths are exact in any order: the reference has the ties too
        x, mu = torch.ones_like(x), mu.mul(8).round().div(8)
    elif n["vectors"] == "nan":
        x[:, ::3, :, -1] = torch.nan
    elif n["vectors"] == "edge":
        x, mu = torch.zeros_like(x), torch.zeros_like(mu)
        level = _levels(n["S"], case.options["window"], case.options["length"])[:, None]
        x[..., 0], x[..., 1] = level // 32, level % 32  # exact in every dtype
        mu[..., 0], mu[..., 1] = 32, 1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mu = mu.expand(max(n["B"], 1), -1, -1, -1).contiguous()
    return {"x": x.to(device, dtype), "centroids": mu.to(device, wide)}


def _levels(tokens, window, length):
    """Different for all tokens, [S]: as many outrank each as may if it joins, or one more."""
    generator, ranking = random.Random(0), []
    for t in range(tokens):
        quota = -(-(t + 1) * window // length)
        joins = generator.random() < 0.8 * window / length  # fewer than the window, to the last
        ranking.insert(min(quota - joins, t), t)
    levels = torch.empty(tokens, dtype=torch.int64)
    levels[torch.tensor(ranking)] = torch.arange(tokens - 1, -1, -1)
    return levels


def run(tensors, case, backend):
    x = tensors["x"]
    index = hw.kmeans_route(x, tensors["centroids"][0], backend=backend, **case.options)
    return {"members": one_hot(index, x.shape[1])}


def operators(tensors, case):
    """The torch operators with the arguments this case gives them, for opcheck."""
    x, options = tensors["x"], case.options
    length = options.get("length", x.shape[1]) if options["is_causal_prefix"] else None
    arguments = (x, tensors["centroids"][0], options["window"], length, "auto")
    return [(torch.ops.headworks.kmeans_route.default, arguments)]


CASES = (
    *(case(S=s, W=w) for s, w in ((0, 0), (1, 0), (1, 1), (5, 5), (63, 9), (64, 64), (65, 1))),
    *(case(S=200, K=k, W=w) for k, w in ((1, 200), (7, 30), (64, 3), (0, 5))),
    *(case(D=d, B=2) for d in (0, 1, 8, 40, 64, 129)),
    *(case(vectors=v, prefix=p) for v in ("equal", "few", "nan") for p in (True, False)),
    *(
        case(S=s, W=w, prefix=True, length=n)
        for s, w, n in ((100, 25, None), (100, 25, 120), (37, 30, 100), (1, 1, 1), (0, 3, 10))
    ),
    *(case(B=b, H=h, prefix=p) for b, h in ((0, 2), (2, 0), (3, 1)) for p in (True, False)),
    case(S=2000, K=8, W=250),
    case(S=2000, K=3, W=250, H=1, prefix=True, vectors="few"),
)

EMULATOR_CASES = (
    case(S=150, K=3, W=40, B=2),
    case(S=70, K=2, W=20, H=1, vectors="few"),
    case(S=530, K=2, W=150, H=1, D=4, prefix=True, vectors="few"),
    case(S=70, K=2, W=20, H=1, prefix=True, length=90),
    # Four tiles of 256 tokens, where one more or less that outranks a token decides.
    case(S=850, K=1, W=150, H=1, D=2, prefix=True, length=1000, vectors="edge"),
    # All join that come, and more are wanted.
    case(S=40, K=1, W=90, H=1, D=4, prefix=True, length=90),
    case(S=260, K=1, W=50, H=1, D=1, prefix=True, vectors="nan"),
    case(S=40, K=35, W=10, H=2, D=40),
    case(S=30, K=18, W=10, B=2, H=1, D=37),
    *(case(S=s, K=2, W=w, H=1, D=8) for s, w in ((1, 1), (64, 64), (65, 3))),
    case(S=40, K=2, W=10, H=1, vectors="nan"),
    *(
        case(prefix=choice["length"] is not None, **choice)
        for choice in pairwise(
            S=(40, 270),
            K=(1, 3, 18),
            W=(1, 11, 40),
            D=(4, 37),
            B=(1, 2),
            H=(1, 2),
            length=(None, 270, 300),
            vectors=("normal", "equal", "few", "nan"),
        )
    ),
)

SAMPLE_CASES = (
    case(S=300, K=5, W=60, B=3, D=24),
    case(S=100, K=4, W=25, B=2, prefix=True, length=130),
)

BENCHMARK_CASES = (
    case(S=8192, K=16, W=512, D=64, H=8),
    case(S=32768, K=32, W=1024, D=64, H=8),
)

SPEC = Spec(
    name="kmeans_route",
    function=hw.kmeans_route,
    make=make,
    run=run,
    differentiable=(),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE},
    operators=operators,
)
