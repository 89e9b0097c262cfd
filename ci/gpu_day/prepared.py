# SPDX-License-Identifier: Apache-2.0
"""What ci/gpu_prepare.sh made beforehand, and what stands for it in a dry run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".gpu_day"
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
PRIMITIVES = ("test_primitives.cpp", "test_fragments.cpp", "test_gemm.cpp")


@dataclass(frozen=True)
class Prepared:
    """Folders of libraries, the program of the primitives, wheels, programs that come first."""

    library: Path  # with libheadworks.so
    primitives: Path
    baseline: Path | None = None  # with another libheadworks.so, to compare with
    wheels: tuple[Path, ...] = ()
    programs: Path | None = None

    @staticmethod
    def found(folder: Path = FOLDER) -> Prepared:
        """What the prepared folder has; FileNotFoundError where something is missing."""
        for name in ("library/libheadworks.so", "primitives"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; run ci/gpu_prepare.sh first")
        baseline = folder / "baseline"
        return Prepared(
            folder / "library",
            folder / "primitives",
            baseline if (baseline / "libheadworks.so").is_file() else None,
            tuple(sorted((folder / "wheels").glob("*.whl"))),
        )


def emulated(work: Path) -> Prepared:
    """The libraries of a build with the emulator (BUILD, or HEADWORKS_LIBRARY_DIR), its program of
    primitives, and programs that pretend to be compute-sanitizer and ncu."""
    build = Path(os.environ.get("BUILD", ROOT / "build" / "emu"))
    libraries = Path(os.environ.get("HEADWORKS_LIBRARY_DIR", build / "lib"))
    for name in ("libheadworks.so", "libheadworks_emulator.so"):
        if not (libraries / name).is_file():
            raise FileNotFoundError(
                f"{libraries / name} is missing; cmake --preset emu && cmake --build build/emu, "
                "or let HEADWORKS_LIBRARY_DIR name a folder that has it"
            )
    primitives = build / "emu_tests"
    if not primitives.is_file():
        primitives = work / "primitives"
        _build_primitives(primitives)
    return Prepared(libraries, primitives, None, (), STAND_INS)


def _build_primitives(program: Path) -> None:
    """The tests of the primitives over the emulator alone."""
    tests = [ROOT / "tests" / "device" / "main.cpp"]
    tests += [ROOT / "tests" / "emu" / name for name in PRIMITIVES]
    sources = [
        *tests,
        *(ROOT / "csrc" / "emu").glob("*.cpp"),
        ROOT / "csrc/core/host/cuda_device.cpp",
    ]
    command = ["c++", "-std=c++20", "-O1", "-DHW_EMULATE", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{ROOT / 'tests'}", *map(str, sources), "-o", str(program), "-pthread"]
    subprocess.run(command, check=True)


def with_library(source: Path, folder: Path) -> Path:
    """A folder of its own with links to the libraries, for the `_C` that is built beside them."""
    folder.mkdir(parents=True)
    for library in source.glob("libheadworks*.so"):
        (folder / library.name).symlink_to(library.resolve())
    return folder


def unpack(wheels: tuple[Path, ...], folder: Path) -> Path:
    """The pure-Python wheels, unpacked; one that cannot be is a peer that is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        with contextlib.suppress(OSError, ValueError, shutil.ReadError, zipfile.BadZipFile):
            shutil.unpack_archive(str(wheel), str(folder), "zip")
    return folder
