# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.key_scan. Sizes: B, S, H, Dv."""

from __future__ import annotations

import torch

import headworks as hw
from headworks.testing import EVERY_DTYPE, Case, Spec

from .pairs import pairwise


def case(
    S=65, Dv=32, B=2, H=2, *, state_in=False, state_out=False, spread=1.0, shift=0.0, masked=0,
    label="",
):  # fmt: skip
    """`spread` multiplies the scores, to which `shift` is added; the first `masked` of them are
    -inf. `state_in`: with "empty" nothing was summed into the state of the first head, whatever
    its o is."""
    sizes = {"B": B, "S": S, "H": H, "Dv": Dv, "state_in": state_in, "spread": spread,
             "shift": shift, "masked": masked}  # fmt: skip
    words = [f"S{S}", f"Dv{Dv}", f"B{B}", f"H{H}"]
    words += ["empty" if state_in == "empty" else "in"] if state_in else []
    words += ["out"] if state_out else []
    words += [f"spread{spread:g}"] if spread != 1.0 else []
    words += [f"shift{shift:g}"] if shift else []
    words += [f"masked{masked}"] if masked else []
    words += [label] if label else []
    # Where one key outweighs all later ones, the rounding of o adds up in ds over all later rows.
    floor = 2.0 if spread == 1.0 and not shift else 16.0
    return Case("-".join(words), sizes, {"output_final_state": state_out}, floor)


def make(case, dtype, device="cpu", seed=0):
    """s v, and o0 lse0 as the case has them."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    s = n["spread"] * draw(n["B"], n["S"], n["H"]) + n["shift"]
    s[:, : n["masked"]] = -torch.inf
    tensors = {"s": s.to(device, dtype)}
    tensors["v"] = draw(n["B"], n["S"], n["H"], n["Dv"]).to(device, dtype)
    if n["state_in"]:
        tensors["o0"] = draw(n["B"], n["H"], n["Dv"]).to(device, accumulation)
        lse0 = draw(n["B"], n["H"])
        if n["state_in"] == "empty":
            lse0[:, :1] = -torch.inf
        tensors["lse0"] = lse0.to(device, accumulation)
    return tensors


def run(tensors, case, backend):
    state = hw.KeyScanState(tensors["o0"], tensors["lse0"]) if "o0" in tensors else None
    result = hw.key_scan(
        tensors["s"], tensors["v"], initial_state=state, backend=backend, **case.options
    )
    if not case.options["output_final_state"]:
        return {"o": result}
    o, state = result
    return {"o": o, "o1": state.o, "lse1": state.lse}


def operators(tensors, case):
    s, v, o0, lse0 = (tensors.get(n) for n in ("s", "v", "o0", "lse0"))
    forward = torch.ops.headworks.key_scan_fwd.default
    backward = torch.ops.headworks.key_scan_bwd.default
    arguments = (s, v, o0, lse0, True, True, "auto")
    o, lse, o1, lse1, wide = forward(*arguments)
    grads = [torch.randn_like(x) for x in (o, o1, lse1)]
    saved = (s, v, o if o.dtype == lse.dtype else wide, lse, o0, lse0, o1)
    return [(forward, arguments), (backward, (*saved, *grads, o0 is not None, "auto"))]


CASES = (
    *(case(S=s, state_out=True) for s in (0, 1, 2, 63, 64, 65, 111, 128, 130)),
    *(case(S=s, B=1, H=1, state_in=True, state_out=True) for s in (0, 1, 600, 1100)),
    *(case(S=70, Dv=dv, state_in=True) for dv in (1, 60, 64, 100, 112, 128, 130, 256)),
    case(S=300, Dv=16, spread=50.0, state_out=True),
    case(S=40, Dv=16, masked=7, state_out=True),
    case(S=40, Dv=16, masked=7, state_in=True, state_out=True),
    case(S=9, Dv=16, masked=9, state_out=True, label="all"),
    case(S=65, B=0, state_in=True, state_out=True),
    case(S=65, H=0, state_out=True),
    case(S=65, Dv=0, state_in=True, state_out=True),
    case(S=65, H=5, B=3),
)

EMULATOR_CASES = (
    case(S=200, B=1, H=2, Dv=20, state_in=True, state_out=True),
    case(S=130, B=2, H=1, Dv=8, state_out=True),
    case(S=40, B=1, H=1, Dv=8, masked=7, state_out=True),
    *(
        case(S=s, B=2, H=3, Dv=8, state_in=i, state_out=o)
        for s, i, o in (
            (0, "empty", True),
            (0, True, False),
            (0, False, True),
            (1, True, False),
            (20, "empty", True),
        )
    ),
    # Heads enough for the CPU to cut no time; rows that do not fit the smallest scratch memory.
    case(S=0, B=1, H=8, Dv=8),
    case(S=5, B=1, H=8, Dv=400, state_out=True),
    *(case(S=s, B=1, H=1, Dv=8) for s in (1, 63, 64, 65)),
    case(S=33, B=1, H=1, Dv=70),
    case(S=33, B=1, H=1, Dv=1, state_in=True),
    case(S=600, B=1, H=1, Dv=4, state_out=True),
    case(S=70, B=1, H=1, Dv=8, spread=50.0, state_out=True),
    # log-sums that rounding takes much of
    case(S=70, B=1, H=1, Dv=8, shift=4000.0, state_out=True),
    case(S=9, B=1, H=1, Dv=8, masked=9, state_out=True, label="all"),
    case(S=9, B=1, H=1, Dv=8, shift=torch.inf, state_out=True),
    # Segments of one column; as many segments, heads and slices as fill more than a line.
    case(S=200, B=1, H=1, Dv=1, state_out=True),
    case(S=258, B=3, H=3, Dv=132, state_in=True),
    # Units of 8, 16 and 32 lanes, two slices of columns, one segment of time or several.
    *(
        case(label="pairs", **choice)
        for choice in pairwise(
            S=(3, 33, 260),
            Dv=(8, 40, 68, 131, 132),
            B=(1, 2),
            H=(1, 3),
            state_in=(False, True),
            state_out=(False, True),
            masked=(0, 2, 200),
        )
    ),
)

BENCHMARK_CASES = tuple(case(S=s, B=1, H=8, Dv=64) for s in (1024, 4096, 16384, 65536))

SPEC = Spec(
    name="key_scan",
    function=hw.key_scan,
    make=make,
    run=run,
    differentiable=("s", "v", "o0", "lse0"),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=(
        case(S=130, B=3, Dv=24, state_in=True, state_out=True),
        case(S=700, B=2, H=1, Dv=16, state_out=True),
    ),
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE},
    operators=operators,
)
