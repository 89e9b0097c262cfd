# SPDX-License-Identifier: Apache-2.0
"""What the tests of the routing operators share while their specifications are not in SPECS."""

from __future__ import annotations

import doctest
import functools
import importlib
import importlib.util
import inspect
import sys
import types
from unittest import mock

import pytest
import torch

from headworks.testing import HALF, check_case


def cases_of(spec):
    """(case, dtype): every case in fp32, those that have all the options in half precision too."""
    cases = (*spec.cases, *spec.emulator_cases, *spec.sample_cases)
    both = [(case, torch.float32) for case in cases]
    both += [(case, dtype) for case in spec.sample_cases for dtype in HALF]
    return [
        pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
        for case, dtype in both
    ]


def check_reference(spec, case, dtype):
    """The reference in `dtype` against the reference in fp64, outputs and gradients."""
    check_case(spec, case, "reference", dtype)


def check_example(function):
    """The example in a docstring gives what it says."""
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    text = inspect.getdoc(function)
    example = parser.get_doctest(text, {"torch": torch}, function.__name__, None, None)
    assert example.examples
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def on_both_backends(module, **functions):
    """A fixture under which a test module's `functions` run on the reference, then on the CPU."""

    @pytest.fixture(params=("reference", "cpu"))
    def on_both(request, monkeypatch):
        for name, function in functions.items():
            monkeypatch.setitem(module, name, functools.partial(function, backend=request.param))

    return on_both


def routing_transformer():
    """The module of PyPI's routing-transformer, without the three packages whose layers it offers
    beside its own."""
    if importlib.util.find_spec("routing_transformer") is None:
        pytest.skip("the peer is not installed: pip install routing-transformer")
    others = {
        "local_attention": "LocalAttention",
        "product_key_memory": "PKM",
        "mixture_of_experts": "MoE",
    }
    stubs = {}
    for name, layer in others.items():
        stubs[name] = types.ModuleType(name)
        setattr(stubs[name], layer, None)
    with mock.patch.dict(sys.modules, stubs):
        return importlib.import_module("routing_transformer.routing_transformer")
