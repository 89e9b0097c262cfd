# SPDX-License-Identifier: Apache-2.0
"""The list of operators, and what is written out elsewhere, say the same."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import headworks as hw
from bench import suite
from headworks import ops
from headworks._native import NATIVE_CALLS
from headworks._operator_list import OPERATORS
from headworks.cost import operators
from specs import SPECS

ROOT = Path(__file__).parents[1]
NAMES = [operator.name for operator in OPERATORS]
SPECIFIED = [operator.name for operator in OPERATORS if operator.has_spec]
# What headworks exports beside operators.
OTHERS = {"Aux", "AuxResult", "CascadeWeights", "Cost", "Explanation", "KeyScanState",
          "LinearState", "build_info", "cost", "explain", "models", "nn"}  # fmt: skip


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES)


def test_the_package_exports_the_operators():
    assert set(hw.__all__) == {*NAMES, *OTHERS}
    assert list(hw.__all__) == sorted(hw.__all__)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_an_operator_lies_where_the_list_says(operator):
    module = importlib.import_module(f"headworks.ops.{operator.module}")
    function = getattr(hw, operator.name)
    assert function is getattr(module, operator.name)
    assert function.__module__ == module.__name__
    assert operator.family in {path.name for path in (ROOT / "python/headworks/ops").iterdir()}


def test_every_public_module_of_ops_is_on_the_list():
    found = {
        module.name
        for module in pkgutil.walk_packages(ops.__path__, "headworks.ops.")
        if not module.ispkg and not module.name.rpartition(".")[2].startswith("_")
    }
    assert found == {f"headworks.ops.{operator.module}" for operator in OPERATORS}


def test_every_function_with_a_backend_is_on_the_list():
    found = {
        function.__name__
        for name in {operator.module for operator in OPERATORS}
        for function in vars(importlib.import_module(f"headworks.ops.{name}")).values()
        if inspect.isfunction(function)
        and not function.__name__.startswith("_")
        and function.__module__ == f"headworks.ops.{name}"
        and inspect.signature(function).parameters.get("backend")
        and inspect.signature(function).parameters["backend"].default == "auto"
    }
    assert found == set(SPECIFIED)


def test_specifications_are_those_of_the_list():
    assert [(spec.name, spec.function) for spec in SPECS] == [
        (n, getattr(hw, n)) for n in SPECIFIED
    ]
    shared = {"attention_cases", "pairs", "routing"}
    files = {path.stem for path in (ROOT / "tests" / "specs").glob("[!_]*.py")}
    assert files - shared == set(SPECIFIED)


def test_what_is_compiled_can_be_explained():
    assert set(NATIVE_CALLS) == {s.function for s in SPECS if s.dtypes}


def test_costs_are_those_of_the_list():
    named = [operator.name for operator in OPERATORS if operator.has_cost]
    assert sorted(operators()) == sorted(named)


def test_suites_are_those_of_the_list():
    for name in suite.SUITES:
        text = (ROOT / "bench" / f"{name}.py").read_text()
        timed = [operator.name for operator in OPERATORS if operator.suite == name]
        assert timed and all(f"hw.{operator}" in text for operator in timed)
        assert callable(suite.load(name).cases)
    unlisted = {path.stem for path in (ROOT / "bench").glob("*.py")} & set(NAMES)
    assert unlisted <= set(suite.SUITES)


def test_every_operator_is_in_the_summary_of_the_package():
    assert [name for name in NAMES if name not in hw.__doc__] == []


def test_the_list_costs_an_import_nothing():
    """It loads without the package, and the package without it."""
    code = "import sys, headworks; print('headworks._operator_list' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print('torch' in sys.modules)"
    file = str(ROOT / "python/headworks/_operator_list.py")
    done = subprocess.run(
        [sys.executable, "-c", code, file], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
