# SPDX-License-Identifier: Apache-2.0
"""Runs the specs' small comparisons with a mutant on, each in a process of its own.

Everything that takes time is done once: torch, the specs and the references' results are loaded
before the first fork, and the run without a mutant tells which comparisons reach which switch. A
mutant runs those alone, the quickest first, until one differs.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
SURVIVED, DIFFERENT, REFUSED, BROKEN = 0, 3, 4, 5
REACHED, DOES_NOT_APPLY = 1, 2
HANGING = (signal.SIGALRM, signal.SIGXCPU)  # what ends a process that does not
BACKENDS = {"cpu": "cpu", "simt": "emulate:simt", "sm80": "emulate:sm80"}
# How a spec's first cases, which reach every algorithm, are compared besides.
ASIDE = (
    {"inputs": "strided"}, {"cotangents": "strided"}, {"inputs": "padded", "cotangents": "padded"},
    {"inputs": "expanded"}, {"alone": True}, {"end": "begin"}, {"outputs": "strided"},
)  # fmt: skip
FIRST = 3
# What an operator says that wants its outputs otherwise.
REFUSED_LAYOUT = re.compile("is not contiguous|has stride")
# With how many threads the long calls are compared besides, which the CPU then cuts otherwise.
THREADS = 3
M_PERTURB = -6  # malloc.h
# (order of threads, landing of copies, seed); the first for every mutant, all for barriers.
SCHEDULES = (
    ("shuffled", "late", 1), ("reverse", "early", 2), ("forward", "late", 3),
    ("shuffled", "early", 4), ("reverse", "late", 5), ("shuffled", "mixed", 6),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One case of one spec on one backend."""

    spec: int
    case: object
    backend: str
    dtype: object
    inputs: str = "contiguous"  # their layout
    cotangents: str = "contiguous"
    outputs: str = "contiguous"  # of what operators allocate
    gradients: bool = True
    alone: bool = False  # the gradient of the first tensor, without the others
    end: str = "end"  # of every tensor at which the inaccessible page is
    threads: int = 1
    isa: str | None = None  # of the CPU; None: the strongest


@dataclass
class Baseline:
    """Of each task that ran: seconds, and the flags of every switch."""

    seconds: dict[int, float]
    flags: dict[int, bytes]
    wrong: list[str]

    def flag(self, n: int) -> int:
        return max((f[n] & REACHED for f in self.flags.values()), default=0) | max(
            (f[n] & DOES_NOT_APPLY for f in self.flags.values()), default=0
        )

    def reaching(self, n: int) -> list[int]:
        tasks = [t for t, f in self.flags.items() if f[n] & REACHED]
        return sorted(tasks, key=lambda t: self.seconds[t])


