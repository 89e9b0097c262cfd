# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.linear_attention_step. Sizes: B, Hq, H, D, Dv, and how many tokens came earlier.

The state is input and output.
"""

from __future__ import annotations

import torch

import headworks as hw
from headworks.reference.linear_attention import PRE, features
from headworks.testing import EVERY_DTYPE, Case, Spec

from .linear_attention import MAP_NUMBERS


def case(B=2, H=2, Hq=None, D=16, Dv=64, *, feature_map="taylor2", normalize=True, scale=None,
         eps=0.0, earlier=5):  # fmt: skip
    sizes = {"B": B, "Hq": Hq or H, "H": H, "D": D, "Dv": Dv, "earlier": earlier}
    options = {"feature_map": feature_map, "normalize": normalize, "scale": scale, "eps": eps}
    words = [f"B{B}", f"H{Hq or H}:{H}", f"D{D}", f"Dv{Dv}", feature_map]
    words += [] if normalize else ["sum"]
    words += ["scaled"] if scale is not None else []
    words += ["eps"] if eps else []
    words += [f"after{earlier}"] if earlier != 5 else []
    return Case("-".join(words), sizes, options)


def make(case, dtype, device="cpu", seed=0):
    """q k v of one token and the state kv z of some earlier ones."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)
    feature_map = case.options["feature_map"]
    positive = feature_map == "identity" and case.options["normalize"]
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def draw_qk(*shape):
        return draw(*shape).abs() + 0.1 if positive else draw(*shape)

    phi = features(draw_qk(n["B"], n["earlier"], n["H"], n["D"]), feature_map)
    kv = torch.einsum("bshf,bshe->bhfe", phi, draw(n["B"], n["earlier"], n["H"], n["Dv"]))
    return {
        "q": draw_qk(n["B"], n["Hq"], n["D"]).to(device, dtype),
        "k": draw_qk(n["B"], n["H"], n["D"]).to(device, dtype),
        "v": draw(n["B"], n["H"], n["Dv"]).to(device, dtype),
        "kv": kv.to(device, accumulation),
        "z": phi.sum(1).to(device, accumulation),
    }


def own_copy(x):
    """A copy that can be written to, in the same strides where they allow that."""
    if any(step == 0 for step in x.stride()):
        return x.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def run(tensors, case, backend):
    state = hw.LinearState(own_copy(tensors["kv"]), own_copy(tensors["z"]))
    o = hw.linear_attention_step(
        tensors["q"], tensors["k"], tensors["v"], state, backend=backend, **case.options
    )
    return {"o": o, "kv": state.kv, "z": state.z}


def operators(tensors, case):
    o = case.options
    scale = o["scale"] if o["scale"] is not None else tensors["q"].shape[-1] ** -0.5
    arguments = (*(tensors[n] for n in ("q", "k", "v", "kv", "z")), MAP_NUMBERS[o["feature_map"]],
                 o["normalize"], scale, o["eps"], "auto")  # fmt: skip
    return [(torch.ops.headworks.linear_attention_step.default, arguments)]


MAPS = tuple(PRE)

CASES = (
    *(case(B=b) for b in (0, 1, 2, 7)),
    *(case(D=d, Dv=33) for d in (1, 4, 8, 17, 32)),
    *(case(Dv=dv) for dv in (0, 1, 32, 60, 100, 112, 128, 130, 256)),
    *(case(D=24, Dv=40, feature_map=m, normalize=n) for m in MAPS for n in (True, False)),
    *(case(H=h, Hq=hq, Dv=40) for hq, h in ((4, 2), (6, 1), (16, 16))),
    case(H=0),
    case(scale=0.9, eps=1e-2),
    case(scale=-0.2, normalize=False),
    case(D=1, Dv=4, feature_map="relu"),
)

EMULATOR_CASES = (
    case(B=2, H=1, Hq=2, Dv=65),
    case(B=1, H=1, Dv=8),
    case(B=1, H=2, D=5, Dv=12, normalize=False),
    case(B=1, H=1, D=32, Dv=8, eps=0.3),
    case(B=1, H=1, D=20, Dv=16, feature_map="elu1"),
    # Columns of v in several blocks, which leave z to a kernel of its own, or need none.
    case(B=2, H=1, D=32, Dv=40),
    case(B=1, H=2, D=1200, Dv=40, feature_map="relu"),
    case(B=1, H=2, Hq=6, D=9, Dv=40, normalize=False, scale=-0.7),
    case(B=1, H=1, Hq=9, D=3, Dv=40),
    case(B=3, H=1, Hq=5, D=25, Dv=40, normalize=False),
    # The first token: its z is 1, or, in half of the rows, 0.
    case(B=1, H=1, D=4, Dv=4, scale=0.0, earlier=0),
    case(B=9, H=1, D=1, Dv=4, feature_map="relu", earlier=0),
)

BENCHMARK_CASES = tuple(case(B=b, H=16, D=16, Dv=64) for b in (1, 64, 128))

SPEC = Spec(
    name="linear_attention_step",
    function=hw.linear_attention_step,
    make=make,
    run=run,
    differentiable=(),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=(case(B=3, H=2, Hq=4, Dv=40), case(D=24, Dv=40, feature_map="elu1")),
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE},
    operators=operators,
)
