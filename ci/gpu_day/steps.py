# SPDX-License-Identifier: Apache-2.0
"""Steps that cost only themselves: each is a process group of its own with a limit.

A step that reaches its limit gets INT, so that it can report, and KILL when it does not end soon
after. What it left running is killed with it. Nothing that a step does reaches another one.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

GRACE = 3.0  # seconds between INT and KILL
LEAST = 1.0  # a step that would have less than this is not started
LARGEST = 1 << 30  # bytes of a file that a step writes, so that none fills the disk
TAIL = 1 << 16  # bytes of a log that are looked at

_running: set[subprocess.Popen[bytes]] = set()
_stopped = threading.Event()


@dataclass(frozen=True)
class Step:
    """A command with a name, which is that of its log too, and its limit in seconds."""

    name: str
    command: tuple[str, ...]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ok, failed (by itself), interrupted, killed, or not run."""

    name: str
    status: str
    seconds: float
    code: int | None
    log: Path

    @property
    def fine(self) -> bool:
        """Whether the step did all it was to do."""
        return self.status == "ok"

    def __str__(self) -> str:
        code = "" if self.code in (0, None) else f" ({self.code})"
        return f"{self.name:<34} {self.seconds:6.1f} s  {self.status}{code}"

    def tail(self, lines: int = 12) -> str:
        """The last lines of the log."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - TAIL))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


def run(step: Step, logs: Path, end: float, environment: Mapping[str, str]) -> Outcome:
    """Runs one step until its limit or `end` (of time.monotonic), whichever is first."""
    log = logs / f"{step.name.replace('/', '_').replace(' ', '_')}.log"
    start = time.monotonic()
    limit = min(step.limit, end - start - GRACE)
    if limit < LEAST or _stopped.is_set():
        return Outcome(step.name, "not run", 0.0, None, log)
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, **step.environment},
                start_new_session=True,
                preexec_fn=_prepare,
            )
        except OSError as error:
            output.write(f"cannot start {step.command[0]}: {error}\n".encode())
            return Outcome(step.name, "failed", 0.0, None, log)
        _running.add(process)
        status = _wait(process, limit)
        _running.discard(process)
    seconds = time.monotonic() - start
    if status == "ok" and process.returncode != 0:
        status = "failed"
    return Outcome(step.name, status, seconds, process.returncode, log)


def run_all(
    steps: Iterable[Step],
    logs: Path,
    end: float,
    environment: Mapping[str, str],
    workers: int,
    report: Callable[[Outcome], None],
) -> list[Outcome]:
    """Runs steps, `workers` at a time in their order; `report` is called as each one ends."""

    def one(step: Step) -> Outcome:
        outcome = run(step, logs, end, environment)
        report(outcome)
        return outcome

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(one, list(steps)))


def stop() -> None:
    """Kills what runs, and lets nothing start any more."""
    _stopped.set()
    for process in list(_running):
        _signal(process, signal.SIGKILL)


def _prepare() -> None:
    # Who starts the day in the background hands on a SIGINT that is ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A core of a process with a GPU is gigabytes, and takes the time of the next step.
    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, LARGEST)):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(
            what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
        )


def _wait(process: subprocess.Popen[bytes], limit: float) -> str:
    """Waits until the end or the limit; the whole group has ended afterwards."""
    try:
        process.wait(limit)
        status = "ok"
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        try:
            process.wait(GRACE)
            status = "interrupted"
        except subprocess.TimeoutExpired:
            status = "killed"
    _signal(process, signal.SIGKILL)
    # A process that waits for a hung driver does not even end by KILL: leave it behind.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    return status


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
