# SPDX-License-Identifier: Apache-2.0
"""From a torch operator to native code: backend names, routes, registration."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace as symbolic_trace

from . import _library
from ._errors import fail
from ._functions import Maybe as Maybe
from ._functions import NativeFunction

BACKENDS = ("auto", "reference", *_library.BACKENDS)

# What backend="auto" means, read once at import.
DEFAULT_BACKEND = os.environ.get("HEADWORKS_BACKEND") or "auto"

# The dtype of statistics, denominators and states, by the dtype of the inputs.
ACCUMULATION = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

LIBRARY = torch.library.Library("headworks", "DEF")  # type: ignore[no-untyped-call]

# function, backend, tensors, scalars: for hw.explain, by public function, from its arguments.
NativeCall = tuple[str, str, list[Maybe], tuple[float, ...]]
NATIVE_CALLS: dict[Callable[..., Any], Callable[..., NativeCall]] = {}


def backend_for(op: str, backend: str, x: Tensor) -> str:
    """The backend asked for, with "auto" resolved as far as the device of `x` decides it."""
    if backend == "auto":
        backend = DEFAULT_BACKEND
    if x.is_cpu and (backend == "auto" or backend == "cpu"):
        return "cpu"
    return _other_backend(op, backend, x)


def _other_backend(op: str, backend: str, x: Tensor) -> str:
    if backend not in BACKENDS:
        source = "HEADWORKS_BACKEND" if backend == DEFAULT_BACKEND else "backend"
        fail(ValueError, op, source, repr(backend), f"one of {', '.join(BACKENDS)}", "Choose one.")
    if backend == "reference" or x.is_meta:
        return backend
    wants = "cpu" if backend == "cpu" or backend.startswith("emulate:") else "cuda"
    if x.device.type != wants:
        if x.device.type == "cpu":
            remedy = f'Use backend="emulate:{backend}" to run it on the CPU, or backend="auto".'
        else:
            remedy = 'Use backend="auto", or "reference", which runs on every device.'
        fail(RuntimeError, op, f'device (backend="{backend}")', x.device, wants, remedy)
    return backend


def without_products(backend: str) -> str:
    """The backend for the steps of a call that are no matrix products: simt for tensor cores."""
    family, separator, name = backend.rpartition(":")
    return f"{family}{separator}simt" if name in ("sm80", "sm90") else backend


def _fx_traces() -> bool:
    """Whether torch.fx traces: a flag of its module, from torch 2.14 on one of the thread."""
    of_thread = getattr(symbolic_trace, "_get_is_fx_tracing", None)
    return bool(symbolic_trace._is_fx_tracing_flag if of_thread is None else of_thread())


def is_recorded() -> bool:
    """Whether operations are recorded or replaced: torch.compile, torch.jit.trace, make_fx, modes.
    Values are not looked at then: whoever runs the graph has others."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or _fx_traces()
    )


def is_readable(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at: a plain one that nobody records or wraps."""
    if torch.compiler.is_compiling() or not _are_ordinary((x,)):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def route(op: str, tensors: Sequence[Maybe]) -> str:
    """How a validated call is made:

    direct      plain tensors, no gradient wanted: the native call and nothing else
    operator    tracing, fake and other special tensors: through the dispatcher
    autograd    a gradient is wanted: through the autograd.Function

    Whoever records or replaces operations sees those of the dispatcher alone: torch.jit.trace,
    make_fx, dispatch modes. The tensors are on one device, and the first is not None.
    """
    wants_gradient = False
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                wants_gradient = True
    if torch.compiler.is_compiling():
        return "autograd" if wants_gradient else "operator"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        _refuse_transforms(op, tensors)
    if wants_gradient:
        if torch._C._get_tracing_state() is not None:
            fail(
                NotImplementedError,
                op,
                "an input",
                "a tensor that requires grad, in torch.jit.trace",
                "none: a traced graph has no gradient of this operator",
                "Trace under torch.no_grad(), or use torch.compile or torch.export.",
            )
        return "autograd"
    return "direct" if _are_ordinary(tensors) else "operator"


def is_direct(tensors: Sequence[Maybe]) -> bool:
    """Whether a native call with these tensors can be made as it is, without the dispatcher: of
    the passes of an autograd.Function, whose gradients are its own matter."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:  # torch.autograd.grad(is_grads_batched=True): no transform is active there
        if x is not None and torch._C._functorch.is_legacy_batchedtensor(x):
            return False
    return _are_ordinary(tensors)


_ORDINARY = (Tensor, torch.nn.Parameter)


def _are_ordinary(tensors: Sequence[Maybe]) -> bool:
    """Whether nobody records or replaces operations, and tensors are what they look like."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or _fx_traces()
        or tensors[0].is_meta  # type: ignore[union-attr]
    ):
        return False
    ordinary = True
    for x in tensors:
        if x is not None and (type(x) not in _ORDINARY or x.is_neg() or x._is_zerotensor()):
            ordinary = False
    return ordinary


def _refuse_transforms(op: str, tensors: Sequence[Maybe]) -> None:
    """Forward-mode tangents and functorch wrappers would be dropped silently: refuse them."""
    for x in tensors:
        if x is None:
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            got = "inside a transform of torch.func such as vmap, grad or jvp"
        elif forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            got = "a dual tensor of forward-mode differentiation"
        else:
            continue
        fail(
            NotImplementedError,
            op,
            "an input",
            got,
            "an ordinary tensor for a compiled backend",
            'Use backend="reference", which composes with every transform.',
        )


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register headworks::<schema> with its body for CPU and CUDA tensors and its shapes."""
    name = schema[: schema.index("(")]

    @functools.wraps(fake)
    def on_one_device(*arguments: Any) -> Any:
        devices = {x.device for x in arguments if isinstance(x, Tensor)}
        if len(devices) > 1:
            got, remedy = ", ".join(map(str, devices)), "Move them to one."
            fail(RuntimeError, name, "the device of its tensors", got, "one device", remedy)
        return fake(*arguments)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, body, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"headworks::{name}", on_one_device, lib=LIBRARY)


def described(
    function: NativeFunction,
    backend: str,
    inputs: Sequence[Maybe],
    outputs: Sequence[Maybe],
    numbers: Sequence[float] = (),
) -> NativeCall:
    """A call that is not made, for hw.explain."""
    return function.name, backend, [*inputs, *outputs], tuple(numbers)


def empties(*tensors: Maybe) -> tuple[Maybe, ...]:
    """Unfilled contiguous tensors of the same shapes and dtypes; None for None."""
    return tuple(
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors
    )


def fixed_arity(outputs: tuple[Maybe, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for an absent one."""
    dtype = ACCUMULATION[like.dtype]
    return tuple(
        torch.empty(0, dtype=dtype, device=like.device) if x is None else x for x in outputs
    )


def widen(x: Tensor) -> Tensor:
    """[..., 0] as [..., 1] of zeros. To native code a tensor without memory is an absent one, so
    values of width 0, whose state still counts keys, are taken as values of width 1."""
    return torch.nn.functional.pad(x, (0, 1))


def autocasts(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of `x`."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype; fp64 is left alone, as torch does."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def as_written(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For the references: no autocast, which has been applied to the inputs already."""
    if autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
