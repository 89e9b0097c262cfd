# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.cascaded_group_attention. Sizes: B, Y, X, H heads, d channels of a group, K."""

from __future__ import annotations

import torch

import headworks as hw
from headworks.ops.windows import _cascaded_group_attention_native as native
from headworks.ops.windows import cascaded_group_attention as module
from headworks.testing import EVERY_DTYPE, HALF, Case, Spec

from .pairs import pairwise

FIELDS = hw.CascadeWeights._fields


def case(Y=14, X=14, window=7, *, B=2, H=2, d=16, K=16, R=None, kernels=(5, 3), spread=1.0):
    """R: side of the bias table, by default that of the window. `kernels` are those of the heads,
    the last one of all that follow. `spread` multiplies q's convolution and with it the scores."""
    side = R or window or max(Y, X, 1)
    kernels = tuple(kernels[min(i, len(kernels) - 1)] for i in range(H))
    sizes = {"B": B, "Y": Y, "X": X, "H": H, "d": d, "K": K, "R": side, "kernels": kernels,
             "spread": spread}  # fmt: skip
    words = [f"Y{Y}", f"X{X}", f"window{window}", f"B{B}", f"H{H}", f"d{d}", f"K{K}"]
    words += ["kernels" + "".join(map(str, kernels))]
    words += [f"R{side}"] if R else []
    words += [f"spread{spread:g}"] if spread != 1.0 else []
    return Case("-".join(words), sizes, {"window": window})


