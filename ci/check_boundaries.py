#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Rules that keep the layers apart, checked on the text of csrc/ and on the syntax of python/.

    torch       no torch, ATen or c10 header anywhere in csrc/
    python      Python and pybind11 headers only in csrc/binding/
    hardware    only the seam, csrc/core/gpu/, spells out coordinates, barriers, shuffles, inline
                assembly and launches (core/macros.h names the qualifiers; features of
                a CPU are asked for in assembly)
    exit        native code throws; it never exits, aborts or prints
    atomics     no floating-point atomics: their order, and so the result, would vary

Comments and (but for assembly) string literals do not count.

    reference   the oracle must not share code with what it judges. A module of ops/ imports the
                reference of its operator whole, `from ...reference import X as reference`, and
                calls it only where a backend equals "reference"; no other module imports any

Usage: check_boundaries.py [CSRC_FOLDER [PYTHON_FOLDER]]
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = {".h", ".cpp", ".cuh", ".cu", ".in", ".inl"}


@dataclass(frozen=True)
class Rule:
    """A pattern that must not occur in files under `where`, except under `allowed`."""

    name: str
    pattern: re.Pattern[str]
    remedy: str
    where: str = ""
    allowed: tuple[str, ...] = ()
    literals: bool = False  # look into string literals too: inline assembly is one


HARDWARE = (
    r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b"
    r"|\b__sync(threads|warp)\w*|\b__shfl\w*|\b__(ballot|any|all|activemask)(_sync)?\s*\("
    r"|\b(asm|__asm__?)\b\s*(volatile\b\s*)?\(|<<<|\b__(shared|global|device)__\b"
)

RULES = (
    Rule(
        "torch",
        re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)/"),
        "pass pointers, sizes and strides; torch stays in Python",
    ),
    Rule(
        "python",
        re.compile(r"#\s*include\s*[<\"](Python\.h|pybind11/)"),
        "only csrc/binding/ knows Python",
        allowed=("binding/",),
    ),
    Rule(
        "hardware",
        re.compile(HARDWARE),
        "use the names of core/gpu/device.cuh",
        allowed=("core/gpu/", "core/macros.h", "core/host/cpu_features.cpp", "emu/"),
    ),
    Rule(
        "exit",
        re.compile(
            r"\b(std::)?(exit|_exit|quick_exit|abort|terminate|printf|fprintf|puts|perror)\s*\("
            r"|\bstd::(cout|cerr|clog)\b|\bassert\s*\("
        ),
        "throw hw::Error (core/error.h)",
    ),
    Rule(
        "atomics",
        re.compile(
            r"\batomic_?[Aa]dd(_block|_system)?\s*(<\s*(float|double|half|__half|__nv_bfloat16)\b"
            r"|\(\s*(reinterpret_cast<|static_cast<|\()\s*"
            r"(float|double|half|__half|__nv_bfloat16)\b"
            r"|\([^;]*\b\d+\.\d*f?\b)"
            r"|\batomic_?[Aa]dd\s*\(\s*(float|double|bf16|f16)\s*\*"
            r"|\bstd::atomic(_ref)?\s*<\s*(float|double)\b|\bred\.\w+(\.\w+)*\.(f16|f32|f64|bf16)"
            r"|#\s*pragma\s+omp\s+atomic"
        ),
        "reduce in a fixed order",
        literals=True,
    ),
)


def code_only(text: str, *, literals: bool = False) -> str:
    """The text with comments (and literals, unless wanted) blanked, line breaks kept."""
    include, literal = r"^[ \t]*#[ \t]*include[^\n]*", r"\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'"
    token = re.compile(
        rf"(?P<include>{include})|(?P<literal>{literal})|//[^\n]*|/\*.*?\*/",
        re.MULTILINE | re.DOTALL,
    )

    def replace(match: re.Match[str]) -> str:
        if match["include"] or (literals and match["literal"]):
            return match.group()
        return re.sub(r"[^\n]", " ", match.group())

    return token.sub(replace, text)


def violations(root: Path) -> list[str]:
    """One line per breach: file, line, rule, what was found, what to do instead."""
    found = []
    for path in sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES):
        name = path.relative_to(root).as_posix()
        text = path.read_text()
        for rule in RULES:
            if not name.startswith(rule.where) or name.startswith(rule.allowed or ("\0",)):
                continue
            code = code_only(text, literals=rule.literals)
            for match in rule.pattern.finditer(code):
                line = code.count("\n", 0, match.start()) + 1
                what = match.group().strip()
                found.append(f"{root.name}/{name}:{line}: {rule.name}: {what!r}: {rule.remedy}")
    return found


def reference_violations(root: Path) -> list[str]:
    """One line per breach of the rule of the reference in the package that lies in root/."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if "reference" in parts[:-1]:
            continue
        tree = ast.parse(path.read_text())
        dispatches = "ops" in parts[:-1]
        found += [
            f"{root.name}/{path.relative_to(root).as_posix()}:{line}: reference: {what}"
            for line, what in sorted(
                [*_imports(tree, dispatches), *(_uses(tree) if dispatches else ())]
            )
        ]
    return found


def _imports(tree: ast.Module, dispatches: bool) -> Iterator[tuple[int, str]]:
    """The imports of the reference that a module may not have."""
    allowed = {id(node) for node in tree.body} if dispatches else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            continue
        if not any("reference" in module.split(".") for module in modules):
            continue
        as_one = (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[-1] == "reference"
            and [alias.asname for alias in node.names] == ["reference"]
        )
        if not as_one or id(node) not in allowed:
            yield (
                node.lineno,
                f"{ast.unparse(node)!r}: write production's own, or dispatch in ops/ by "
                "'from ...reference import X as reference'",
            )


def _uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Uses of the name `reference` that are no call of `reference.f` for that backend."""
    behind = {
        id(call.func.value)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and _asks_for_reference(test.test)
        for statement in test.body
        for call in ast.walk(statement)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "reference" and id(node) not in behind:
            yield node.lineno, "call it where 'backend == \"reference\"' holds, nowhere else"


def _asks_for_reference(test: ast.expr) -> bool:
    """Whether an expression is `name == "reference"`."""
    return (
        isinstance(test, ast.Compare)
        and [type(operator) for operator in test.ops] == [ast.Eq]
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value == "reference"
    )


def main() -> int:
    """Prints the breaches; the exit status."""
    home = Path(__file__).parents[1]
    given = [Path(argument) for argument in sys.argv[1:]]
    csrc, python = given + [home / "csrc", home / "python"][len(given) :]
    for root in (csrc, python):
        if not root.is_dir():
            print(f"check_boundaries: {root} is no folder", file=sys.stderr)
            return 2
    found = violations(csrc) + reference_violations(python)
    rules = f"{len(RULES)} rules hold in {csrc.name}/, 1 in {python.name}/"
    print("\n".join(found) if found else f"boundaries: {rules}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
