# SPDX-License-Identifier: Apache-2.0
"""The checks under ci/ find what they promise to find: every breach is planted once."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from test_planted_faults import FAULTS

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


boundaries = load("check_boundaries")
docs = load("check_docs")
headers = load("check_headers")
sizes = load("check_sizes")

PLANTED = [
    ("torch", "core/a.h", "#include <torch/extension.h>"),
    ("torch", "binding/a.cpp", '#  include "ATen/ATen.h"'),
    ("torch", "ops/x/a.cuh", "#include <c10/cuda/CUDAStream.h>"),
    ("python", "ops/x/a.cpp", "#include <pybind11/pybind11.h>"),
    ("python", "core/a.h", "#include <Python.h>"),
    ("hardware", "ops/x/a.cuh", "int i = threadIdx.x;"),
    ("hardware", "ops/x/a.cuh", "int i = blockIdx.y * blockDim.y;"),
    ("hardware", "ops/x/a.cuh", "__syncthreads();"),
    ("hardware", "ops/x/a.cuh", "__syncwarp(mask);"),
    ("hardware", "ops/x/a.cuh", "v = __shfl_xor_sync(0xffffffffu, v, 1);"),
    ("hardware", "ops/x/a.cuh", "bool b = __any_sync(m, p);"),
    ("hardware", "ops/x/a.cuh", 'asm volatile("bar.sync 0;");'),
    ("hardware", "ops/x/a.h", 'asm("nop");'),
    ("hardware", "ops/x/a.cuh", "kernel<<<grid, block>>>(p);"),
    ("hardware", "ops/x/a.cuh", "__shared__ float s[32];"),
    ("exit", "ops/x/a.cpp", "exit(1);"),
    ("exit", "core/a.cpp", "std::abort();"),
    ("exit", "binding/a.cpp", 'printf("x");'),
    ("exit", "emu/a.cpp", 'fprintf(stderr, "x");'),
    ("exit", "core/a.h", "std::cerr << x;"),
    ("exit", "core/a.h", "assert(x > 0);"),
    ("atomics", "ops/x/a.cuh", "atomicAdd(reinterpret_cast<float*>(p), x);"),
    ("atomics", "core/gpu/device.cuh", "atomic_add((float*)p, x);"),
    ("atomics", "ops/x/a.cuh", "atomicAdd(p, 1.0f);"),
    ("atomics", "core/gpu/device.cuh", "inline float atomic_add(float* p, float x);"),
    ("atomics", "ops/x/a_cpu.cpp", "std::atomic<float> sum;"),
    ("atomics", "ops/x/a_cpu.cpp", "#pragma omp atomic\nsum += x;"),
    ("atomics", "core/gpu/device.cuh", 'asm volatile("red.global.add.f32 [%0], %1;");'),
]

HARMLESS = [
    ("ops/x/a.cuh", "// threadIdx is not used here; std::abort() neither"),
    ("ops/x/a.cuh", "/* __syncthreads();\n exit(1) */ int x;"),
    ("ops/x/a.cpp", 'check(ok, "exit(1) and threadIdx");'),
    ("ops/x/a.h", "static_assert(sizeof(int) == 4);"),
    (
        "core/gpu/device.cuh",
        'asm volatile("bar.sync 0;"); int i = threadIdx.x; atomicAdd(&count, 1);',
    ),
    ("binding/module.cpp", "#include <pybind11/pybind11.h>"),
    ("ops/x/a.cpp", "std::vector<std::vector<std::pair<int, int>>> x; y = a >> 3;"),
]


def plant(folder, name, text):
    path = folder / "csrc" / name
    path.parent.mkdir(parents=True)
    path.write_text(text + "\n")
    return folder / "csrc"


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED)
def test_a_planted_breach_is_found(tmp_path, rule, name, text):
    found = boundaries.violations(plant(tmp_path, name, f"int before;\n{text}"))
    assert found
    assert all(f"csrc/{name}:2: {rule}: " in line for line in found)


@pytest.mark.parametrize(("name", "text"), HARMLESS)
def test_harmless_text_is_not_reported(tmp_path, name, text):
    assert boundaries.violations(plant(tmp_path, name, text)) == []


def test_our_own_tree_keeps_the_boundaries():
    assert boundaries.violations(ROOT / "csrc") == []


OURS = "from ...reference import attention as reference\n"
BEHIND = (
    OURS
    + """
def f(x, backend):
    if backend == "reference":
        with as_written(x):
            return reference.attention(x)