class Judge:
    def __init__(self, library: Path, backends: tuple[str, ...], specs=(), budget=20.0):
        """`specs`: names of those to compare, if not all. `budget`: seconds of comparisons, as
        measured without a mutant, that one may take."""
        os.environ["HEADWORKS_LIBRARY_DIR"] = str(library)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests")]
        import torch

        from guarded import Guard, guarded_allocations
        from headworks import _library
        from headworks.testing import inputs
        from headworks.testing import spec as spec_module
        from specs import SPECS
        from test_cpu_splits import CUT

        torch.set_num_threads(1)  # a process with OpenMP threads must not fork
        ctypes.CDLL(None).mallopt(M_PERTURB, 0x100)  # new memory is of ones: numbers in it are NaN
        self.torch, self.library, self.budget = torch, _library, budget
        chosen = [s for s in SPECS if not specs or s.name in specs]
        self.guard = Guard("end")
        self.specs = [self._guarded(spec) for spec in chosen]
        self._restride, inputs._gaps = inputs.restride, self._gaps
        self._draw, spec_module._cotangent = spec_module._cotangent, self._cotangent
        self.long = {s.name: [c for module, c in CUT if module.SPEC is s] for s in chosen}
        self.check_case, self.allocations = spec_module.check_case, guarded_allocations
        _library.info()  # loads both libraries
        self.switches = [
            ctypes.CDLL(str(library / name))
            for name in ("libheadworks.so", "libheadworks_emulator.so")
            if (library / name).exists()
        ]
        for switch in self.switches:
            switch.hw_mutant_table.restype = ctypes.c_void_p
        spec_module.REMEMBERED = 1 << 30
        self.tasks = self._list(backends)
        for task in self.tasks:  # remembers what the reference gives
            self._compare(task, "reference")

    def _list(self, backends: tuple[str, ...]) -> list[Task]:
        t = self.torch
        tasks = []
        for i, spec in enumerate(self.specs):
            for short in backends:
                dtype = t.bfloat16 if short == "sm80" else t.float32
                if dtype not in spec.dtypes.get(short, ()):
                    continue
                cases = list(spec.emulator_cases)
                first = Task(i, cases[0], BACKENDS[short], dtype)
                kinds = [first]
                aside = list(ASIDE)
                if short == "cpu":  # which is quick; a weaker instruction set has no pairs of bf16
                    cut = self.long.get(spec.name, ())
                    cases += [*spec.sample_cases, *cut]
                    tasks += [replace(first, case=c) for c in spec.cases]
                    isas = self.library.info()["cpu"]["available"]
                    kinds += [replace(first, dtype=t.bfloat16, isa=isa) for isa in isas]
                    tasks += [replace(first, case=c, threads=THREADS) for c in cut]
                others = {t.bfloat16, t.float16} - {k.dtype for k in kinds}
                aside += [{"dtype": x} for x in sorted(others, key=str)]
                tasks += [replace(k, case=c) for k in kinds for c in cases]
                tasks += [replace(first, case=c, gradients=False) for c in spec.emulator_cases]
                tasks += [
                    replace(k, case=c, **how) for k in kinds for how in aside for c in cases[:FIRST]
                ]
        return [x for x in tasks if not self.specs[x.spec].limit(x.backend, x.case)]

    def _compare(self, task: Task, backend: str = ""):
        """In memory with inaccessible pages around every tensor."""
        spec, backend = self.specs[task.spec], backend or task.backend
        if task.alone:
            spec = replace(spec, name=f"{spec} alone", differentiable=spec.differentiable[:1])
        if task.inputs == "expanded":  # other values, and so other results to remember
            spec = replace(spec, name=f"{spec} expanded")
        self.guard.end, self.task = task.end, task
        self.torch.set_num_threads(1 if backend == "reference" else task.threads)
        self.library.set_cpu_isa(task.isa)
        with contextlib.ExitStack() as stack:
            if backend != "reference":
                for patch in self.allocations(self):
                    stack.enter_context(patch)
            self.check_case(spec, task.case, backend, task.dtype, gradients=task.gradients)

    def _compare_afresh(self, task: Task):
        """In a thread of its own: with none of the scratch memory of the comparisons before."""
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self._compare, task).result()

    def _guarded(self, spec):
        """The spec with inputs of the task's layout that end or begin at an inaccessible page."""

        def make(*args):
            tensors = spec.make(*args)
            return {n: self._laid(x, self.task.inputs) for n, x in tensors.items()}

        return type(spec)(**{**vars(spec), "make": make})

    def _cotangent(self, *args):
        return self._laid(self._draw(*args), self.task.cotangents)

    def empty(self, shape, dtype):
        """What operators allocate."""
        return self._restride(self.guard.empty(shape, dtype), self.task.outputs)

    def _laid(self, x, layout: str):
        return self._restride(self.guard.copy(x), layout)

    def _gaps(self, x, shape):
        """Room of another layout, as inputs._gaps makes it."""
        return self.guard.empty(shape, x.dtype).fill_(float("nan") if x.is_floating_point() else -1)

    def _set(self, state: int):
        for switch in self.switches:
            switch.hw_mutant_set(state)

    def _take_flags(self, numbers: int) -> bytes:
        total = bytearray(numbers)
        for switch in self.switches:
            table = (ctypes.c_ubyte * numbers).from_address(switch.hw_mutant_table())
            for n, flag in enumerate(table):
                total[n] |= flag
            ctypes.memset(table, 0, numbers)
        return bytes(total)

    def _schedule(self, schedule: tuple[str, str, int]):
        order, copies, seed = schedule
        self.library.configure_emulator(seed=seed, order=order, copies=copies)

    # ---- Without a mutant

    def baseline(self, numbers: int, workers: int) -> Baseline:
        """Every comparison once, as the sources are, and which switches it reaches."""
        result = Baseline({}, {}, [])
        with tempfile.TemporaryDirectory() as folder:
            jobs = {}
            for w in range(workers):
                mine = list(range(w, len(self.tasks), workers))
                file = Path(folder) / str(w)
                jobs[w] = (lambda mine=mine, file=file: self._record(mine, numbers, file), 1800)
            statuses = run_forked(jobs, workers)
            for w in range(workers):
                if statuses[w][0] != 0:
                    result.wrong.append(f"the run without a mutant ended with {statuses[w][0]}")
                    continue
                seconds, flags, wrong = pickle.loads((Path(folder) / str(w)).read_bytes())
                result.seconds |= seconds
                result.flags |= flags
                result.wrong += wrong
        return result

    def _record(self, tasks: list[int], numbers: int, file: Path) -> int:
        seconds, flags, wrong = {}, {}, []
        for t in tasks:
            task = self.tasks[t]
            self._set(-1)
            self._take_flags(numbers)
            start = time.monotonic()
            try:
                if task.backend != "cpu":
                    self._schedule(SCHEDULES[0])
                self._compare(task)
            except NotImplementedError:  # a size that the quick preset does not build
                continue
            except ValueError as error:
                if task.outputs == "contiguous" or not REFUSED_LAYOUT.search(str(error)):
                    wrong.append(f"{self._name(t)}: {str(error)[:300]}")
                continue
            except Exception as error:
                wrong.append(f"{self._name(t)}: {str(error)[:300]}")
                continue
            seconds[t], flags[t] = time.monotonic() - start, self._take_flags(numbers)
        file.write_bytes(pickle.dumps((seconds, flags, wrong)))
        return 0

    def _name(self, t: int) -> str:
        task = self.tasks[t]
        words = [v if isinstance(v, str) else f"{k}={v}" for k, v in vars(task).items()]
        return f"{self.specs[task.spec]}[{', '.join(words)}]"

    # ---- With a mutant

    def job(self, n: int, baseline: Baseline, everywhere: bool) -> tuple[Callable[[], int], float]:
        """What a child runs for mutant n, and after how many seconds of a processor it counts as
        hanging."""
        chosen, total = [], 0.0
        for t in baseline.reaching(n):
            if total > self.budget and len(chosen) > 3:
                break
            chosen.append(t)
            total += baseline.seconds[t]
        schedules = SCHEDULES if everywhere else SCHEDULES[:1]
        limit = 10 + 3 * total * len(schedules)
        return lambda: self._try(n, chosen, schedules), limit

    def _try(self, n: int, chosen: list[int], schedules) -> int:
        self._set(n)
        for t in chosen:
            task = self.tasks[t]
            for schedule in schedules:
                try:
                    if task.backend == "cpu":
                        self._compare_afresh(task)
                        break
                    self._schedule(schedule)
                    self._compare(task)
                except AssertionError:
                    return DIFFERENT
                except Exception:
                    return REFUSED
        return SURVIVED

    def try_all(self, numbers: dict[int, bool], baseline: Baseline, workers: int, report):
        """Of each mutant (True: with every schedule) how its process ended, and its seconds."""
        jobs = {n: self.job(n, baseline, everywhere) for n, everywhere in numbers.items()}
        return run_forked(jobs, workers, report)


