# SPDX-License-Identifier: Apache-2.0
"""What everything was measured on: device, driver, compilers, packages. Goes into env.txt."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

from gpu_day.target import target

COMMANDS = (
    ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem",
     "--format=csv"),
    ("nvcc", "--version"),
    ("c++", "--version"),
    ("compute-sanitizer", "--version"),
    ("ncu", "--version"),
    ("git", "log", "-1", "--format=%H %s"),
)  # fmt: skip
PACKAGES = ("torch", "triton", "numpy", "pytest", "pybind11", "transformers", "timm", "fla-core")


def main() -> int:
    """Prints; what is not there is said to be missing. 1 if torch cannot use the device."""
    print(f"python {sys.version}\n{platform.platform()}, {os.cpu_count()} cores")
    for name in PACKAGES:
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "is missing")
    for command in COMMANDS:
        print(f"$ {' '.join(command)}")
        if shutil.which(command[0]) is None:
            print("missing")
            continue
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=10)
            print((result.stdout + result.stderr).strip())
        except (OSError, subprocess.TimeoutExpired) as error:
            print(error)
    return 0 if _torch_works() else 1


def _torch_works() -> bool:
    """Whether torch can compute on the device of the day, and why not."""
    device = target().device
    print(f"$ torch.ones(1, device={device!r})", flush=True)
    try:
        import torch

        print(torch.ones(1, device=device).add(1).item())
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
