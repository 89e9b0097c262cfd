# SPDX-License-Identifier: Apache-2.0
"""NaN, infinities and huge numbers in one element of one input, for every operator.

What depends on the element must be NaN or infinite where the reference is. What does not may be NaN
where the reference is, for 0 times NaN is NaN wherever a product is not left out; else it is as it
was. Whether an output depends on the element is found by two finite values of it.
"""

from __future__ import annotations

import pytest
import torch

from backends import identify, targets
from headworks.testing import evaluate
from specs import SPECS

pytestmark = pytest.mark.operator

VALUES = (torch.nan, torch.inf, -torch.inf, 1e30)


def cases():
    for spec in SPECS:
        for backend, device, dtype in targets(spec):
            if device == "cpu" and dtype in (torch.float32, torch.bfloat16):
                cases = spec.sample_cases if backend == "cpu" else spec.emulator_cases[:2]
                for case in cases:
                    if not spec.limit(backend, case):
                        name = identify(spec, backend, dtype, case)
                        yield pytest.param(spec, case, backend, dtype, id=name)


def planted(tensors, name, value):
    """The tensors with `value` as the last element of one of them."""
    x = tensors[name].clone()
    x.view(-1)[-1] = value
    return tensors | {name: x}


@pytest.mark.parametrize("spec, case, backend, dtype", list(cases()))
def test_special_values_are_where_the_reference_has_them(spec, case, backend, dtype):
    tensors = {n: x.contiguous() for n, x in spec.make(case, dtype).items()}

    def outputs(which, tensors):
        return evaluate(spec, case, which, tensors, gradients=False)

    clean = outputs(backend, tensors)
    for name, x in tensors.items():
        if not x.is_floating_point() or not x.numel():
            continue
        first, second = (outputs("reference", planted(tensors, name, v)) for v in (0.25, -1.5))
        for value in VALUES:
            given = planted(tensors, name, value)
            expected, actual = outputs("reference", given), outputs(backend, given)
            for output, y in actual.items():
                label = f"{output} with {value} in {name}"
                depends = (first[output] != second[output]) | first[output].isnan()
                check_masks(label, y, expected[output], clean[output], depends)


def check_masks(label, actual, expected, clean, depends):
    from headworks.testing import compare

    for kind in ("nan", "posinf", "neginf"):
        mask = getattr(torch, "isnan" if kind == "nan" else f"is{kind}")
        got, wanted = mask(actual), mask(expected)
        wrong = depends & (got != wanted)
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{label}: {actual[tuple(at)].item()} at {at}, the reference has "
                f"{expected[tuple(at)].item()} ({int(wrong.sum())} such elements)"
            )
    elsewhere = ~depends & ~torch.isnan(expected)
    x, y = actual[elsewhere], clean[elsewhere]
    same = (x == y) | (x.isnan() & y.isnan())
    assert same.all(), f"{label}: {int((~same).sum())} elements changed that do not depend on it"
    compare(actual.new_zeros(1), actual.new_zeros(1).double(), torch.float32)
