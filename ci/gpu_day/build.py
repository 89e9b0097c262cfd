# SPDX-License-Identifier: Apache-2.0
"""`_C` for the Python at hand, beside a library that was compiled elsewhere: one compiler line.

python -m gpu_day.build FOLDER     FOLDER has the libraries already
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path) -> list[str]:
    """The compiler line; as cmake/HeadworksPython.cmake has it."""
    import pybind11

    sources = sorted(str(p) for p in (ROOT / "csrc" / "binding").glob("*.cpp"))
    paths = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    includes = [str(ROOT / "csrc"), *sorted(paths), pybind11.get_include()]
    return [
        *shlex.split(os.environ.get("CXX", "c++")),
        *("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"),
        *(f"-I{path}" for path in includes),
        *sources,
        *("-o", str(folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")),
        *(f"-L{folder}", "-lheadworks", "-ldl", "-Wl,-rpath,$ORIGIN"),
    ]


def main() -> int:
    """Builds; the compiler's status."""
    line = command(Path(sys.argv[1]).resolve())
    print(shlex.join(line), flush=True)
    return subprocess.run(line, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