"""
)
PLANTED_IMPORTS = {
    "outside of ops": ("nn/a.py", OURS, 1),
    "absolute": ("ops/a.py", "import headworks.reference.attention", 1),
    "a name of it": ("ops/x/_checks.py", "from ...reference.bilevel_routing import Grid", 1),
    "by its own name": ("ops/x/a.py", "from ...reference import attention", 1),
    "the package": ("ops/x/a.py", "from ... import reference", 1),
    "two at once": ("ops/x/a.py", "from ...reference import a as reference, b", 1),
    "in a function": ("ops/x/a.py", "def f():\n    " + OURS, 2),
    "called without asking": ("ops/x/a.py", OURS + "def f(x):\n    reference.f(x)", 3),
    "called otherwise": ("ops/x/a.py", BEHIND + "    else:\n        reference.f(x)", 8),
    "another test": ("ops/x/a.py", BEHIND.replace("==", "!="), 6),
    "not called": ("ops/x/a.py", BEHIND.replace(".attention(x)", ".EPS"), 6),
    "handed on": ("ops/x/a.py", BEHIND + "        g(reference)", 7),
}


@pytest.mark.parametrize("planted", PLANTED_IMPORTS)
def test_a_planted_use_of_the_reference_is_found(tmp_path, planted):
    name, text, line = PLANTED_IMPORTS[planted]
    path = tmp_path / "headworks" / name
    path.parent.mkdir(parents=True)
    path.write_text(text + "\n")
    found = boundaries.reference_violations(tmp_path)
    assert len(found) == 1 and f"headworks/{name}:{line}: reference: " in found[0]


def test_the_reference_behind_its_backend_is_not_reported(tmp_path):
    for name, text in (("ops/x/a.py", BEHIND), ("reference/b.py", "from .a import f\n")):
        path = tmp_path / "headworks" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert boundaries.reference_violations(tmp_path) == []


def test_production_does_without_the_reference():
    assert boundaries.reference_violations(ROOT / "python") == []


def test_every_rule_has_a_planted_breach():
    assert {rule.name for rule in boundaries.RULES} == {rule for rule, _, _ in PLANTED}


def test_dead_links_and_paths_in_markdown_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "there.md").write_text("# A Heading, here\n")
    page = tmp_path / "docs" / "page.md"
    page.write_text(
        "[good](there.md) [anchor](there.md#a-heading-here) [web](https://example.org)\n"
        "[dead](gone.md) and `docs/there.md`, `docs/gone.md`, `docs/<op>.md`, `docs/*.md`\n"
        "[no heading](there.md#other)\n"
    )
    found = docs.dead_references(tmp_path, [page])
    assert [line.split(": ", 1)[1] for line in found] == [
        "no such file: gone.md",
        "no such file: docs/gone.md",
        "no such heading: there.md#other",
    ]
    assert found[0].startswith("docs/page.md:2")


def test_public_functions_without_docstring_are_found(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        '"""A module."""\n\n\ndef told():\n    """Says what it does."""\n'
        "\n\ndef mute():\n    pass\n"
        "\n\ndef _private():\n    pass\n\n\nclass Thing:\n    pass\n"
    )
    assert docs.missing_docstrings(tmp_path, [module]) == [
        "module.py:8: mute has no docstring",
        "module.py:16: Thing has no docstring",
    ]
    module.write_text("x = 1\n")
    assert docs.missing_docstrings(tmp_path, [module]) == [
        "module.py:1: the module has no docstring"
    ]


FORMS = {  # of a function of 80 lines, with the name that is reported
    "plain": ("int f(int x) {\n%s}\n", "f"),
    "template": ("template <int A, typename B = C<D>>\nint f(A x) {\n%s}\n", "f"),
    "constrained": ("template <class T>\n  requires(ok<T>)\nint f() {\n%s}\n", "f"),
    "member": ("namespace a {\nstruct alignas(16) S : B<1> {\nvoid g() const {\n%s}\n};}\n", "g"),
    "constructor": ("S::S(int a)\n: a_(a), b_{a}, c_{a} {\n%s}\n", "S"),
    "default": ("int f(A a = {}, B b = {1}) {\n%s}\n", "f"),
    "returns": ("auto f(int x) -> decltype(g(x)) {\n%s}\n", "f"),
    "lambda": ("constexpr auto f = [](int x) {\n%s};\n", "f"),
    "operator": ("S& S::operator=(const S& x) {\n%s}\n", "operator="),
    "extern": ('extern "C" {\nint f(int x) {\n%s}\n}\n', "f"),
    "directive": ("#define M(x) {{{ \\\n  {\nint f(int x) {\n%s}\n", "f"),
    "behind": ("enum A { a, b };\nconst int t[] = {1, 2};\nint v{3};\nint f() {\n%s}\n", "f"),
    "Python": ('def f():\n    """Says\n    much.\n    """\n%s', "f"),
    "inner": ("class A:\n    async def f():\n        def g():\n            return 1\n%s", "f"),
}


LINES = {"Python": "    x = 1\n", "inner": "        x = 1\n"}


@pytest.mark.parametrize("form", FORMS)
def test_functions_that_are_too_long_are_found(tmp_path, form):
    text, name = FORMS[form]
    is_python = form in ("Python", "inner")
    file = tmp_path / ("a.py" if is_python else "a.cuh")
    line = LINES.get(form, "  x = {{1}};  // }\n")
    file.write_text(text % line)
    functions = sizes.python_functions if is_python else sizes.cpp_functions
    shortest = next(length for found, _, length in functions(file.read_text()) if found == name)
    for more in (80, 81):
        file.write_text(text % (line * (more - shortest + 1)))
        found = sizes.violations(tmp_path, [file])
        assert len(found) == more - 80, found
    assert f"{name} has 81 lines" in found[0]


def test_files_and_lines_that_are_too_long_are_found(tmp_path):
    file = tmp_path / "a.h"
    file.write_text("int x;\n" * 499 + "//" + "x" * 98 + "\n")
    assert sizes.violations(tmp_path, [file]) == []
    file.write_text("int x;\n" * 500 + "//" + "x" * 99 + "\n")
    assert sizes.violations(tmp_path, [file]) == [
        "a.h:501: the file has 501 lines, at most 500",
        "a.h:501: 101 columns, at most 100",
    ]


ONCE = "#pragma once\n"
SOUND = {
    "core/gpu/device.cuh": ONCE + "#ifndef HW_EMULATE\n#error kernels only\n#endif\n",
    "core/a.h": ONCE + "#include <vector>\ninline std::vector<int> a();\n",
    "ops/b.cuh": ONCE + '#include "core/gpu/device.cuh"\ninline void b();\n',
    "binding/c.h": ONCE + "#include <Python.h>\n",
}
UNSOUND = {
    "no include": ("ops/x.h", ONCE + "inline std::vector<int> x();\n", "x.h:2: .*vector"),
    "of another": ("ops/x.h", ONCE + '#include "ops/y.h"\n', "x.h:1: ops/y.h:1: .*vector"),
    "twice": ("ops/x.h", "struct X {};\n", "x.h:1: redefinition"),
    "a kernel's": ("ops/x.h", ONCE + '#include "ops/b.cuh"\n', "x.h:1: .*device.cuh:3: .*kernels"),
    "no kernel's": ("ops/x.cuh", ONCE + '#include "core/a.h"\n', "x.cuh:1: no kernel's code"),
    "Python": ("ops/x.h", ONCE + "#include <Python.h>\n", "x.h:2: Python.h: No such file"),
}


def tree(folder, files):
    for name, text in files.items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "csrc"


@pytest.mark.parametrize("planted", UNSOUND)
def test_headers_that_do_not_compile_alone_are_found(tmp_path, planted):
    name, text, words = UNSOUND[planted]
    csrc = tree(tmp_path, SOUND | {name: text})
    if planted == "of another":
        (csrc / "ops" / "y.h").write_text("std::vector<int> y();\n")
    found = [line for line in headers.violations(csrc, {}) if "/x." in line.partition(":")[0]]
    assert len(found) == 1 and re.match(f"csrc/ops/{words}", found[0]), found


def test_headers_are_compiled_again_when_what_they_include_changed(tmp_path, monkeypatch):
    csrc, sound = tree(tmp_path, SOUND), {}
    assert headers.violations(csrc, sound) == []
    compiled = []
    compile_one = headers._compile
    monkeypatch.setattr(
        headers, "_compile", lambda *a: compiled.append(a[1].name) or compile_one(*a)
    )
    assert headers.violations(csrc, sound) == [] and compiled == []
    (csrc / "core/gpu/device.cuh").write_text(SOUND["core/gpu/device.cuh"] + "int second;\n")
    headers._digest.cache_clear()
    assert headers.violations(csrc, sound) == [] and compiled == ["device.cuh", "b.cuh"]


LISTED = """
from typing import NamedTuple
class Operator(NamedTuple):
    name: str
    page: str
OPERATORS = (Operator("scan", "scan"), Operator("scan_step", "scan"), Operator("route", "route"))
"""


def test_operators_that_no_page_names_are_found(tmp_path):
    for folder in ("python/headworks", "docs/ops"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "python/headworks/_operator_list.py").write_text(LISTED)
    (tmp_path / "README.md").write_text("`hw.scan_step`, `hw.route`\n")
    (tmp_path / "docs/ops/scan.md").write_text("`hw.scan`\n")
    assert docs.unnamed_operators(tmp_path) == [
        "README.md: does not name scan",
        "docs/ops/scan.md: does not name scan_step",
        "docs/ops/route.md: no such page, that of route",
    ]


def test_the_examples_of_the_readme_run():
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["o"].shape == (1, 8, 64) and names["o"].isfinite().all()
        assert names["q"].grad.abs().sum() > 0


def test_every_fault_can_be_planted():
    """The text that a fault replaces occurs once: plants follow the sources."""
    for fault in FAULTS:
        text = (ROOT / "csrc" / fault.file).read_text()
        assert text.count(fault.right) == 1, f"{fault.name}: {fault.right!r} in {fault.file}"
        assert fault.wrong != fault.right
