#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sizes of the sources, C++ and Python: what CONTRIBUTING states, counted.

    files        at most 500 lines
    functions    at most 80 lines, from the first one of the declaration to the last one of the
                 body; a Python docstring and decorators do not count, inner functions do
    lines        at most 100 columns

Usage: check_sizes.py [FILE...]      without files, all that git knows or could add
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from check_boundaries import SUFFIXES, code_only
from check_docs import tracked

FILE, FUNCTION, LINE = 500, 80, 100

_CONTAINER = re.compile(
    r"(?:(?:inline|static|typedef|constexpr)\s+)*(?:namespace|struct|class|union|enum|extern)\b"
)
_ATTRIBUTE = re.compile(r"\b(?:alignas|requires|__attribute__)\s*(\((?:[^()]|\([^()]*\))*\))+")
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)


def violations(root: Path, paths: list[Path]) -> list[str]:
    """One line per breach: file, line, what is too large."""
    found = []
    for path in paths:
        text = path.read_text()
        lines = text.splitlines()
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        if len(lines) > FILE:
            found.append(f"{name}:{FILE + 1}: the file has {len(lines)} lines, at most {FILE}")
        for number, line in enumerate(lines, 1):
            if len(line) > LINE:
                found.append(f"{name}:{number}: {len(line)} columns, at most {LINE}")
        functions = python_functions if path.suffix == ".py" else cpp_functions
        for what, number, length in functions(text):
            if length > FUNCTION:
                found.append(f"{name}:{number}: {what} has {length} lines, at most {FUNCTION}")
    return found


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, first line and number of lines of every function, its docstring left out."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, node.lineno, length


def cpp_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, first line and number of lines of every function outside of functions."""
    code = _DIRECTIVE.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), code_only(text))
    start = at = 0  # of the declaration that is being read, and of the search in it
    while match := re.compile(r"[{};]").search(code, at):
        at = match.end()
        head = code[start : match.start()]
        if match.group() == "{" and not _is_container(head):
            at = _closing(code, match.start())
            if code[at:].lstrip()[:1] in (",", ")", "{"):  # an initialiser: the body is to come
                continue
            if name := _function(head):
                first = start + len(head) - len(head.lstrip())
                yield name, code.count("\n", 0, first) + 1, code.count("\n", first, at) + 1
        start = at


def _is_container(head: str) -> bool:
    """Whether declarations are in the block: a namespace, a class, extern "C"."""
    bare = _ATTRIBUTE.sub(" ", _without_template(head))
    before_bases = re.split(r"(?<!:):(?!:)", bare)[0]
    return bool(_CONTAINER.match(bare)) and not set("(=") & set(before_bases)


def _without_template(head: str) -> str:
    """The words in front of a brace without `template <...>`."""
    head = head.strip()
    while match := re.match(r"template\s*<", head):
        depth, at = 1, match.end()
        while depth and at < len(head):
            depth += {"<": 1, ">": -1}.get(head[at], 0)
            at += 1
        head = head[at:].lstrip()
    return head


def _function(head: str) -> str:
    """The name of the function of which these words are the declaration, or nothing."""
    bare = _ATTRIBUTE.sub(" ", _without_template(head))
    before = bare.partition("(")[0]
    if match := re.search(r"(\w+)\s*=\s*\[", before):  # a lambda with a name
        return match[1]
    match = re.search(r"(operator\s*\S{0,3}|~?\w+)\s*$", before)
    is_value = re.search(r"(?<![=!<>])=(?!=)", before) and "operator" not in before
    return match[1] if match and "(" in bare and not is_value else ""


def _closing(code: str, at: int) -> int:
    """The place behind the brace that closes the one at `at`; the end if none does."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(code, at):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.end()
    return len(code)


def main() -> int:
    """Prints the breaches; the exit status."""
    root = Path(__file__).resolve().parents[1]
    paths = [Path(name).resolve() for name in sys.argv[1:]]
    if not paths:
        paths = [p for kind in (".py", *sorted(SUFFIXES)) for p in tracked(root, f"*{kind}")]
    found = violations(root, paths)
    print("\n".join(found) if found else f"sizes: {len(paths)} files, all within bounds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
