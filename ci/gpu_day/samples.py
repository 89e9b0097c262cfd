# SPDX-License-Identifier: Apache-2.0
"""One sample per operator, backend and dtype, each in its own process: what cannot launch at all.

    python -m gpu_day.samples LINES.jsonl

Torch is loaded once, and every sample is a fork of that process: a launch that poisons its context
is alone in it. Set CUDA_LAUNCH_BLOCKING=1, so that an error is that of the launch which made it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_day.target import KERNELS, target
from headworks.testing import check_case

LIMIT = 12.0  # seconds of one sample


def samples() -> Iterator[tuple[Any, Any, str, Any]]:
    """(specification, case, backend, dtype): the first small case that the backend takes."""
    here = target()
    for spec in importlib.import_module("specs").SPECS:
        for kernel in KERNELS:
            backend = here.backend(kernel)
            for dtype in spec.dtypes.get(kernel, ())[: here.most]:
                case = next((c for c in spec.emulator_cases if not spec.limit(backend, c)), None)
                if case is not None:
                    yield spec, case, backend, dtype


class Child:
    """A sample in a fork of this process, and the file that it prints into."""

    def __init__(self, spec: Any, case: Any, backend: str, dtype: Any) -> None:
        self.facts = {"spec": spec.name, "backend": backend, "case": case.name}
        self.facts["dtype"] = str(dtype).removeprefix("torch.")
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.start = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(spec, case, backend, dtype)

    def _run(self, spec: Any, case: Any, backend: str, dtype: Any) -> None:
        code = 1
        try:
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.output.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(2, "w")
            check_case(spec, case, backend, dtype, device=target().device)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        """Whether it is over; at its limit it is killed, and is over soon."""
        if time.monotonic() - self.start > LIMIT:
            os.kill(self.pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.code = os.waitstatus_to_exitcode(status)
        return True

    def line(self) -> dict[str, Any]:
        """What became of it."""
        with self.output as output:
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
        outcome = "ok" if self.code == 0 else "failed" if self.code > 0 else f"died ({-self.code})"
        message = "" if self.code == 0 else text.splitlines()[-1][:400] if text else ""
        seconds = round(time.monotonic() - self.start, 2)
        return {**self.facts, "outcome": outcome, "seconds": seconds, "message": message}


def main() -> int:
    """Runs all; 1 if any did not pass."""
    importlib.import_module("torch").set_num_threads(1)
    waiting, running, failed = list(samples()), [], 0
    with Path(sys.argv[1]).open("a") as file, contextlib.suppress(KeyboardInterrupt):
        file.write(json.dumps({"count": len(waiting)}) + "\n")
        while waiting or running:
            while waiting and len(running) < target().workers:
                running.append(Child(*waiting.pop(0)))
            ended = [child for child in running if child.ended()]
            running = [child for child in running if child not in ended]
            for child in ended:
                line = child.line()
                failed += line["outcome"] != "ok"
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(*(line[n] for n in ("spec", "backend", "dtype", "outcome", "message")))
            time.sleep(0.01)
    return 1 if failed or waiting or running else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once: whoever interrupts waits a moment only
