# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.select_topk. Sizes: rows (a shape), N; the sort of scores."""

from __future__ import annotations

import torch

import headworks as hw
from headworks.testing import EVERY_DTYPE, Case, Spec

# One-hot rows are compared exactly in every dtype; above this size the indices themselves are.
ONE_HOT = 1 << 22


def case(N=100, k=10, rows=(2, 3), *, order=True, scores="normal"):
    """`scores`: normal, equal, few (four values), special (infinities, NaN, both zeros), powers (of
    two, and the numbers next to them: their keys differ in the last bit, or in single ones)."""
    sizes = {"B": rows[0] if rows else 1, "rows": rows, "N": N, "scores": scores}
    words = [f"N{N}", f"k{k}", "x".join(map(str, rows)) or "1", scores]
    words += [] if order else ["by_rank"]
    return Case("-".join(words), sizes, {"k": k, "keep_order": order})


def make(case, dtype, device="cpu", seed=0):
    """score."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)
    shape = (*n["rows"], n["N"])
    score = torch.randn(shape, generator=generator, dtype=torch.float64)
    if n["scores"] == "equal":
        score = torch.ones_like(score)
    elif n["scores"] == "few":
        score = score.mul(2).round().clamp(-2, 1)
    elif n["scores"] == "special":
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0], dtype=score.dtype)
        score = values[torch.randint(len(values), shape, generator=generator)]
    elif n["scores"] == "powers":
        return {"score": _powers(shape, dtype, generator).to(device)}
    return {"score": score.to(device, dtype)}


def _powers(shape, dtype, generator):
    """2^-14 to 2^13 and the next smaller numbers, with both signs, in any order."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    power = torch.ldexp(torch.ones(28, dtype=torch.float64), torch.arange(-14, 14)).to(dtype)
    values = torch.cat([power, (power.view(bits) - 1).view(dtype)])
    values = torch.cat([values, -values])
    order = torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1)
    return values[order % len(values)]


def one_hot(index, size):
    """float64, the last dimension wide enough for -1 to size - 1; others become rows of zeros."""
    if index.numel() * size > ONE_HOT:
        return index.double()
    return (index[..., None] == torch.arange(-1, size, device=index.device)).double()


def run(tensors, case, backend):
    score = tensors["score"]
    index = hw.select_topk(score, backend=backend, **case.options)
    return {"chosen": one_hot(index, score.shape[-1])}


def operators(tensors, case):
    """The torch operators with the arguments this case gives them, for opcheck."""
    rows = tensors["score"].flatten(0, -2) if tensors["score"].dim() > 1 else tensors["score"][None]
    arguments = (rows, case.options["keep_order"], case.options["k"], "auto")
    return [(torch.ops.headworks.select_topk.default, arguments)]


CASES = (
    *(case(N=n, k=k) for n, k in ((0, 0), (1, 0), (1, 1), (5, 5), (63, 7), (64, 64), (65, 1))),
    *(case(N=1000, k=k, order=o) for k in (1, 31, 500, 999, 1000) for o in (True, False)),
    *(
        case(N=300, k=70, scores=s, order=o)
        for s in ("equal", "few", "special")
        for o in (True, False)
    ),
    *(case(N=112, k=k, scores="powers", order=o) for k in (1, 28, 29, 84) for o in (True, False)),
    case(rows=()),
    case(rows=(0, 3)),
    case(rows=(2, 3, 4, 5), N=17, k=5),
    case(N=20000, k=600, rows=(1, 2)),
)

EMULATOR_CASES = (
    case(N=300, k=237, rows=(2, 2)),
    case(N=130, k=40, rows=(1, 2), scores="special"),
    case(N=130, k=40, rows=(1, 2), scores="few", order=False),
    *(
        case(N=n, k=k, rows=(1, 1))
        for n, k in ((0, 0), (1, 1), (63, 5), (64, 64), (65, 64), (65, 1))
    ),
    case(N=200, k=50, rows=(1, 1), scores="equal"),
    # Ranks among different scores; ties on both sides of a piece of 256; keys of single bits.
    case(N=300, k=290, rows=(1, 2), order=False),
    case(N=600, k=400, rows=(1, 1), scores="few"),
    *(case(N=112, k=k, rows=(1, 1), scores="powers", order=k == 28) for k in (28, 29)),
)

SAMPLE_CASES = (
    case(N=500, k=77, rows=(3, 2)),
    case(N=300, k=70, rows=(2, 2), scores="special", order=False),
)

BENCHMARK_CASES = (
    case(N=8192, k=512, rows=(8, 16)),
    case(N=32768, k=2048, rows=(8, 16)),
    case(N=49, k=16, rows=(64, 49), order=False),
)

SPEC = Spec(
    name="select_topk",
    function=hw.select_topk,
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
