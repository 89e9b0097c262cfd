# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.na2d_av and hw.contmix: maps of OverLoCK's dynamic blocks, and NAT's first stage.

The peers are the official code's fallback, which unfolds, and the shortest torch code, which
gathers; each as it is and compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import headworks as hw
from bench import neighborhood_peers as peers
from bench.parts import call_of, cost_of, empty_op, exponent, no_grad, speedup
from bench.suite import Case, Result, Target
from bench.timing import Call

BATCH = {"cpu": 4, "cuda": 64}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
GIVEN = ((28, 7, 8, 32), (14, 13, 8, 32))  # hw.na2d_av: side of the image, K, heads, D
MIXED = ((28, 13, 8, 16), (14, 13, 8, 16))  # hw.contmix: side, K, groups, D
SMALL, CENTRES = 5, 49
# hw.na2d_av at 28 x 28: at least so many times faster than the official form, than any torch form.
FASTER = {"forward": (1.5, 1.5), "train": (20.0, 1.0)}
OF_UNFOLD = 5.0  # percent of its memory, at most
GROWTH = (14, 28, 56, 112)
MODES = ("forward", "train")


def cases(device: str, quick: bool) -> list[Case]:
    """Given weights, ContMix, growth, overhead."""
    few = slice(1) if quick else slice(None)
    return [
        *(_given_case(device, mode, *sizes, quick) for mode in MODES for sizes in GIVEN[few]),
        *(_mixed_case(device, mode, *sizes, quick) for mode in MODES for sizes in MIXED[few]),
        _growth_case(device),
        _overhead_case(),
    ]


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    """The larger map of both."""
    sizes = ((7, 3, 1, 8), (7, 7, 1, 8)) if tiny else (GIVEN[0], MIXED[0])
    return [
        case(device, mode, *size, True)
        for case, size in zip((_given_case, _mixed_case), sizes, strict=True)
        for mode in MODES
    ]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """The thresholds of the design, set for a CPU."""
    if device == "cuda":
        return []
    rows = []
    for mode, (official, any_form) in FASTER.items():
        name = _given_name(mode, *GIVEN[0])
        rows.append(Target(f"{name}: official form", _over(results, name, "unfold"), official))
        rows.append(Target(f"{name}: any torch form", _over(results, name), any_form))
    for mode in MODES:
        name = _mixed_name(mode, *MIXED[0])
        rows.append(Target(f"{name}: official form", _over(results, name, "unfold"), 1.0))
        rows.append(Target(f"{name}: any torch form", _over(results, name), 1.0))
        rows.append(Target(f"{name}: of unfold's memory", _memory(results, name), OF_UNFOLD, "%",
                           at_most=True))  # fmt: skip
    rows.append(Target("growth exponent", exponent(results), 1.05, "", at_most=True))
    return rows


def _draw(device: str, *shapes: tuple[int, ...], grad: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator, device=device)
        .to(DTYPE[device])
        .requires_grad_(grad)
        for shape in shapes
    )


def given(
    device: str, batch: int, side: int, k: int, heads: int, d: int, *, grad: bool = False
) -> tuple[Tensor, ...]:
    """Random w and v."""
    image = (batch, side, side, heads)
    w, v = _draw(device, (*image, k * k), (*image, d), grad=False)
    return w.softmax(-1).requires_grad_(grad), v.requires_grad_(grad)


def mixed(
    device: str, batch: int, side: int, k: int, groups: int, d: int, *, grad: bool = False
) -> tuple[Tensor, ...]:
    """Random affinity, weight, bias, small_rpb, rpb, v."""
    taps = SMALL * SMALL + k * k
    return _draw(
        device,
        (batch, side, side, groups, CENTRES),
        (taps, CENTRES),
        (taps,),
        (groups, 2 * SMALL - 1, 2 * SMALL - 1),
        (groups, 2 * k - 1, 2 * k - 1),
        (batch, side, side, 2 * groups, d),
        grad=grad,
    )


def _ours(k: int, *operands: Tensor) -> Tensor:
    affinity, weight, bias, small_rpb, rpb, v = operands
    return hw.contmix(
        affinity, weight, bias, v, kernel_size=k, small_kernel_size=SMALL, rpb=rpb,
        small_rpb=small_rpb,
    )  # fmt: skip


