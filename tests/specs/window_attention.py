# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.window_attention.

Sizes: B, Y, X, Hq, H, D, Dv; window, whether there is a table.
"""

from __future__ import annotations

import importlib

import torch

import headworks as hw
from headworks.ops.windows import _window_attention_native as native
from headworks.testing import EVERY_DTYPE, HALF, Case, Spec

from .pairs import pairwise
from .routing import limit

# The function shadows its module in the package.
module = importlib.import_module("headworks.ops.windows.window_attention")


def case(
    Y=14, X=14, window=(7, 7), D=16, Dv=24, B=1, H=2, Hq=None, *, table=True, scale=None,
    spread=1.0, label="",
):  # fmt: skip
    """`spread`: of the scores, in numbers that every dtype has."""
    sizes = {"B": B, "Y": Y, "X": X, "Hq": Hq or H, "H": H, "D": D, "Dv": Dv, "window": window,
             "table": table, "shared": table, "spread": spread}  # fmt: skip
    options = {"window": window} | ({} if scale is None else {"scale": scale})
    sides = window if isinstance(window, tuple) else (window, window)
    words = [f"{Y}x{X}", f"W{sides[0]}x{sides[1]}", f"D{D}:{Dv}", f"B{B}", f"H{Hq or H}:{H}"]
    words += [] if table else ["plain"]
    words += [f"scale{scale:g}"] if scale is not None else []
    words += [f"spread{spread:g}"] if spread != 1.0 else []
    words += [label] if label else []
    return Case("-".join(words), sizes, options)


def make(case, dtype, device="cpu", seed=0):
    """q k v, and the table that the case has."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    image = n["B"], n["Y"], n["X"]
    q, k = draw(*image, n["Hq"], n["D"]), draw(*image, n["H"], n["D"])
    v = draw(*image, n["H"], n["Dv"])
    if n["spread"] != 1.0:
        q, k = (n["spread"] * q).round(), (4 * k).round() / 4
    tensors = {"q": q, "k": k, "v": v}
    if n["table"]:
        height, width = sides(n["window"])
        tensors["bias_table"] = draw(n["Hq"], height * width)
    return {name: x.to(device, dtype) for name, x in tensors.items()}


def sides(window):
    return window if isinstance(window, tuple) else (window, window)


def run(tensors, case, backend):
    return {"o": hw.window_attention(**tensors, backend=backend, **case.options)}


def operators(tensors, case):
    """The torch operators with the arguments this case gives them, for opcheck."""
    q, k, v, table, window, scale, _ = module._checked(**tensors, **case.options)
    geometry = module._geometry(q, window, scale)
    q, k, v = module._flat(q, k, v)
    o, row = native.forward(q, k, table, v, geometry, True, "cpu")
    delta = torch.zeros_like(row[0])
    ops = torch.ops.headworks
    return [
        (ops.window_attention_fwd.default, (q, k, table, v, *geometry, True, "auto")),
        (
            ops.window_attention_bwd.default,
            (q, k, table, v, o, row, delta, *geometry, table is not None, "auto"),
        ),
    ]


CASES = (
    *(case(Y=y, X=x) for y, x in ((14, 14), (7, 7), (4, 4), (15, 20), (13, 6), (1, 1))),
    *(case(Y=12, X=10, window=w) for w in ((1, 10), (12, 1), (3, 5), (5, 4), 14)),
    case(Y=12, X=10, window=1, table=False),  # with one, its gradient is nothing but rounding
    *(case(Y=16, X=9, window=w, table=t) for w in (4, (8, 8), (10, 9)) for t in (True, False)),
    case(Y=28, X=28, window=14, H=1),
    case(Y=20, X=33, window=(20, 33), H=1),
    *(
        case(Y=9, X=10, window=4, D=d, Dv=dv)
        for d, dv in ((1, 1), (8, 0), (8, 40), (40, 64), (16, 112), (100, 128))
    ),
    *(case(Y=9, X=10, window=4, B=2, H=h, Hq=hq) for hq, h in ((4, 2), (6, 1), (3, 3))),
    *(
        case(B=b, Y=y, X=x, H=h)
        for b, y, x, h in ((0, 7, 7, 2), (1, 0, 7, 1), (1, 7, 0, 1), (2, 7, 7, 0))
    ),
    *(case(Y=9, X=10, window=4, scale=s, table=t) for s in (1.0, -0.7, 0.0) for t in (True, False)),
    *(case(Y=9, X=10, window=4, spread=20.0, scale=0.25, table=t) for t in (True, False)),
    case(B=5, Y=14, X=14, H=4, D=16, Dv=16),
)

EMULATOR_CASES = (
    case(Y=9, X=8, window=(4, 4), B=2, H=1, Hq=2, D=8, Dv=8),
    case(Y=5, X=6, window=(3, 4), H=1, D=16, Dv=24, table=False),
    case(Y=9, X=9, window=9, H=1, D=32, Dv=32),
    case(Y=12, X=12, window=12, H=1, D=8, Dv=8, table=False),
    case(Y=12, X=13, window=(12, 12), H=1, D=8, Dv=8),
    case(Y=4, X=4, window=7, H=2, D=8, Dv=8),
    case(Y=3, X=5, window=(1, 2), H=1, D=8, Dv=8),
    *(
        case(Y=5, X=6, window=(2, 3), H=1, D=d, Dv=dv)
        for d, dv in ((1, 1), (40, 8), (8, 70), (8, 0))
    ),
    *(case(Y=y, X=9, window=(y, 9), H=1, D=100, Dv=8, table=False) for y in (2, 8, 16)),
    case(B=0, H=1, D=8, Dv=8),
    # Of tensor cores: small windows of wide heads, middle ones of narrow heads, without a table.
    case(Y=2, X=4, window=(2, 4), H=1, D=100, Dv=8, table=False),
    case(Y=5, X=6, window=(5, 6), H=1, D=16, Dv=24, table=False),
    # More windows than parts of the gradient of the table.
    case(Y=12, X=13, window=(1, 2), H=3, Hq=9, D=8, Dv=8),
    *(
        case(B=3, Dv=8, label="pairs", **choice)
        for choice in pairwise(
            image=({"Y": 4, "X": 6}, {"Y": 5, "X": 7}, {"Y": 8, "X": 3}),
            window=((2, 3), (3, 2), (4, 4), (8, 1)),
            heads=({"H": 1}, {"H": 2, "Hq": 4}),
            table=(True, False),
            scale=(None, -0.7, 0.0),
            D=(8, 40),
        )
    ),
)

SAMPLE_CASES = (
    case(Y=15, X=13, window=(4, 6), B=3, H=1, Hq=2, D=24, Dv=20),
    case(Y=14, X=14, window=7, B=2, H=2, D=16, Dv=16, table=False),
)

# EfficientViT M0 and M5 at 224 pixels: the cores of their stages.
BENCHMARK_CASES = tuple(
    case(Y=side, X=side, window=7, B=64, H=h, D=16, Dv=dv)
    for side, h, dv in ((14, 4, 16), (14, 3, 64), (7, 4, 32), (7, 3, 96), (4, 4, 48))
)

SPEC = Spec(
    name="window_attention",
    function=hw.window_attention,
    make=make,
    run=run,
    differentiable=("q", "k", "v", "bias_table"),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE, "sm80": HALF},
    operators=operators,
    limit=limit,
)
