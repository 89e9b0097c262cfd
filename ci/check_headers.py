#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every header under csrc/ compiles alone, twice in a row, in the way that it is for.

    .cuh    code of kernels, by the emulator's bodies (-DHW_EMULATE); it reaches the seam,
            core/gpu/device.cuh, or it would be a .h
    .h      what the host uses: without HW_EMULATE, where the seam refuses to be compiled. Those of
            the CPU's loops (folders cpu/, names *_cpu_*) for the baseline and the widest vectors

A header whose text, and that of all it includes, was found sound before is not compiled again.

Usage: check_headers.py [--cache FILE] [CSRC_FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEAM = "core/gpu/device.cuh"
COMPILER = [os.environ.get("CXX", "c++"), "-std=c++20", "-fopenmp", "-fsyntax-only", "-x", "c++"]


def violations(csrc: Path, sound: dict[str, dict[str, str]]) -> list[str]:
    """One line per header that does not compile; `sound`: by command and header the digests of all
    files it was made of when it did. Used and brought up to date."""
    found = []
    for header in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cuh")):
        name = header.relative_to(csrc).as_posix()
        for flags in _variants(name):
            key = " ".join([_compiler(), *flags, str(header)])
            if _is_unchanged(sound.get(key, {})):
                continue
            sound.pop(key, None)
            error, files = _compile(csrc, header, flags)
            if not error and header.suffix == ".cuh" and csrc / SEAM not in files:
                error = f"1: no kernel's code, as it does not include {SEAM}: call it .h"
            if error:
                found.append(f"{csrc.name}/{name}:{error}")
                break
            sound[key] = {str(file): _digest(file) for file in files}
    return found


def _variants(name: str) -> Iterator[list[str]]:
    """The flags with which a header is compiled, one list after the other."""
    if name.endswith(".cuh"):
        yield ["-DHW_EMULATE"]
        return
    yield ["-isystem", sysconfig.get_path("include")] if name.startswith("binding/") else []
    is_of_cpu = "cpu" in name.split("/")[:-1] or "_cpu_" in name
    if is_of_cpu and platform.machine() in ("x86_64", "AMD64"):
        yield _widest()


def _compile(csrc: Path, header: Path, flags: list[str]) -> tuple[str, list[Path]]:
    """The first error as "line: text", "" if there is none; the files under csrc that were read."""
    with tempfile.TemporaryDirectory() as folder:
        rule = Path(folder) / "rule.d"
        run = subprocess.run(
            [*COMPILER, "-I", str(csrc), *flags, "-MMD", "-MF", str(rule), "-MT", "x", "-"],
            input=f'#include "{header}"\n' * 2, capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode:
            return _first_error(run.stderr, csrc, header), []
        files = rule.read_text().replace("\\\n", " ").split()[1:]
    return "", [Path(file) for file in files if file != "-"]


def _first_error(errors: str, csrc: Path, header: Path) -> str:
    match = re.search(r"^(\S+?):(\d+)(?::\d+)?: (?:fatal )?error: (.*)", errors, re.MULTILINE)
    if match is None:
        return f"1: {errors.strip()}"
    file, line, text = Path(match[1]), match[2], match[3]
    if file == header:
        return f"{line}: {text}"
    return f"1: {file.relative_to(csrc) if csrc in file.parents else file}:{line}: {text}"


@cache
def _compiler() -> str:
    """What tells one compiler from another."""
    return subprocess.run([*COMPILER[:1], "--version"], capture_output=True, text=True).stdout


@cache
def _widest() -> list[str]:
    """The flags of the widest vectors of x86, as the build has them."""
    text = (ROOT / "cmake" / "HeadworksOptions.cmake").read_text()
    flags = {n: f.split() for n, f in re.findall(r"set\(HW_ISA_FLAGS_(\w+) ([^)]*)\)", text)}
    return [*flags["avx512"], *flags["avx512bf16"][1:]]


def _is_unchanged(files: dict[str, str]) -> bool:
    return bool(files) and all(_digest(Path(file)) == known for file, known in files.items())


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def main() -> int:
    """Prints the headers that do not compile; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("csrc", nargs="?", type=Path, default=ROOT / "csrc")
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    store = arguments.cache
    sound = json.loads(store.read_text()) if store and store.is_file() else {}
    found = violations(arguments.csrc.resolve(), sound)
    if store:
        fresh = store.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(sound))
        fresh.replace(store)
    print("\n".join(found) if found else f"headers: all of {arguments.csrc.name}/ compile alone")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
