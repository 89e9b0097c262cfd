#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Words that are checked: references in Markdown resolve, public names have docstrings.

    links        [text](path) and [text](path#heading): the file and the heading exist
    paths        `folder/name.ext` in back quotes, from the repository's root, exists; a path with
                 a placeholder (<op>, *, {a,b}) is left out, and so is what a build or a person adds
    docstrings   every public module and its public classes and functions in python/headworks
    operators    README and the page of an operator (headworks/_operator_list.py) name it

Usage: check_docs.py
"""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
QUOTED = re.compile(r"`([\w.-]+(?:/[\w.-]+)+/?)`")
HEADING = re.compile(r"^#+\s+(.*?)\s*$", re.MULTILINE)
ELSEWHERE = ("build/", "dist/", "third_party/cutlass")


def dead_references(root: Path, pages: Sequence[Path]) -> list[str]:
    """Links and paths in Markdown that lead nowhere."""
    tops = {path.name for path in root.iterdir()}
    found = []
    for page in pages:
        name = page.relative_to(root).as_posix()
        for number, line in _lines_outside_code(page.read_text()):
            for target in LINK.findall(line):
                problem = _link_problem(page, target)
                if problem:
                    found.append(f"{name}:{number}: {problem}")
            for path in QUOTED.findall(line):
                ours = path.split("/")[0] in tops and not path.startswith(ELSEWHERE)
                if ours and not (root / path).exists():
                    found.append(f"{name}:{number}: no such file: {path}")
    return found


def missing_docstrings(root: Path, modules: Sequence[Path]) -> list[str]:
    """Public modules, classes and functions that say nothing about themselves."""
    found = []
    for module in modules:
        name = module.relative_to(root).as_posix()
        tree = ast.parse(module.read_text())
        if tree.body and not ast.get_docstring(tree):
            found.append(f"{name}:1: the module has no docstring")
        found += [f"{name}:{line}: {what} has no docstring" for line, what in _mute(tree)]
    return found


def unnamed_operators(root: Path) -> list[str]:
    """Operators that README or their own page does not name."""
    source = root / "python" / "headworks" / "_operator_list.py"
    found = []
    for operator in runpy.run_path(str(source))["OPERATORS"]:
        name = re.compile(rf"\b{operator.name}\b")
        for page in ("README.md", f"docs/ops/{operator.page}.md"):
            if not (root / page).is_file():
                found.append(f"{page}: no such page, that of {operator.name}")
            elif not name.search((root / page).read_text()):
                found.append(f"{page}: does not name {operator.name}")
    return found


def _lines_outside_code(text: str) -> Iterator[tuple[int, str]]:
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def _link_problem(page: Path, target: str) -> str | None:
    if re.match(r"[a-z]+:", target):
        return None
    file, _, heading = target.partition("#")
    path = (page.parent / file) if file else page
    if not path.exists():
        return f"no such file: {file}"
    if heading and heading not in _anchors(path.read_text()):
        return f"no such heading: {target}"
    return None


def _anchors(text: str) -> set[str]:
    """Heading anchors the way that code hosts make them."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(text)
    }


def _mute(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in tree.body:
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if named and not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.lineno, node.name


def tracked(root: Path, pattern: str) -> list[Path]:
    """Files that git knows or could add."""
    command = ["git", "ls-files", "-co", "--exclude-standard", pattern]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return [root / name for name in sorted(set(names.splitlines())) if (root / name).is_file()]


def main() -> int:
    """Prints what is missing; the exit status."""
    root = Path(__file__).resolve().parents[1]
    pages = tracked(root, "*.md")
    modules = [p for p in tracked(root, "python/headworks/*.py") if not p.name.startswith("_")]
    found = dead_references(root, pages) + missing_docstrings(root, modules)
    found += unnamed_operators(root)
    print("\n".join(found) if found else f"docs: {len(pages)} pages, {len(modules)} modules: sound")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
