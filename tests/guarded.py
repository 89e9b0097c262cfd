# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a call between two pages that nobody may touch. Runs in a process of its own:

    python tests/guarded.py SPEC        the sample cases of a spec on the CPU
    python tests/guarded.py before|behind       reads one element too far; what the guard is for

Inputs, cotangents, outputs and workspaces begin at the start of a page or end at the end of one; an
element read or written outside of them kills the process, and the last line names the comparison.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import mmap
import sys
from unittest import mock

import torch

from headworks import _library
from headworks.testing import check_case
from headworks.testing import spec as spec_module

LIBC = ctypes.CDLL(None, use_errno=True)
PROT_NONE = 0
PAGE = mmap.PAGESIZE
ENDS = ("end", "begin")


class Guard:
    """`end`: "end", where tensors end at the page behind them, or "begin"."""

    def __init__(self, end: str):
        self.end = end

    def empty(self, shape, dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if count == 0:
            return EMPTY(shape, dtype=dtype)
        room = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, room + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for address in (first, first + PAGE + room):
            if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        offset = PAGE + (room - size if self.end == "end" else 0)
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        if dtype.is_floating_point:
            flat.fill_(float("nan"))
        elif dtype != torch.bool:
            flat.fill_(0x7F)
        return flat.view(shape)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """What is repeated lies there once."""
        for dim, stride in enumerate(x.stride()):
            if stride == 0 and x.shape[dim] > 1:
                return self.copy(x.narrow(dim, 0, 1)).expand(x.shape)
        return self.empty(x.shape, x.dtype).copy_(x)


EMPTY, NEW_EMPTY = torch.empty, torch.Tensor.new_empty


def guarded_allocations(guard: Guard):
    """torch.empty and Tensor.new_empty, with which the operators allocate."""

    def empty(*shape, dtype=None, device=None, **more):
        if more or str(device or "cpu") != "cpu":
            return EMPTY(*shape, dtype=dtype, device=device, **more)
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guard.empty(shape, dtype or torch.get_default_dtype())

    def new_empty(x, *shape, dtype=None, device=None):
        return empty(*shape, dtype=dtype or x.dtype, device=device or x.device)

    return (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
    )


def run(name: str):
    spec = importlib.import_module(f"specs.{name}").SPEC
    draw = spec_module._cotangent
    for isa in _library.info()["cpu"]["available"]:
        _library.set_cpu_isa(isa)
        for end in ENDS:
            guard = Guard(end)

            def make(*args, guard=guard):
                return {n: guard.copy(x) for n, x in spec.make(*args).items()}

            def cotangent(*args, guard=guard):
                return guard.copy(draw(*args))

            guarded = type(spec)(**{**vars(spec), "make": make})
            spec_module._cotangent = cotangent
            for case in spec.sample_cases:
                for dtype in (
                    spec.dtypes["cpu"] if end == "end" else (torch.float32, torch.bfloat16)
                ):
                    print(isa, end, case, dtype, flush=True)
                    first, second = guarded_allocations(guard)
                    with first, second:
                        check_case(guarded, case, "cpu", dtype)
    print("done", flush=True)


def main(what: str):
    faulthandler.enable()
    torch.set_num_threads(2)
    if what not in ("before", "behind"):
        return run(what)
    x = Guard("end" if what == "behind" else "begin").empty((5,), torch.float32)
    address = x.data_ptr() + (-4 if what == "before" else 20)
    print("inside", ctypes.c_float.from_address(x.data_ptr()).value, flush=True)
    print("outside", ctypes.c_float.from_address(address).value, flush=True)
    return None


if __name__ == "__main__":
    main(sys.argv[1])
