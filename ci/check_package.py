#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Looks into a source distribution and a wheel: what must be there, what must not.

Usage: check_package.py SDIST WHEEL
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SDIST_HAS = ("CMakeLists.txt", "setup.py", "csrc/core/host/registry.cpp", "LICENSE", "README.md")
WHEEL_HAS = (
    r"headworks/_C\..*so$",
    r"headworks/libheadworks\.so$",
    r"headworks/py\.typed$",
    r"LICENSE$",
)
WHEEL_LACKS = (r"emulator", r"\.(cpp|cu|cuh|h|o|a)$", r"(^|/)tests?/", r"bench/")
FOREIGN = re.compile(r"torch|c10|python|cuda\.so|cudart|nccl|libheadworks_emulator")


def sdist_problems(names: list[str]) -> list[str]:
    """Sources that a build from the archive needs and does not find."""
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    missing = [f"sdist lacks {name}" for name in SDIST_HAS if name not in inside]
    stray = [f"sdist holds {name}" for name in inside if name.endswith((".so", ".o", ".pyc"))]
    return missing + stray


def wheel_problems(names: list[str]) -> list[str]:
    """Files that the wheel lacks or must not hold."""
    lacks = [f"wheel lacks {p}" for p in WHEEL_HAS if not any(re.search(p, n) for n in names)]
    holds = [f"wheel holds {n}" for n in names if any(re.search(p, n) for p in WHEEL_LACKS)]
    return lacks + holds


def link_problems(library: Path) -> list[str]:
    """Shared libraries that ours must not ask for: torch, Python, the CUDA driver and runtime."""
    text = subprocess.run(
        ["readelf", "--dynamic", str(library)], check=True, capture_output=True, text=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", text)
    return [f"{library.name} needs {n}" for n in needed if FOREIGN.search(n.lower())]


def main() -> int:
    """Prints the problems; the exit status."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    with tarfile.open(sys.argv[1]) as archive:
        problems = sdist_problems(archive.getnames())
    with zipfile.ZipFile(sys.argv[2]) as wheel, tempfile.TemporaryDirectory() as folder:
        names = wheel.namelist()
        problems += wheel_problems(names)
        for name in (n for n in names if n.endswith(".so")):
            problems += link_problems(Path(wheel.extract(name, folder)))
        size = Path(sys.argv[2]).stat().st_size / 2**20
    print(
        "\n".join(problems) if problems else f"package: {len(names)} files, {size:.1f} MiB: sound"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
