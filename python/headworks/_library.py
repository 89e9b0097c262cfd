# SPDX-License-Identifier: Apache-2.0
"""The native library as Python functions.

`_C` (and libheadworks beside it) is loaded at import, from this package or from the folder named by
HEADWORKS_LIBRARY_DIR. Nothing here touches CUDA. A call passes tensors and numbers in the order of
the function's list (`arguments`); None stands for an absent tensor.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# In the order of preference; of those that can take a call, "auto" is the first.
BACKENDS = ("cpu", "sm90", "sm80", "simt", "emulate:sm80", "emulate:simt")

Tensors = Sequence[Tensor | None]
Scalars = Sequence[float]
# (name, kind, sizes, way, optional, has a rest): headworks._functions.Argument says what they mean
Arguments = tuple[tuple[Any, ...], ...]

_functions: dict[str, tuple[int, Arguments]] = {}


def function(name: str) -> int:
    """The number of a function such as "linear_attention.forward"."""
    return _function(name)[0]


def arguments(name: str) -> Arguments:
    """The arguments of a function, in the order of a call."""
    return _function(name)[1]


def _function(name: str) -> tuple[int, Arguments]:
    if not _functions:
        lists = native.functions()
        _functions.update({n: (i, lists[n]) for i, n in enumerate(lists)})
    if name not in _functions:
        raise ValueError(f"no native function '{name}'; this build has {', '.join(_functions)}")
    return _functions[name]


def choose(fn: int, backend: str, tensors: Tensors, scalars: Scalars = ()) -> str:
    """The backend that `call` would use; tensors may be without data."""
    chosen: str = native.choose(fn, backend, tensors, scalars)
    return chosen


def reasons(fn: int, tensors: Tensors, scalars: Scalars = ()) -> dict[str, str]:
    """For each backend why it cannot take the call; an empty text where it can."""
    return {name: native.why_not(fn, name, tensors, scalars) for name in BACKENDS}


def instance(fn: int, backend: str, tensors: Tensors, scalars: Scalars = ()) -> str:
    """Which of a backend's compiled instances `call` would run: "bfloat16, dim 64"."""
    name: str = native.instance(fn, backend, tensors, scalars)
    return name


def workspace(fn: int, backend: str, tensors: Tensors, scalars: Scalars = ()) -> int:
    """Bytes of workspace that the call needs on this backend, from shapes alone."""
    size: int = native.workspace(fn, backend, tensors, scalars)
    return size


def repeat_key(tensors: tuple[Tensor, ...], options: tuple[Any, ...]) -> bytes | None:
    """What a call depends on but the elements of its tensors; None where that has no bytes."""
    key: bytes | None = native.repeat_key(tensors, options)
    return key


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def extremes(index: Tensor) -> tuple[int, int]:
    """The least and the largest element of an int64 tensor on the CPU that has any."""
    least, most = native.extremes(index)
    return least, most


def info() -> dict[str, Any]:
    """What the native library contains; "emulator" is that of the emulator, or None without it."""
    result: dict[str, Any] = json.loads(native.info(False))
    try:
        result["emulator"] = json.loads(native.info(True))
    except NotImplementedError:
        result["emulator"] = None
    return result


def set_cpu_isa(name: str | None = None) -> None:
    """Choose the CPU instruction set ("baseline", "avx2", ...); None: the best of this machine."""
    native.configure(False, "cpu_isa", name or "")


def configure_emulator(
    seed: int = 0,
    order: str = "forward",
    copies: str = "late",
    *,
    capability: int = 80,
    multiprocessors: int = 4,
    shared_bytes: int = 163 * 1024,
    races: str = "on",
) -> None:
    """How the emulator runs threads ("forward", "reverse", "shuffled") and lands async copies
    ("late", "early", "mixed"); the device that calls are planned for: sm_<capability>, its
    multiprocessors, the most shared memory of a block; and, in a build of the preset races, how
    it compares accesses to memory ("on", "strict", "off"). Process-wide, from the next call on."""
    settings = {"seed": seed, "order": order, "copies": copies, "races": races}
    settings |= {"capability": capability, "multiprocessors": multiprocessors}
    settings |= {"shared_bytes": shared_bytes}
    for key, value in settings.items():
        native.configure(True, key, str(value))


def _folder() -> Path:
    chosen = os.environ.get("HEADWORKS_LIBRARY_DIR")
    return Path(chosen) if chosen else Path(__file__).parent


def _find(folder: Path) -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (file := folder / f"_C{suffix}").is_file():
            return file
    return None


def _load() -> ModuleType:
    folder = _folder()
    file = _find(folder)
    if file is None:
        raise ImportError(_not_found(folder))
    spec = importlib.util.spec_from_file_location(f"{__package__}._C", file)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(
            f"headworks: {file} cannot be loaded ({error}). The usual cause is that it was built "
            "for another Python or machine. Reinstall headworks: pip install --force-reinstall ."
        ) from error
    module.set_allocator(_workspace)
    return module


def _not_found(folder: Path) -> str:
    source = "HEADWORKS_LIBRARY_DIR" if os.environ.get("HEADWORKS_LIBRARY_DIR") else "the package"
    others = sorted(p.name for p in folder.glob("_C*")) if folder.is_dir() else []
    found = f"it has only {', '.join(others)}, for another Python" if others else "nothing is there"
    if not folder.is_dir():
        found = "that folder does not exist"
    return (
        f"headworks: the native module _C for Python {platform.python_version()} "
        f"({sys.implementation.cache_tag}) is not in {folder} ({source}): {found}. Build it with "
        "'pip install .' (or 'pip install -e .') in the source folder, or let "
        "HEADWORKS_LIBRARY_DIR name the folder that holds _C and libheadworks."
    )


native: Any = _load()

# (fn, backend, tensors, scalars=()): run function number `fn`. CUDA work goes to torch's current
# stream of the tensors' device, CPU work to as many threads as torch has; a workspace comes from
# torch's allocator. It is the module's own function: every call of an operator ends here.
call: Callable[..., None] = native.call