def _over(results: Mapping[str, Result], name: str, form: str = "") -> float | None:
    """How many times faster than the best of the peers whose names begin with `form`."""
    if name not in results:
        return None
    peers = (n for n in results[name].seconds if n != "headworks" and n.startswith(form))
    return speedup(results, name, *peers)


def _memory(results: Mapping[str, Result], name: str) -> float | None:
    """Peak memory as a share of that of the official form, in percent."""
    peak = results[name].peak_bytes if name in results else {}
    if not peak.get("unfold") or "headworks" not in peak:
        return None
    return 100 * peak["headworks"] / peak["unfold"]


def _given_name(mode: str, side: int, k: int, *_: int) -> str:
    return f"na2d_av {mode} {side}x{side} K {k}"


def _mixed_name(mode: str, side: int, k: int, *_: int) -> str:
    return f"contmix {mode} {side}x{side} K {k}"


def _facts(shape: Mapping[str, Any], device: str, mode: str) -> dict[str, Any]:
    return {**shape, "dtype": str(DTYPE[device]).removeprefix("torch."), "mode": mode}


def _given_case(device: str, mode: str, side: int, k: int, heads: int, d: int, quick: bool) -> Case:
    def contenders() -> dict[str, Call]:
        tensors = given(device, BATCH[device], side, k, heads, d, grad=mode == "train")

        def ours(w: Tensor, v: Tensor) -> Tensor:
            return hw.na2d_av(w, v, kernel_size=k)

        functions = {"headworks": ours, **peers.na2d_av_peers(k, compiled=not quick)}
        return {name: call_of(f, tensors, mode) for name, f in functions.items()}

    shape = {"B": BATCH[device], "Y": side, "X": side, "H": heads, "D": d, "kernel_size": k}
    total = cost_of("na2d_av", mode, **shape, dtype=DTYPE[device])
    name = _given_name(mode, side, k)
    return Case(name, _facts(shape, device, mode), contenders, total, memory=True)


def _mixed_case(
    device: str, mode: str, side: int, k: int, groups: int, d: int, quick: bool
) -> Case:
    def contenders() -> dict[str, Call]:
        tensors = mixed(device, BATCH[device], side, k, groups, d, grad=mode == "train")
        functions = {"headworks": lambda *x: _ours(k, *x)}
        functions |= peers.contmix_peers(SMALL, k, compiled=not quick)
        return {name: call_of(f, tensors, mode) for name, f in functions.items()}

    shape = {"B": BATCH[device], "Y": side, "X": side, "G": groups, "A": CENTRES, "D": d,
             "kernel_size": k, "small_kernel_size": SMALL}  # fmt: skip
    total = cost_of("contmix", mode, **shape, dtype=DTYPE[device])
    name = _mixed_name(mode, side, k)
    return Case(name, _facts(shape, device, mode), contenders, total, memory=True)


def _growth_case(device: str) -> Case:
    """ContMix, linear in tokens, which name the calls."""
    k, groups, d = 13, 4, 16

    def call(side: int) -> Call:
        return call_of(lambda *x: _ours(k, *x), mixed(device, 1, side, k, groups, d), "forward")

    facts = _facts({"B": 1, "G": groups, "D": d, "kernel_size": k}, device, "growth")
    return Case("growth", facts, lambda: {str(side * side): call(side) for side in GROWTH})


def _overhead_case() -> Case:
    """Host time of a call with next to nothing to compute, beside an operator that does nothing."""

    def contenders() -> dict[str, Call]:
        plain, learnt = (given("cpu", 1, 1, 1, 1, 8, grad=grad) for grad in (False, True))
        image = mixed("cpu", 1, 13, 13, 1, 8)
        return {
            "empty op": no_grad(empty_op(), *plain, plain[0]),
            "headworks": no_grad(hw.na2d_av, *plain, kernel_size=1),
            "headworks, grad": lambda: hw.na2d_av(*learnt, kernel_size=1),
            "contmix of one group": no_grad(lambda *x: _ours(13, *x), *image),
        }

    return Case("overhead", {"Y": 1, "X": 1, "dtype": "float32", "mode": "overhead"}, contenders)
