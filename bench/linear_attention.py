# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.linear_attention and hw.linear_attention_step, and its speed targets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import headworks as hw
from bench import peers, predictions
from bench.parts import call_of, empty_op, exponent, no_grad, overhead, percent, speedup
from bench.suite import Case, Result, Target
from bench.timing import Call, graphed
from headworks.cost import cost

D, DV = 16, 64
CPU_SHAPE = {"B": 1, "H": 8, "D": D, "Dv": DV}
GPU_SHAPE = {"B": 16, "H": 16, "D": D, "Dv": DV}
STEP_SHAPE = {"B": 64, "H": 16, "D": D, "Dv": DV}

# The longest sequence at which a peer is still worth its time and memory.
LONGEST = {
    "eager": 16384,
    "compiled": 16384,
    "sdpa": 16384,
    "fla naive parallel": 4096,
    "fla naive chunk": 4096,
}
# The chunked form as it is written everywhere, and the strongest torch form we could write: whole
# segments of chunks in one batched product.
CHUNKED = ("eager", "compiled")
SEGMENTS = ("eager, segments", "compiled, segments")
GROWTH = tuple(1024 << i for i in range(7))  # 1k .. 64k


def cases(device: str, quick: bool) -> list[Case]:
    """Forward, forward + backward, 16-bit against 32-bit, decode, growth, call overhead."""
    if device == "cuda":
        return _cuda_cases(quick)
    lengths = (1024, 4096) if quick else (1024, 4096, 16384)
    train = [_case(device, "train", s, torch.float32, quick) for s in lengths]
    lengths = lengths if quick else (*lengths, 65536)
    forward = [_case(device, "forward", s, torch.float32, quick) for s in lengths]
    return [
        *forward,
        *train,
        _dtype_case(device, "forward", 4096),
        _dtype_case(device, "train", 4096),
        _step_case(device, torch.float32, quick),
        _growth_case(device, GROWTH[:4] if quick else GROWTH),
        _overhead_case(),
    ]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """The thresholds of the design, judged on this run."""
    if device == "cuda":
        return predictions.targets("linear_attention", results)
    rows = []
    for s, times in ((1024, 3.0), (4096, 4.0), (16384, 5.0)):
        name = f"forward S {s} fp32"
        rows.append(Target(f"{name}: chunked torch", speedup(results, name, *CHUNKED), times))
    for s in (1024, 4096, 16384):
        for mode in ("forward", "train"):
            name = f"{mode} S {s} fp32"
            rows.append(
                Target(f"{name}: segments in torch", speedup(results, name, *SEGMENTS), 2.0)
            )
    for s, times in ((4096, 8.0), (16384, 30.0)):
        name = f"forward S {s} fp32"
        rows.append(Target(f"{name}: causal SDPA", speedup(results, name, "sdpa"), times))
    for s in (1024, 4096, 16384):
        name = f"train S {s} fp32"
        rows.append(Target(f"{name}: chunked torch", speedup(results, name, *CHUNKED), 3.0))
    for mode in ("forward", "train"):
        name = f"{mode} S 4096 bf16"
        rows.append(Target(f"{name}: fp32", speedup(results, name, "headworks fp32"), 1.0))
    rows.append(Target("step B 64 H 16: copy", _fraction_of_copy(results), 60.0, "%"))
    name = "forward S 4096 fp32"
    rows.append(Target(f"{name}: processor's peak", percent(results, name, "peak"), 60.0, "%"))
    rows.append(Target("growth exponent", exponent(results), 1.05, "", at_most=True))
    rows.append(Target("call overhead", overhead(results), 10.0, "us", at_most=True))
    return rows


