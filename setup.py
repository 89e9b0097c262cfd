# SPDX-License-Identifier: Apache-2.0
"""Drives CMake; everything else is in pyproject.toml and CMakeLists.txt.

Environment: HEADWORKS_PRESET (auto, cpu, cuda, emu, dev, asan, races), FORCE_CUDA, MAX_JOBS or
CMAKE_BUILD_PARALLEL_LEVEL, TORCH_CUDA_ARCH_LIST or CMAKE_CUDA_ARCHITECTURES, CXX, CUDACXX.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "python" / "headworks"
PRESETS = ("auto", "cpu", "cuda", "emu", "dev", "asan", "races")
GB_PER_JOB, GB_TO_LEAVE = 0.5, 2.0


def say(text: str) -> None:
    print(f"headworks: {text}", file=sys.stderr, flush=True)


def chosen_preset() -> str:
    preset = os.environ.get("HEADWORKS_PRESET") or "auto"
    if preset not in PRESETS:
        sys.exit(f"headworks: HEADWORKS_PRESET is '{preset}'; expected one of {', '.join(PRESETS)}")
    return preset


def free_memory_gb() -> float | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match.group(1)) / 2**20 if match else None


def chosen_jobs() -> int:
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        text = os.environ.get(name)
        if text:
            if not text.isdigit() or int(text) < 1:
                sys.exit(f"headworks: {name} is '{text}'; expected a number from 1 on")
            say(f"{text} build jobs ({name})")
            return int(text)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    memory = free_memory_gb()
    if memory is None:
        say(f"{cores} build jobs, one per core")
        return cores
    jobs = max(1, min(cores, int((memory - GB_TO_LEAVE) / GB_PER_JOB)))
    say(f"{jobs} build jobs ({cores} cores, {memory:.1f} GB of free memory, {GB_PER_JOB} GB each)")
    return jobs


class CMakeBuild(build_ext):
    """Configures, builds and installs the preset into the package folder."""

    def run(self) -> None:
        editable = self.inplace or self.editable_mode
        target = PACKAGE if editable else Path(self.build_lib).resolve() / "headworks"
        preset = chosen_preset()
        folder = ROOT / "build" / f"pip-{preset}"
        self.cmake(
            "--preset", preset, "-B", str(folder), "-DHW_TESTS=OFF",
            f"-DHW_PYTHON_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
        )  # fmt: skip
        self.cmake("--build", str(folder), "--target", "python_package", "-j", str(chosen_jobs()))
        # What an earlier build with another preset left must not end up in this one.
        for old in target.glob("*.so"):
            old.unlink()
        self.cmake(
            "--install", str(folder), "--component", "python", "--prefix", str(target), "--strip"
        )

    def cmake(self, *arguments: str) -> None:
        try:
            result = subprocess.run(["cmake", *arguments], cwd=ROOT, check=False)
        except FileNotFoundError:
            sys.exit("headworks: cmake is not on PATH; run 'pip install cmake ninja pybind11'")
        if result.returncode:
            sys.exit("headworks: the build failed; the first error is above")

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "headworks").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # Without sources: the name alone makes the wheel one for this Python and platform.
    ext_modules=[Extension("headworks._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
