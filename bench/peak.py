# SPDX-License-Identifier: Apache-2.0
"""The processor's own peak: peak.cpp, compiled for this machine and kept in the temporary folder.

Rates are those of all threads together: fused multiply-adds from registers in fp32 and fp64, dot
products of bf16 pairs where the processor has them, exponentials, and a copy beyond the caches.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.timing import Call

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "bench" / "peak.cpp"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
SECONDS = 20e-3  # of one run of a kind: much more than threads take to start and to stop
LEAST_COPY = 64 << 20


class Peak:
    """The compiled library, or why there is none (`missing`)."""

    def __init__(self) -> None:
        self.missing: str | None = None
        self.rounds: dict[str, int] = {}
        try:
            self._library = ctypes.CDLL(str(_compiled()))
        except (OSError, subprocess.SubprocessError) as error:
            self.missing = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
            return
        for kind in ("f32", "f64", "bf16", "exp_f32", "exp_f64"):
            function = getattr(self._library, f"hw_peak_{kind}")
            function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_int)
        pointers = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self._library.hw_peak_copy.argtypes = pointers
        self._library.hw_peak_copy.restype = None

    def kinds_of(self, dtype: str) -> tuple[str, str]:
        """The kinds of arithmetic and of exponentials that bound operators on a dtype: 16-bit ones
        multiply in fp32 unless the processor has dot products of bf16."""
        if dtype == "float64":
            return "f64", "exp_f64"
        paired = dtype == "bfloat16" and self._run("bf16", 1) > 0
        return ("bf16" if paired else "f32"), "exp_f32"

    def call(self, kind: str) -> Call:
        """A run of some milliseconds of a kind, to be timed; work(kind) is what it does."""
        if kind not in self.rounds:
            self.rounds[kind] = _rounds_for(lambda rounds: self._run(kind, rounds, 1))
        return lambda: self._run(kind, self.rounds[kind])

    def work(self, kind: str) -> int:
        """Operations or exponentials of all threads in one run."""
        per_thread = self._run(kind, 1) * self.rounds[kind]
        return per_thread * torch.get_num_threads()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Call:
        """Copies a tensor of bytes with all threads."""
        return lambda: self._library.hw_peak_copy(
            target.data_ptr(), source.data_ptr(), source.numel(), torch.get_num_threads()
        )

    def _run(self, kind: str, rounds: int, threads: int | None = None) -> int:
        function = getattr(self._library, f"hw_peak_{kind}")
        return int(function(rounds, threads or torch.get_num_threads()))


@functools.cache
def peak() -> Peak:
    """That of this process."""
    return Peak()


def copy_bytes() -> int:
    """Bytes of an array that the last-level cache cannot hold: four times its size."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text()
    except OSError:
        return LEAST_COPY
    size = re.fullmatch(r"(\d+)K", text.strip())
    return max(LEAST_COPY, 4 * 1024 * int(size.group(1)) if size else 0)


def _rounds_for(run: Callable[[int], object]) -> int:
    """Rounds that take SECONDS on a core that is not interrupted."""
    rounds = 1000
    while True:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run(rounds)  # on one thread: nobody waits for another
            times.append(time.perf_counter() - start)
        if min(times) > SECONDS / 4:
            return int(rounds * SECONDS / min(times)) + 1
        rounds *= 4


def _compiled() -> Path:
    """The library, compiled unless it is there for the same sources, compiler and processor."""
    compiler = os.environ.get("CXX", "c++")
    headers = sorted((ROOT / "csrc" / "core").rglob("*.h"))
    key = hashlib.sha256(" ".join((compiler, *FLAGS, _instructions())).encode())
    for file in (SOURCE, *headers):
        key.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"headworks-peak-{os.getuid()}"
    library = folder / f"{key.hexdigest()[:24]}.so"
    if library.is_file() and folder.stat().st_uid == os.getuid():
        return library
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to somebody else")
    building = library.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", str(SOURCE), "-o", str(building)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        error = next((x for x in done.stderr.splitlines() if "error" in x), "no error message")
        raise OSError(f"{compiler} does not compile bench/peak.cpp: {error}")
    building.replace(library)
    return library


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _instructions() -> str:
    if sys.platform != "linux":
        return sys.platform
    text = Path("/proc/cpuinfo").read_text()
    return "".join(re.findall(r"^(?:flags|Features|model name).*$", text, re.M)[:2])
