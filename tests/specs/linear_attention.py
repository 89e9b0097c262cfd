# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.linear_attention.

Sizes: B, S, Hq, H, D, Dv; N and the sequence `lengths` when packed.
"""

from __future__ import annotations

import torch

import headworks as hw
from headworks.reference.linear_attention import PRE, features
from headworks.testing import EVERY_DTYPE, HALF, Case, Spec

MAP_NUMBERS = {"taylor2": 0, "identity": 1, "elu1": 2, "relu": 3}


def case(
    S=65, D=16, Dv=64, B=1, H=2, Hq=None, *, feature_map="taylor2", causal=True, normalize=True,
    scale=None, eps=0.0, state_in=False, state_out=False, lengths=None, floor=2.0, label="",
):  # fmt: skip
    if lengths is not None:
        S, B = sum(lengths), 1
    sizes = {"B": B, "S": S, "Hq": Hq or H, "H": H, "D": D, "Dv": Dv, "lengths": lengths,
             "state_in": state_in}  # fmt: skip
    options = {"feature_map": feature_map, "is_causal": causal, "normalize": normalize,
               "output_final_state": state_out}  # fmt: skip
    if scale is not None:
        options["scale"] = scale
    if eps:
        options["eps"] = eps
    words = [f"S{S}", f"D{D}", f"Dv{Dv}", f"B{B}", f"H{Hq or H}:{H}", feature_map]
    words += [] if causal else ["full"]
    words += [] if normalize else ["sum"]
    words += ["scaled"] if scale is not None else []
    words += ["eps"] if eps else []
    words += ["in"] if state_in else []
    words += ["out"] if state_out else []
    words += [f"packed{len(lengths)}"] if lengths is not None else []
    words += [label] if label else []
    return Case("-".join(words), sizes, options, floor)


def make(case, dtype, device="cpu", seed=0):
    """q k v, kv0 z0 (the state of five earlier tokens) and cu_seqlens, as the case has them."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)
    feature_map = case.options["feature_map"]

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def draw_qk(*shape):
        # A sum of signed weights may come near 0, where dividing by it magnifies every rounding.
        x = draw(*shape)
        return x.abs() + 0.1 if feature_map == "identity" and case.options["normalize"] else x

    q = draw_qk(n["B"], n["S"], n["Hq"], n["D"])
    if feature_map == "identity":
        q[:, :1] = 0  # a row without weights, whose z is 0
    if feature_map == "relu" and n["D"] > 1:
        q[:, 1::5, :, 0] = 0  # the kink of relu
    tensors = {
        "q": q.to(device, dtype),
        "k": draw_qk(n["B"], n["S"], n["H"], n["D"]).to(device, dtype),
        "v": draw(n["B"], n["S"], n["H"], n["Dv"]).to(device, dtype),
    }
    sequences = n["B"] if n["lengths"] is None else len(n["lengths"])
    if n["state_in"]:
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        phi = features(draw_qk(sequences, 5, n["H"], n["D"]), feature_map)
        kv0 = torch.einsum("nshf,nshe->nhfe", phi, draw(sequences, 5, n["H"], n["Dv"]))
        tensors["kv0"] = kv0.to(device, accumulation)
        tensors["z0"] = phi.sum(1).to(device, accumulation)
    if n["lengths"] is not None:
        bounds = torch.tensor([0, *n["lengths"]]).cumsum(0)
        if not case.options["output_final_state"]:  # both types that they may have
            bounds = bounds.int()
        tensors["cu_seqlens"] = bounds.to(device)
    return tensors


def run(tensors, case, backend):
    state = hw.LinearState(tensors["kv0"], tensors["z0"]) if "kv0" in tensors else None
    result = hw.linear_attention(
        tensors["q"], tensors["k"], tensors["v"], initial_state=state,
        cu_seqlens=tensors.get("cu_seqlens"), backend=backend, **case.options,
    )  # fmt: skip
    if not case.options["output_final_state"]:
        return {"o": result}
    o, state = result
    return {"o": o, "kv1": state.kv, "z1": state.z}


