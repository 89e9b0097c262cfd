# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.na2d_av. Sizes: B, Y, X, H, D; the window."""

from __future__ import annotations

import torch

import headworks as hw
from headworks.testing import EVERY_DTYPE, Case, Spec

from .pairs import pairwise


def case(Y=9, X=11, K=3, H=2, D=16, B=2, *, spread=1.0, label=""):
    """Random weights, of any sign, times `spread`."""
    sizes = {"B": B, "Y": Y, "X": X, "H": H, "D": D, "spread": spread}
    window = f"K{K}" if isinstance(K, int) else f"K{K[0]}x{K[1]}"
    words = [f"{Y}x{X}", window, f"H{H}", f"D{D}", f"B{B}"]
    words += [f"spread{spread:g}"] if spread != 1.0 else []
    words += [label] if label else []
    # Sums of K^2 products of size 1, more at a border in d_v.
    return Case("-".join(words), sizes, {"kernel_size": K}, 4.0)


def kernel_of(size):
    return (size, size) if isinstance(size, int) else size


def make(case, dtype, device="cpu", seed=0):
    """w v"""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)
    height, width = kernel_of(case.options["kernel_size"])
    image = (n["B"], n["Y"], n["X"], n["H"])

    def draw(last):
        return torch.randn((*image, last), generator=generator, dtype=torch.float64)

    w = n["spread"] * draw(height * width) / (height * width) ** 0.5
    return {"w": w.to(device, dtype), "v": draw(n["D"]).to(device, dtype)}


def run(tensors, case, backend):
    return {"o": hw.na2d_av(**tensors, backend=backend, **case.options)}


def operators(tensors, case):
    w, v = tensors["w"], tensors["v"]
    kernel = kernel_of(case.options["kernel_size"])
    forward = torch.ops.headworks.na2d_av_fwd.default
    backward = torch.ops.headworks.na2d_av_bwd.default
    d_o = torch.randn_like(v)
    return [
        (forward, (w, v, *kernel, "auto")),
        (backward, (w, v, d_o, *kernel, True, True, "auto")),
        (backward, (w, v, d_o, *kernel, False, True, "auto")),
    ]


CASES = (
    case(),
    *(
        case(Y=y, X=x, K=k)
        for y, x, k in ((7, 7, 7), (7, 8, 7), (14, 14, 13), (1, 1, 1), (5, 3, 3))
    ),
    *(case(Y=1, X=x, K=(1, k)) for x, k in ((5, 5), (20, 5), (33, 7))),
    case(Y=20, X=1, K=(5, 1)),
    case(Y=6, X=12, K=(3, 7)),
    case(Y=6, X=12, K=(1, 7)),
    *(case(D=d) for d in (1, 3, 15, 17, 32, 33, 64, 100, 130)),
    case(Y=28, X=28, K=7, H=4, D=32, B=1),
    case(Y=40, X=5, K=5, B=1, H=1),
    case(H=5, B=3, K=5),
    *(case(**{n: 0}) for n in ("B", "H", "D", "Y", "X")),
)

EMULATOR_CASES = (
    case(Y=6, X=7, K=3, D=5),
    case(Y=5, X=5, K=5, D=40, B=1),
    case(Y=1, X=9, K=(1, 5), H=3, D=16, B=1),
    case(Y=1, X=1, K=1, H=1, D=1, B=1),
    case(Y=7, X=4, K=(5, 1), H=1, D=70, B=1),
    case(Y=3, X=3, K=3, H=2, D=300, B=1),
    case(Y=6, X=7, K=3, D=4, spread=1e4),
    *(
        case(label="pairs", **choice)
        for choice in pairwise(
            Y=(5, 8), X=(5, 9), K=(1, 3, (5, 3), 5), H=(1, 3), D=(2, 8, 33, 64), B=(1, 2)
        )
    ),
)

BENCHMARK_CASES = (*(case(Y=n, X=n, K=k, H=8, D=32, B=4) for n, k in ((28, 7), (14, 13), (56, 7))),)

SPEC = Spec(
    name="na2d_av",
    function=hw.na2d_av,
    make=make,
    run=run,
    differentiable=("w", "v"),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=(case(B=3, D=24), case(Y=17, X=6, K=(5, 3), H=3, D=5)),
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE},
    operators=operators,
)
