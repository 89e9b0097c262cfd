# SPDX-License-Identifier: Apache-2.0
"""NaN and infinities in one element of one input, for every operator.

What depends on the element must be NaN or infinite where the reference is. What does not may be NaN
where the reference is, for 0 times NaN is NaN wherever a product is not left out. Whether an output
depends on the element is found by two finite values of it.

Infinities are not planted where formulas that are equal for numbers differ: a row temperature
multiplies q before the product, with key_gain a score is a difference of infinities, and linear
attention has weights through features.
"""

from __future__ import annotations

import pytest
import torch

from backends import identify, targets
from headworks.testing import evaluate
from specs import SPECS

pytestmark = [pytest.mark.operator, pytest.mark.no_comparison]

VALUES = (torch.nan, torch.inf, -torch.inf)


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

    for name, x in tensors.items():
        if not x.is_floating_point() or not x.numel():
            continue
        first, second = (outputs("reference", planted(tensors, name, v)) for v in (0.25, -1.5))
        for value in VALUES:
            differs = name == "row_temperature" or "key_gain" in tensors or "linear" in spec.name
            if differs and value == value:  # not NaN
                continue
            given = planted(tensors, name, value)
            expected, actual = outputs("reference", given), outputs(backend, given)
            for output, y in actual.items():
                label = f"{output} with {value} in {name}"
                depends = (first[output] != second[output]) | first[output].isnan()
                check_masks(label, y, expected[output], depends)


def check_masks(label, actual, expected, depends):
    for mask in (torch.isnan, torch.isposinf, torch.isneginf):
        got, wanted = mask(actual), mask(expected)
        wrong = (got != wanted) & depends | got & ~wanted & ~expected.isnan()
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{label}: {actual[at].item()} at {list(at)}, the reference has "
                f"{expected[at].item()} ({int(wrong.sum())} such elements)"
            )
    finite = expected.isfinite() & actual.isfinite()
    assert actual.shape == expected.shape and finite.numel() == actual.numel()