def operators(tensors, case):
    """The torch operators with the arguments this case gives them, for opcheck."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    kv0, z0, bounds = (tensors.get(n) for n in ("kv0", "z0", "cu_seqlens"))
    bounds = None if bounds is None else bounds.long()
    o = case.options
    scale = o.get("scale", q.shape[-1] ** -0.5)
    options = (MAP_NUMBERS[o["feature_map"]], o["is_causal"], o["normalize"], scale,
               o.get("eps", 0.0))  # fmt: skip
    forward = torch.ops.headworks.linear_attention_fwd.default
    backward = torch.ops.headworks.linear_attention_bwd.default
    arguments = (q, k, v, kv0, z0, bounds, *options, True, o["normalize"], "auto")
    y, z, kv1, z1 = forward(*arguments)
    z = z if o["normalize"] else None
    grads = [torch.randn_like(x) for x in (y, kv1, z1)]
    return [
        (forward, arguments),
        (
            backward,
            (q, k, v, kv0, z0, bounds, y, z, *grads, *options, kv0 is not None, "auto"),
        ),
    ]


MAPS = tuple(PRE)

CASES = (
    *(case(S=s, state_out=True) for s in (0, 1, 2, 63, 64, 65, 111, 128, 130)),
    *(case(S=s, H=1, state_in=True, state_out=True) for s in (600, 1100)),
    *(case(S=s, causal=False, state_out=True) for s in (0, 2, 64, 130, 600)),
    # One key: d_q is 0, as a difference of two sums over Dv, of which tensor cores make one from
    # the state rounded to 16 bits.
    case(S=1, causal=False, state_out=True, floor=12.0),
    *(case(S=70, D=d, Dv=32, state_in=True, state_out=True) for d in (1, 4, 8, 17, 32)),
    *(case(S=530, D=d, Dv=20, H=1) for d in (1, 17, 32)),
    *(case(S=70, Dv=dv) for dv in (1, 32, 60, 100, 112, 128, 130, 256)),
    *(case(S=520, Dv=dv, H=1, state_out=True) for dv in (1, 60, 112, 128, 256)),
    *(
        case(S=67, Dv=40, feature_map=m, causal=c, normalize=n, state_in=True, state_out=True)
        for m in MAPS
        for c in (True, False)
        for n in (True, False)
    ),
    *(case(S=530, D=24, Dv=48, H=1, feature_map=m, state_out=True) for m in MAPS[1:]),
    *(case(S=530, D=16, Dv=48, H=1, feature_map=m, causal=False) for m in MAPS),
    case(S=70, D=80, Dv=24, feature_map="elu1", state_in=True),
    case(S=70, D=1, Dv=8, feature_map="relu", label="zero-rows"),
    *(case(S=66, B=2, H=h, Hq=hq, state_in=True, state_out=True) for hq, h in ((4, 2), (6, 1))),
    case(S=520, B=2, H=1, Hq=3, Dv=24, state_in=True),
    case(S=66, B=3, H=3, causal=False),
    case(S=66, scale=1.0, eps=1e-2),
    case(S=66, scale=-0.3, normalize=False, state_out=True),
    case(S=66, scale=0.0),
    *(
        case(lengths=(0, 5, 0, 64, 1, 130, 0), causal=c, state_in=i, state_out=True, Dv=24)
        for c in (True, False)
        for i in (True, False)
    ),
    case(lengths=(3, 2000, 17), H=1, Hq=2, Dv=16, state_in=True, state_out=True),
    case(lengths=(9, 30), feature_map="elu1", normalize=False, state_in=True),
    case(lengths=(), state_out=True, label="none"),
    case(lengths=(0,), state_out=True, state_in=True),
    case(S=5, B=0, state_out=True, state_in=True),
    case(S=5, H=0, state_out=True),
    case(S=5, Dv=0, state_out=True, state_in=True),
)

MANY = (66, 0, 9, 66, 70, 1, 64, 5)  # fill the device, and take several chunks

EMULATOR_CASES = (
    case(S=200, H=1, Dv=24, state_in=True, state_out=True),
    case(S=130, B=2, H=1, Hq=2, Dv=8),
    case(lengths=(0, 7, 140, 1), H=1, Dv=8, state_in=True, state_out=True),
    case(S=0, H=1, Dv=8, state_in=True, state_out=True),
    case(S=1, H=1, Dv=20, state_out=True),
    *(case(S=s, H=1, Dv=8, state_out=True) for s in (63, 64, 65, 129)),
    *(case(S=67, H=1, Dv=dv) for dv in (1, 64, 112, 128)),
    case(S=67, B=2, H=2, Dv=130),
    *(case(S=67, H=1, Dv=dv, state_in=True, state_out=True) for dv in (60, 112, 130)),
    case(S=600, H=1, Dv=24),
    case(S=530, H=1, D=8, Dv=8, feature_map="elu1"),
    case(lengths=MANY, H=1, D=4, Dv=4, causal=False, state_in=True, state_out=True),
    case(S=300, H=1, Dv=16, causal=False, state_in=True, state_out=True),
    case(S=90, H=1, Dv=16, causal=False),
    *(case(S=70, B=2, H=1, Hq=hq, Dv=8, state_out=True) for hq in (2, 3)),
    case(S=60, B=2, H=2, Hq=4, Dv=8, scale=1.0, state_in=True, state_out=True),
    case(S=40, B=2, H=1, D=5, Dv=12, normalize=False, scale=0.7, state_in=True, state_out=True),
    case(S=40, H=1, D=1, Dv=4, eps=0.5),
    *(case(S=20, H=1, D=d, Dv=8, state_out=True) for d in (17, 32)),
    case(S=33, H=1, D=16, Dv=16, feature_map="elu1", state_in=True, state_out=True),
    case(S=33, H=1, D=20, Dv=16, feature_map="identity", state_out=True),
    case(S=80, H=1, D=16, Dv=16, feature_map="relu", causal=False),
    case(S=33, H=1, D=1, Dv=8, feature_map="relu"),
    case(lengths=(100, 0, 260, 33), H=1, Dv=8, causal=False, state_out=True),
    case(lengths=(70, 9), H=1, Dv=8),
    # Long enough to be cut (linear_attention_plan.h).
    case(S=1300, H=1, Dv=24, state_in=True, state_out=True),
    case(lengths=(1400, 5, 500), H=1, Hq=2, Dv=8, state_in=True, state_out=True),
    # Options that meet in pairs: maps beyond D = 32, groups of heads, scales of any sign, sliced
    # states, packed sequences that are cut.
    *(case(S=33, H=1, D=40, Dv=8, feature_map=m, state_out=True) for m in ("elu1", "relu")),
    case(S=33, H=2, Hq=4, D=70, Dv=8, feature_map="identity", normalize=False, scale=-0.5),
    case(S=33, H=1, D=8, Dv=8, scale=0.0),
    case(S=70, H=1, D=4, Dv=256, causal=False, state_in=True, state_out=True),
    case(lengths=(600, 5, 70), H=1, Hq=2, D=4, Dv=8, state_in=True, state_out=True),
    *(
        case(S=70, H=1, D=40, Dv=40, feature_map="elu1", causal=c, state_in=True, state_out=True)
        for c in (True, False)
    ),
    # States beyond shared memory: of fewer columns, and of none. Heads that fill the device.
    case(S=20, H=1, D=32, Dv=12, state_in=True, state_out=True),
    case(S=40, H=1, D=1100, Dv=12, feature_map="elu1", state_in=True, state_out=True),
    case(S=3, H=1, D=8200, Dv=4, feature_map="relu", state_out=True),
    case(S=9, H=2, D=1100, Dv=12, feature_map="elu1", causal=False, state_in=True, state_out=True),
    case(lengths=(30, 30, 30, 30, 30, 30, 30, 80), H=1, D=4, Dv=4),
)


def limit(backend, case):
    """The tensor-core kernels: the Taylor map, up to the paper's 16 dimensions."""
    if backend.endswith("sm80"):
        if case.options["feature_map"] != "taylor2":
            return "have feature_map='taylor2' only"
        if case.sizes["D"] > 16:
            return "D = [0-9]+ is above 16"
    return ""


SAMPLE_CASES = (
    case(S=130, B=3, H=2, Hq=4, Dv=24, state_in=True, state_out=True),
    case(S=700, B=2, H=1, Dv=16, state_in=True, state_out=True),
    case(S=70, B=3, Dv=20, causal=False, state_out=True),
    case(
        S=70, B=2, D=12, Dv=20, feature_map="elu1", normalize=False, state_in=True, state_out=True
    ),
    case(lengths=(0, 5, 600, 31), H=1, Dv=16, state_in=True, state_out=True),
)

BENCHMARK_CASES = (
    *(case(S=s, H=8) for s in (1024, 4096, 16384, 65536)),
    *(case(S=4096, H=16, Dv=dv) for dv in (112, 128)),
    case(S=8192, H=16, B=16, label="gpu"),
)

SPEC = Spec(
    name="linear_attention",
    function=hw.linear_attention,
    make=make,
    run=run,
    differentiable=("q", "k", "v", "kv0", "z0"),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE, "sm80": HALF},
    operators=operators,
    limit=limit,
)