def run_programs(n: int, programs: list[Path], limit: int = 20) -> int:
    """How the C++ tests end with mutant n on: SURVIVED, DIFFERENT, or minus a signal. `limit`:
    seconds of a processor."""
    for program in programs:
        done = subprocess.run(
            ["prlimit", f"--cpu={limit}", "--core=0", program],
            env={**os.environ, "HW_MUTANT": str(n)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            return DIFFERENT if done.returncode > 0 else done.returncode
    return SURVIVED


def run_forked(jobs, workers: int, report=lambda *_: None) -> dict[int, tuple[int, float]]:
    """Runs each job, (function, seconds), in a forked process; status (negative: signal), time."""
    waiting, running, done = list(jobs.items()), {}, {}
    while waiting or running:
        while waiting and len(running) < workers:
            n, (work, limit) = waiting.pop(0)
            pid = os.fork()
            if pid == 0:
                _child(work, limit)
            running[pid] = n, time.monotonic()
        pid, status = os.wait()
        if pid not in running:
            continue
        n, start = running.pop(pid)
        done[n] = os.waitstatus_to_exitcode(status), time.monotonic() - start
        report(n, *done[n])
    return done


def _child(work: Callable[[], int], limit: float):
    status = BROKEN
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1,) * 2)
        signal.alarm(60 * int(limit) + 1)  # if it waits; on a busy machine everything does
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if not os.environ.get("HW_MUTANTS_VERBOSE"):
            os.dup2(null, 2)
        status = work()
    except BaseException:
        with contextlib.suppress(Exception):
            import traceback

            traceback.print_exc()
    finally:
        os._exit(status)