def inputs(
    shape: Mapping[str, int], s: int, dtype: torch.dtype, device: str, *, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k [B, S, H, D] and v [B, S, H, Dv]."""
    generator = torch.Generator(device).manual_seed(0)

    def tensor(width: int) -> Tensor:
        size = (shape["B"], s, shape["H"], width)
        x = torch.randn(size, generator=generator, device=device).to(dtype)
        return x.requires_grad_(grad)

    return tensor(shape["D"]), tensor(shape["D"]), tensor(shape["Dv"])


def _case(device: str, mode: str, s: int, dtype: torch.dtype, quick: bool) -> Case:
    shape = CPU_SHAPE if device == "cpu" else GPU_SHAPE
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]

    def contenders() -> dict[str, Call]:
        qkv = inputs(shape, s, dtype, device, grad=mode == "train")
        wide = inputs({**shape, "D": DV}, s, dtype, device, grad=mode == "train")
        functions = {"headworks": hw.linear_attention}
        functions |= peers.linear_attention_peers(device, compiled=not quick)
        calls = {n: call_of(f, qkv, mode) for n, f in functions.items() if s <= _longest(n)}
        for name, function in peers.sdpa_peers(device).items():
            if s <= _longest(name):
                calls[name] = call_of(function, wide, mode)
        return calls

    kwargs = {**shape, "S": s, "dtype": dtype}
    total = cost("linear_attention", **kwargs)
    if mode == "train":
        total += cost("linear_attention", **kwargs, backward=True)
    facts = {**shape, "S": s, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
    memory = s == 4096 or device == "cuda"
    return Case(f"{mode} S {s} {short}", facts, contenders, total, memory)


def _longest(name: str) -> int:
    return LONGEST.get(name, 1 << 30)


def _dtype_case(device: str, mode: str, s: int) -> Case:
    """bf16 against fp32: the first contender is ours in bf16."""
    shape = CPU_SHAPE

    def contenders() -> dict[str, Call]:
        grad = mode == "train"
        half = inputs(shape, s, torch.bfloat16, device, grad=grad)
        single = inputs(shape, s, torch.float32, device, grad=grad)
        wide = inputs({**shape, "D": DV}, s, torch.bfloat16, device, grad=grad)
        return {
            "headworks": call_of(hw.linear_attention, half, mode),
            "headworks fp32": call_of(hw.linear_attention, single, mode),
            "sdpa": call_of(peers.sdpa, wide, mode),
        }

    facts = {**shape, "S": s, "dtype": "bfloat16", "mode": mode}
    return Case(f"{mode} S {s} bf16", facts, contenders)


def _step_case(device: str, dtype: torch.dtype, quick: bool) -> Case:
    """Decode: all state is read and written once; the yardstick is a copy of as many bytes."""
    batch, heads = STEP_SHAPE["B"], STEP_SHAPE["H"]

    def contenders() -> dict[str, Call]:
        q, k, v = (x[:, 0] for x in inputs(STEP_SHAPE, 1, dtype, device))

        def state() -> hw.LinearState:
            kv = torch.zeros(batch, heads, 153, DV, device=device)
            return hw.LinearState(kv, torch.zeros(batch, heads, 153, device=device))

        ours, theirs, compiled, copied = (state() for _ in range(4))
        target = torch.empty_like(copied.kv)
        calls: dict[str, Call] = {
            "headworks": no_grad(hw.linear_attention_step, q, k, v, ours),
            "eager": no_grad(peers.step_eager, q, k, v, *theirs),
            "copy of the state": no_grad(target.copy_, copied.kv),
        }
        if device == "cuda":
            calls["headworks, graph"] = graphed(calls["headworks"])
        if not quick:
            step = peers.compile_late(peers.step_eager)
            calls["compiled"] = no_grad(step, q, k, v, *compiled)
        return calls

    total = cost("linear_attention_step", **STEP_SHAPE, dtype=dtype)
    facts = {**STEP_SHAPE, "dtype": str(dtype).removeprefix("torch."), "mode": "step"}
    return Case(f"step B {batch} H {heads}", facts, contenders, total)


def _growth_case(device: str, sizes: tuple[int, ...]) -> Case:
    """All lengths in one case, so that they are timed in turn."""
    shape = CPU_SHAPE if device == "cpu" else GPU_SHAPE
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def contenders() -> dict[str, Call]:
        return {
            str(s): call_of(hw.linear_attention, inputs(shape, s, dtype, device), "forward")
            for s in sizes
        }

    facts = {**shape, "dtype": str(dtype).removeprefix("torch."), "mode": "forward"}
    return Case("growth", facts, contenders)


def _overhead_case() -> Case:
    """Host time of a call with next to nothing to compute, beside an operator that does nothing."""
    shape = {"B": 1, "H": 1, "D": D, "Dv": D}

    def contenders() -> dict[str, Call]:
        plain = inputs(shape, 1, torch.float32, "cpu")
        graph = inputs(shape, 1, torch.float32, "cpu", grad=True)
        return {
            "empty op": no_grad(empty_op(), *plain),
            "headworks": no_grad(hw.linear_attention, *plain),
            "headworks, grad": lambda: hw.linear_attention(*graph),
        }

    return Case("overhead", {**shape, "S": 1, "dtype": "float32"}, contenders)


def _fraction_of_copy(results: Mapping[str, Result]) -> float | None:
    """Bytes per second of the step over those of a copy of the state."""
    name = f"step B {STEP_SHAPE['B']} H {STEP_SHAPE['H']}"
    if name not in results:
        return None
    result = results[name]
    moved = cost("linear_attention_step", **STEP_SHAPE, dtype=result.shape["dtype"]).bytes
    ratio = result.ratio("copy of the state")
    copied = 2 * STEP_SHAPE["B"] * STEP_SHAPE["H"] * 153 * DV * 4
    return None if ratio is None else 100 * moved / copied * ratio


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    """8192 tokens forward and with backward, the schedules, decoding."""
    s, dtype = (128, torch.float32) if tiny else (8192, torch.bfloat16)
    modes = ("forward", "train")
    return [
        *(_case(device, mode, s, dtype, quick=tiny) for mode in modes),
        *(_schedule_case(device, batch, s) for batch in ((1, 2) if tiny else (1, 8, 64))),
        _step_case(device, dtype, quick=tiny),
        _growth_case(device, GROWTH[:4] if tiny else GROWTH),
    ]


def _schedule_case(device: str, batch: int, s: int) -> Case:
    """Ours alone, for the time per token: few sequences are split over the device, many are not
    (linear_attention_plan.h), and what splitting costs is the difference."""
    shape, dtype = {**GPU_SHAPE, "B": batch}, torch.bfloat16

    def contenders() -> dict[str, Call]:
        calls = {
            "headworks": call_of(hw.linear_attention, inputs(shape, s, dtype, device), "forward")
        }
        return {**calls, "headworks, graph": graphed(calls["headworks"])}

    total = cost("linear_attention", **shape, S=s, dtype=dtype)
    facts = {**shape, "S": s, "dtype": "bfloat16", "mode": "schedule"}
    return Case(f"forward B {batch} S {s} bf16", facts, contenders, total)


def _cuda_cases(quick: bool) -> list[Case]:
    lengths = (2048, 8192) if quick else (1024, 2048, 4096, 8192, 16384)
    half = torch.bfloat16
    return [
        *(_case("cuda", "forward", s, half, quick) for s in lengths),
        *(_case("cuda", "train", s, half, quick) for s in lengths),
        _step_case("cuda", half, quick),
        _growth_case("cuda", GROWTH),
    ]
