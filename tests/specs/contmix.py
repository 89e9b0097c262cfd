# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.contmix. Sizes: B, Y, X, G groups, A centres, D; the two windows."""

from __future__ import annotations

import torch

import headworks as hw
from headworks.testing import EVERY_DTYPE, Case, Spec

from .na2d_av import kernel_of
from .pairs import pairwise

NAMES = ("affinity", "weight", "bias", "small_rpb", "rpb", "v")


def case(
    Y=9, X=8, K=5, S=3, G=2, A=10, D=8, B=2, *, bias=True, rpb=True, small_rpb=True, spread=1.0,
    label="",
):  # fmt: skip
    """Scores are of size `spread`."""
    sizes = {"B": B, "Y": Y, "X": X, "G": G, "A": A, "D": D, "bias": bias, "rpb": rpb,
             "small_rpb": small_rpb, "spread": spread, "shared": True}  # fmt: skip
    windows = ["x".join(map(str, kernel_of(k))) for k in (S, K)]
    words = [f"{Y}x{X}", f"S{windows[0]}", f"K{windows[1]}", f"G{G}", f"A{A}", f"D{D}", f"B{B}"]
    words += [f"no {n}" for n in ("bias", "rpb", "small_rpb") if not sizes[n]]
    words += [f"spread{spread:g}"] if spread != 1.0 else []
    words += [label] if label else []
    # Sums over all tokens, of numbers that cancel.
    return Case("-".join(words), sizes, {"kernel_size": K, "small_kernel_size": S}, 8.0)


def make(case, dtype, device="cpu", seed=0):
    """affinity weight v, and bias, small_rpb, rpb as the case has them."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)
    small, large = (kernel_of(case.options[k]) for k in ("small_kernel_size", "kernel_size"))
    taps = small[0] * small[1] + large[0] * large[1]

    def draw(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(device, dtype)

    image = (n["B"], n["Y"], n["X"])
    tensors = {
        "affinity": draw(*image, n["G"], n["A"]),
        "weight": n["spread"] * draw(taps, n["A"]) / n["A"] ** 0.5,
    }
    if n["bias"]:
        tensors["bias"] = draw(taps)
    for name, (height, width) in (("small_rpb", small), ("rpb", large)):
        if n[name]:
            tensors[name] = draw(n["G"], 2 * height - 1, 2 * width - 1)
    tensors["v"] = draw(*image, 2 * n["G"], n["D"])
    return tensors


def run(tensors, case, backend):
    given = {"bias": None, **tensors}
    return {"o": hw.contmix(**given, backend=backend, **case.options)}


def operators(tensors, case):
    given = [tensors.get(n) for n in NAMES]
    kernels = (*kernel_of(case.options["small_kernel_size"]),
               *kernel_of(case.options["kernel_size"]))  # fmt: skip
    forward = torch.ops.headworks.contmix_fwd.default
    backward = torch.ops.headworks.contmix_bwd.default
    wanted = [x is not None for x in given]
    d_o = torch.randn_like(tensors["v"])
    return [
        (forward, (*given, *kernels, "auto")),
        (backward, (*given, d_o, *kernels, *wanted, "auto")),
    ]


CASES = (
    case(),
    *(case(Y=y, X=x, K=k, S=s) for y, x, k, s in ((7, 7, 7, 5), (7, 9, 7, 7), (1, 1, 1, 1))),
    case(Y=13, X=14, K=13, S=5, G=4, A=49, D=16, B=1),
    case(Y=1, X=20, K=(1, 7), S=(1, 3)),
    case(Y=12, X=5, K=(5, 3), S=(1, 5)),
    *(case(D=d) for d in (1, 14, 33, 64, 70)),
    *(case(A=a) for a in (1, 15, 16, 64)),
    *(case(**{n: False}) for n in ("bias", "rpb", "small_rpb")),
    case(bias=False, rpb=False, small_rpb=False),
    case(spread=30.0),
    case(G=1, B=1, K=3, S=3),
    *(case(**{n: 0}) for n in ("B", "G", "D", "Y", "X")),
)

EMULATOR_CASES = (
    case(Y=6, X=7, G=1, A=5, D=5, B=1),
    case(Y=5, X=5, K=5, S=1, G=2, A=3, D=40, B=1, bias=False),
    case(Y=1, X=9, K=(1, 5), S=(1, 3), A=4, D=16, B=1, small_rpb=False),
    case(Y=1, X=1, K=1, S=1, G=1, A=1, D=1, B=1),
    case(Y=5, X=6, K=5, S=3, G=2, A=70, D=6, B=2),
    case(Y=5, X=6, K=3, S=3, G=3, A=6, D=70, B=2, rpb=False),
    case(Y=5, X=5, K=3, S=3, G=1, A=6, D=6, B=1, spread=30.0),
    # Parts of the backward pass: groups of a batch entry, batch entries; two slices of tokens.
    case(Y=5, X=5, K=3, S=1, G=9, A=3, D=2, B=1),
    case(Y=5, X=5, K=3, S=1, G=1, A=3, D=2, B=9),
    case(Y=12, X=13, K=3, S=1, G=2, A=3, D=2, B=1),
    # Weights of which fewer than 16 tokens fit into shared memory.
    case(Y=1, X=611, K=(1, 609), S=1, G=1, A=1, D=1, B=1, rpb=False),
    *(
        case(label="pairs", **choice)
        for choice in pairwise(
            Y=(5, 7), X=(5, 6), K=(3, 5, (5, 1)), S=(1, 3), G=(1, 2), A=(2, 9), D=(3, 8, 33),
            B=(1, 3), bias=(False, True), rpb=(False, True), small_rpb=(False, True),
        )
    ),
)  # fmt: skip

BENCHMARK_CASES = (
    *(case(Y=n, X=n, K=k, S=5, G=g, A=49, D=16, B=4) for n, k, g in ((14, 13, 8), (28, 13, 8))),
)

SPEC = Spec(
    name="contmix",
    function=hw.contmix,
    make=make,
    run=run,
    differentiable=NAMES,
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=(
        case(B=3, D=24),
        case(Y=17, X=6, K=(5, 3), G=3, A=4, D=5, bias=False, small_rpb=False),
    ),
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE},
    operators=operators,
)