def make(case, dtype, device="cpu", seed=0):
    """x, and the weights, which have a leading dimension of the batch as x has: generic tests take
    single entries of it."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads, d, k = n["H"], n["d"], n["K"]
    channels, columns = heads * d, 2 * k + d
    weights = hw.CascadeWeights.of_heads(
        [(draw(columns, d) / d**0.5, draw(columns) / 2) for _ in range(heads)],
        [(n["spread"] * draw(k, 1, s, s) / s, n["spread"] * draw(k) / 2) for s in n["kernels"]],
        draw(heads, n["R"] ** 2),
        (draw(channels, channels) / channels**0.5, draw(channels) / 2),
    )
    tensors = {"x": draw(n["B"], n["Y"], n["X"], channels).to(device, dtype)}
    for name, w in zip(FIELDS, weights, strict=True):
        repeated = w.to(device, dtype).expand(max(n["B"], 1), *w.shape)
        tensors[name] = repeated.contiguous()
    return tensors


def weights_of(tensors):
    return hw.CascadeWeights(*(tensors[name][0] for name in FIELDS))


def run(tensors, case, backend):
    y = hw.cascaded_group_attention(
        tensors["x"], weights_of(tensors), backend=backend, **case.options
    )
    return {"y": y}


def operators(tensors, case):
    """The torch operator with the arguments this case gives it, for opcheck."""
    x, weights, window, _ = module._checked(
        tensors["x"], weights_of(tensors), case.options["window"], "cpu"
    )
    return [(native.operator, (x, *weights, *window, "auto"))]


def limit(backend, case):
    """What the tensor-core kernel does not take."""
    n = case.sizes
    if not backend.endswith("sm80") or n["B"] * n["Y"] * n["X"] == 0:
        return ""
    window = case.options["window"]
    whole = window is None or (n["Y"] <= window and n["X"] <= window)
    tokens = n["Y"] * n["X"] if whole else window**2
    if n["K"] != 16:
        return f"K = 16 only, not {n['K']}"
    return f"up to 64 tokens, not {tokens}" if tokens > 64 else ""


# (H, d, kernels) of the models' stages: M0 to M5.
STAGES = (
    *((4, d, (5, 5, 5, 5)) for d in (16, 32, 48)),
    (2, 64, (7, 5)),
    *((3, d, (7, 5, 3)) for d in (48, 64, 80, 96)),
    (2, 112, (7, 5)),
    (4, 96, (7, 5, 3, 3)),
)

CASES = (
    *(case(H=h, d=d, kernels=k) for h, d, k in STAGES),
    *(case(Y=s, X=s, window=None, H=4, d=48, kernels=(5,)) for s in (1, 4, 7, 14)),
    case(Y=4, X=4, window=7, R=7),
    case(Y=4, X=4, window=7, R=4),
    # Padding below, beyond, both; an image narrower than a window; of one pixel more than one.
    *(case(Y=y, X=x) for y, x in ((10, 14), (14, 10), (15, 15), (5, 16), (16, 5), (8, 8), (1, 9))),
    case(Y=5, X=3, window=None, R=7),
    case(Y=28, X=21, window=14, H=2, d=32),
    case(Y=9, X=9, window=1, R=1),
    case(Y=6, X=6, window=3, kernels=(7, 1)),
    # Widths that are no whole vectors.
    *(case(H=h, d=d, K=k) for h, d, k in ((3, 7, 16), (2, 20, 5), (1, 33, 1), (5, 1, 24))),
    case(H=1, d=8, K=8, kernels=(9,)),
    case(spread=6.0),
    case(B=0),
    case(Y=0, X=5),
    case(B=5, Y=20, X=33),
)

EMULATOR_CASES = (
    case(Y=8, X=9, window=7, B=1, H=3, d=8, kernels=(5, 3, 7)),
    case(Y=4, X=4, window=None, B=2, H=2, d=16, kernels=(3, 5)),
    case(Y=7, X=5, window=4, B=2, H=2, d=12, K=16, kernels=(3,)),
    case(Y=8, X=9, window=7, B=1, H=3, d=8, K=4, kernels=(5, 3, 7)),
    case(Y=1, X=1, window=None, B=1, H=1, d=1, K=1, kernels=(1,)),
    case(Y=3, X=5, window=None, B=1, H=2, d=20, K=8, R=7),
    case(Y=9, X=9, window=9, B=1, H=2, d=24, K=16),
    case(Y=5, X=5, window=4, B=1, H=2, d=8, K=8, spread=30.0),
    case(B=0, H=1, d=8),
    case(Y=5, X=5, window=5, B=1, H=1, d=8, kernels=(3,)),
    # Tensor cores: every width, and several windows a block, the last block in part.
    *(
        case(Y=y, X=x, window=w, B=3, H=2, d=d, kernels=k)
        for (y, x, w), d, k in (
            ((7, 7, 7), 64, (5, 7)),
            ((4, 4, None), 96, (3, 5)),
            ((8, 8, None), 112, (3,)),
            ((5, 7, 3), 40, (5, 3)),
            ((2, 3, None), 8, (3,)),
        )
    ),
    # More than a block may have in shared memory: blocks that take several windows each.
    case(Y=15, X=42, window=14, B=3, H=1, d=64, K=16, kernels=(3,)),
    *(
        case(**choice)
        for choice in pairwise(
            image=(
                {"Y": 4, "X": 4, "window": None},
                {"Y": 6, "X": 5, "window": 4},
                {"Y": 3, "X": 7, "window": 3},
            ),
            B=(1, 2),
            H=(1, 2, 3),
            d=(4, 16, 21),
            K=(4, 16, 17),
            kernels=((3, 1), (5,), (3, 7)),
        )
    ),
)

BENCHMARK_CASES = (
    case(B=64, H=4, d=16, kernels=(5,)),
    case(B=64, H=3, d=64, kernels=(7, 5, 3)),
)

SPEC = Spec(
    name="cascaded_group_attention",
    function=hw.cascaded_group_attention,
    make=make,
    run=run,
    differentiable=(),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=(
        case(Y=15, X=10, B=3, H=3, d=24, K=16, kernels=(7, 5, 3)),
        case(Y=4, X=4, window=None, B=2, H=2, d=48, kernels=(5,)),
    ),
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE, "sm80": HALF},
    operators=operators,
    limit=limit,
)
