# SPDX-License-Identifier: Apache-2.0
"""The specification of an operator, and the check of one case against the fp64 reference."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compare import FIXED, FLOOR, compare
from .inputs import restride

Tensors = dict[str, Tensor]

HALF = (torch.bfloat16, torch.float16)
EVERY_DTYPE = (torch.float64, torch.float32, *HALF)


@dataclass(frozen=True)
class Case:
    """Sizes by symbol (B, S, H, ...), keyword options of the call, the floor of compare()."""

    name: str
    sizes: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    floor: float = FLOOR

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Spec:
    """One operator.

    name             of the public function
    function         the public function
    make             (case, dtype, device, seed) -> the tensors of a call by name, on the CPU drawn
    run              (tensors, case, backend) -> outputs by name, through the public function
    differentiable   names of the tensors that have a gradient, where the case has them
    cases            for every backend on real hardware
    emulator_cases   small ones, for emulated kernels; the first three reach every algorithm
    benchmark_cases  sizes worth timing
    sample_cases     a few that have every argument and reach every algorithm: for strides, compile,
                     determinism and the like
    dtypes           by compiled backend: the dtypes it is built for
    operators        (tensors, case) -> [(torch operator, arguments)], for opcheck
    limit            (backend, case) -> what the backend says when it declines the case, "" if not
    """

    name: str
    function: Callable[..., Any]
    make: Callable[..., Tensors]
    run: Callable[..., Tensors]
    differentiable: tuple[str, ...]
    cases: tuple[Case, ...]
    emulator_cases: tuple[Case, ...]
    benchmark_cases: tuple[Case, ...]
    sample_cases: tuple[Case, ...]
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    operators: Callable[..., list[tuple[Any, tuple[Any, ...]]]]
    limit: Callable[[str, Case], str] = lambda backend, case: ""

    def __str__(self) -> str:
        return self.name


def evaluate(
    spec: Spec,
    case: Case,
    backend: str,
    tensors: Tensors,
    *,
    gradients: bool = True,
    seed: int = 0,
    layout: str = "contiguous",
) -> Tensors:
    """Outputs by name, and gradients as "d_<tensor>" for random cotangents of every output.

    `layout` is that of the cotangents.
    """
    wanted = [n for n in spec.differentiable if n in tensors] if gradients else []
    tensors = {n: x.detach().requires_grad_() if n in wanted else x for n, x in tensors.items()}
    with torch.set_grad_enabled(bool(wanted)):
        outputs = spec.run(tensors, case, backend)
    result = {n: x.detach() for n, x in outputs.items()}
    reached = {n: x for n, x in outputs.items() if x.requires_grad}
    if wanted and reached:
        cotangents = [restride(_cotangent(n, x, seed), layout) for n, x in reached.items()]
        inputs = [tensors[n] for n in wanted]
        grads = torch.autograd.grad(list(reached.values()), inputs, cotangents, allow_unused=True)
        for n, x, grad in zip(wanted, inputs, grads, strict=True):
            result[f"d_{n}"] = torch.zeros_like(x) if grad is None else grad
    return result


def _cotangent(name: str, x: Tensor, seed: int) -> Tensor:
    """Random, the same for every dtype up to rounding to bf16, exact in all of them but fp16."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    g = torch.randn(x.shape, generator=generator, dtype=torch.float32)
    return g.to(torch.bfloat16).to(torch.float16).to(dtype=x.dtype, device=x.device)


def check_case(
    spec: Spec,
    case: Case,
    backend: str,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    gradients: bool = True,
    seed: int = 0,
    layout: str = "contiguous",
    oracle_device: str | None = None,
) -> None:
    """Compare every output and every gradient of a backend with the reference.

    With `layout`, inputs and cotangents lie in memory that way. The reference runs on the device of
    the tensors, or on `oracle_device`.
    """
    tensors = spec.make(case, dtype, device, seed)
    tensors = {n: restride(x, layout) for n, x in tensors.items()}
    options: dict[str, Any] = {"gradients": gradients, "seed": seed, "layout": layout}
    key = (spec.name, case.name, dtype, device, *options.values())
    if key not in _expected:
        if len(_expected) == REMEMBERED:
            _expected.popitem(last=False)
        given = tensors
        if oracle_device is not None:
            given = {n: x.to(oracle_device) for n, x in tensors.items()}
        _expected[key] = _expectation(spec, case, dtype, given, options)
    oracle, rough = _expected[key]
    actual = evaluate(spec, case, backend, tensors, **options)
    if actual.keys() != oracle.keys():
        raise AssertionError(f"{spec}: outputs {sorted(actual)}, expected {sorted(oracle)}")
    for name, x in oracle.items():
        label = f"{spec.name}[{case.name}, {backend}, {dtype}]: {name}"
        compare(actual[name], x, dtype, reference=rough.get(name), floor=case.floor, name=label)


# The latest expectations, which several backends are compared with.
REMEMBERED = 64
_expected: collections.OrderedDict[tuple[Any, ...], tuple[Tensors, Tensors]] = (
    collections.OrderedDict()
)


def _expectation(
    spec: Spec, case: Case, dtype: torch.dtype, tensors: Tensors, options: dict[str, Any]
) -> tuple[Tensors, Tensors]:
    """The reference in fp64, and in the dtype itself where the tolerance needs that."""
    wide = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    oracle = evaluate(spec, case, "reference", wide, **options)
    if dtype in FIXED:
        return oracle, {}
    return oracle, evaluate(spec, case, "reference", tensors, **options)
