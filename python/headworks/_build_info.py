# SPDX-License-Identifier: Apache-2.0
"""hw.build_info: what this installation is and which operator has which backend."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _library

DTYPES = ("float64", "float32", "bfloat16", "float16")
GPU_BACKENDS = ("sm90", "sm80", "simt")

Instances = list[dict[str, Any]]


def build_info() -> dict[str, Any]:
    """Versions, compilers, architectures, instruction sets and the table of backends.

    The result is plain data (`json.dumps` takes it) and asks no CUDA device. Its main keys:

    - ``versions``: headworks, python, torch and the CUDA that torch was built for (or None)
    - ``build``: preset, build type, C++ compiler
    - ``cpu``: instruction set in use, those built and those this machine can run
    - ``cuda``: whether CUDA code was built, why not, the toolkit, the architectures by backend
    - ``emulator``: whether the emulator is there
    - ``operators``: by name, its functions, and by backend and dtype the reason why it is missing
      ("" where it is there)

    Example:
        >>> import headworks as hw
        >>> hw.build_info()["operators"]["linear_attention"]["backends"]["cpu"]["float32"]
        ''
    """
    native = _library.info()
    emulator = native["emulator"]
    return {
        "versions": {
            "headworks": native["version"],
            "package": _package_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
        },
        "build": {key: native[key] for key in ("preset", "build_type", "compiler")},
        "cpu": native["cpu"],
        "cuda": native["cuda"],
        "emulator": emulator is not None,
        "operators": {
            op["name"]: {"functions": op["functions"], "backends": _backends(op, native, emulator)}
            for op in native["operators"]
        },
    }


def _package_version() -> str | None:
    try:
        return version("headworks")
    except PackageNotFoundError:  # run from a source folder that is not installed
        return None


def _backends(
    op: dict[str, Any], native: dict[str, Any], emulator: dict[str, Any] | None
) -> dict[str, dict[str, str]]:
    """By backend and dtype: why it is missing, or ""."""
    table = {"reference": dict.fromkeys(DTYPES, ""), "cpu": _row(op["instances"], "cpu", "")}
    no_cuda = "" if native["cuda"]["built"] else f"no CUDA code, as {native['cuda']['reason']}"
    for backend in GPU_BACKENDS:
        table[backend] = _row(op["instances"], backend, no_cuda)
    emulated: Instances = []
    for other in (emulator or {}).get("operators", []):
        if other["name"] == op["name"]:
            emulated = other["instances"]
    no_emulator = "" if emulator else "no emulator; build with HEADWORKS_PRESET=emu"
    for backend in ("sm80", "simt"):
        table[f"emulate:{backend}"] = _row(emulated, backend, no_emulator)
    return table


def _row(instances: Instances, backend: str, general_reason: str) -> dict[str, str]:
    built = {i["dtype"] for i in instances if i["backend"] == backend}
    if general_reason and not built:
        return dict.fromkeys(DTYPES, general_reason)
    missing = f"built for {', '.join(d for d in DTYPES if d in built)}" if built else "no kernel"
    return {dtype: "" if dtype in built else missing for dtype in DTYPES}
