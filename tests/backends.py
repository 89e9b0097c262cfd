# SPDX-License-Identifier: Apache-2.0
"""Which backends, devices, dtypes and cases the generic tests run with."""

from __future__ import annotations

import functools

import pytest
import torch

from headworks import _library
from specs import SPECS


@functools.cache
def native_info():
    """What the native library contains; nothing if it is missing, where the cpu tests fail."""
    try:
        return _library.info()
    except ImportError:
        return {}


def targets(spec, *, emulated=None):
    """(backend, device, dtype) of every compiled backend that can run here."""
    found = []
    for backend, dtypes in spec.dtypes.items():
        if backend == "cpu":
            places = [("cpu", "cpu", False)]
        else:
            places = [(f"emulate:{backend}", "cpu", True)] if native_info().get("emulator") else []
            needed = {"simt": (7, 5), "sm80": (8, 0), "sm90": (9, 0)}[backend]
            if torch.cuda.is_available() and torch.cuda.get_device_capability() >= needed:
                places.append((backend, "cuda", False))
        found += [
            (name, device, dtype)
            for name, device, is_emulated in places
            if emulated is None or emulated == is_emulated
            for dtype in dtypes
        ]
    return found


def identify(*parts):
    return "-".join(str(p).removeprefix("torch.") for p in parts)


def every_case():
    for spec in SPECS:
        for emulated, cases in ((False, spec.cases), (True, spec.emulator_cases)):
            for target in targets(spec, emulated=emulated):
                for case in cases:
                    yield pytest.param(spec, case, *target, id=identify(spec, *target[::2], case))


def samples(dtypes=(torch.float32,), *, gradients=False, batched=False):
    """(spec, case, backend, device, dtype) of sample cases on real hardware. `batched`: those whose
    tensors all have a row for each batch entry."""
    return list(_samples(dtypes, gradients, batched))


def _samples(dtypes, gradients, batched):
    for spec in SPECS:
        if gradients and not spec.differentiable:
            continue
        for target in targets(spec, emulated=False):
            for case in spec.sample_cases if target[2] in dtypes else ():
                apart = not (case.sizes.get("lengths") or case.sizes.get("shared"))
                if spec.limit(target[0], case) or (batched and not apart):
                    continue
                yield pytest.param(spec, case, *target, id=identify(spec, *target[::2], case))


SAMPLE = "spec, case, backend, device, dtype"
