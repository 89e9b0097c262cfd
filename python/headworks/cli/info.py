# SPDX-License-Identifier: Apache-2.0
"""`headworks info`: what this installation is, and which operator runs where."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .._build_info import DTYPES, build_info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="the same for machines")


def run(options: argparse.Namespace) -> int:
    """Print the description."""
    info = build_info()
    info["cuda"]["devices"] = cuda_devices()
    print(json.dumps(info, indent=2) if options.json else report(info))
    return 0


def cuda_devices() -> list[str]:
    """The CUDA devices that torch sees, with their architecture."""
    import torch

    if not torch.cuda.is_available():
        return []
    result = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        result.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return result


def report(info: dict[str, Any]) -> str:
    """The text for people."""
    lines = [*_general(info), ""]
    for name, op in info["operators"].items():
        lines += [f"{name}: {', '.join(op['functions'])}", *_table(op["backends"]), ""]
    return "\n".join(lines).rstrip()


def _general(info: dict[str, Any]) -> list[str]:
    versions, build, cpu, cuda = (info[key] for key in ("versions", "build", "cpu", "cuda"))
    torch_cuda = f"CUDA {versions['torch_cuda']}" if versions["torch_cuda"] else "CPU build"
    rows = [
        ("headworks", f"{versions['headworks']}, preset {build['preset']}, {build['build_type']}"),
        ("Python", versions["python"]),
        ("torch", f"{versions['torch']} ({torch_cuda})"),
        ("C++ compiler", build["compiler"]),
        ("CPU", f"{cpu['processor']}, using {cpu['isa']}; {_isas(cpu)}"),
        ("CUDA code", _cuda_code(cuda)),
        ("CUDA devices", ", ".join(cuda["devices"]) or "none that torch can see"),
        ("emulator", "yes" if info["emulator"] else "no; build with HEADWORKS_PRESET=emu"),
    ]
    return [f"{label:<14}{text}" for label, text in rows]


def _isas(cpu: dict[str, Any]) -> str:
    unusable = [isa for isa in cpu["built"] if isa not in cpu["available"]]
    text = f"built: {', '.join(cpu['built'])}"
    return text + (f" (not on this machine: {', '.join(unusable)})" if unusable else "")


def _cuda_code(cuda: dict[str, Any]) -> str:
    if not cuda["built"]:
        return f"no, because {cuda['reason']}"
    archs = "; ".join(
        f"{backend} for {text.replace(';', ' ')}"
        for backend, text in cuda["architectures"].items()
        if text
    )
    return f"CUDA {cuda['toolkit']}: {archs}"


def _table(backends: dict[str, dict[str, str]]) -> list[str]:
    lines = [f"  {'':<14}" + "".join(f"{dtype:<10}" for dtype in DTYPES)]
    for backend, reasons in backends.items():
        cells = "".join(f"{'-' if reasons[dtype] else 'yes':<10}" for dtype in DTYPES)
        why = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))
        lines.append(f"  {backend:<14}{cells}{why}".rstrip())
    return lines
