# SPDX-License-Identifier: Apache-2.0
"""The stages of the day, each with the second by which it has to be over."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from gpu_day import steps
from gpu_day.prepared import ROOT, Prepared, unpack, with_library
from gpu_day.steps import Outcome, Step
from gpu_day.target import VARIABLE, Target

# The operators, the longest tests first, so that the last to start is a short one.
SPECS = (
    "attention",
    "bilevel_routing_attention",
    "kmeans_routing_attention",
    "linear_attention",
    "window_attention",
    "moh_attention",
    "attention_transpose",
    "column_stats",
    "attention_lse",
    "attention_probs",
    "linear_attention_step",
    "key_scan",
    "cascaded_group_attention",
    "select_topk",
    "bilevel_route",
    "kmeans_route",
    "na2d_av",
    "contmix",
)
STAGES = ("samples", "correctness", "sanitizers", "benchmarks", "profiles")
TOOLS = ("memcheck", "racecheck")
SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis")
# The kernels that ncu looks at, by their demangled names: the forward pass of attention (whose
# instances serve routing too), its two gradients, linear attention; and how many launches at most.
PATTERN = "ForwardKernel|QueryGradKernel|KeyGradKernel|ApplyKernel"
LAUNCHES = 8
CRITICAL = 60.0  # seconds at most that a step may have without which nothing else can run
HOME_LIMIT = 16 << 20  # bytes of one file that comes home
LONGEST = 4 << 20  # bytes of one log in it


class Day:
    """Runs the stages; `fine` afterwards tells whether every step was."""

    def __init__(
        self, target: Target, prepared: Prepared, work: Path, out: Path, seconds: float
    ) -> None:
        self.target, self.prepared, self.work, self.out = target, prepared, work, out
        self.start = time.monotonic()
        self.end = self.start + seconds * target.stretch
        self.outcomes: list[Outcome] = []
        self.lock = threading.Lock()
        self.has_torch = True  # which can use the device
        self.python = os.environ.get("PYTHON", sys.executable)
        self.logs, self.tests, self.found = (
            self._folder(name) for name in ("logs", "tests", "sanitizer")
        )
        self.environment = self._environment()
        for name in ("summary.txt", "bench.jsonl", "env.txt"):
            (out / name).write_text("")
        self._say(f"{target.name}, at most {seconds * target.stretch:.0f} s")

    @property
    def fine(self) -> bool:
        """Whether every step was."""
        return all(outcome.fine for outcome in self.outcomes)

    def run(self, wanted: Sequence[str] = STAGES) -> None:
        """The table from top to bottom, or the stages of it that are wanted."""
        for stage in (self._build, self._primitives):
            if not stage():
                self._say("stopped here: nothing that follows would tell anything")
                return
        if not self.has_torch:
            self._say("stopped here: torch cannot use the device, see versions")
            return
        if "samples" in wanted:
            self._samples()
        warm = threading.Thread(target=self._warm)
        if {"benchmarks", "correctness"} <= set(wanted):
            warm.start()
        if "correctness" in wanted:
            self._correctness()
        if "sanitizers" in wanted:
            self._sanitizers()
        if warm.is_alive():
            warm.join()
        if "benchmarks" in wanted:
            self._benchmarks()
        if "profiles" in wanted:
            self._profiles()

    # ---- the stages ----

    def _build(self) -> bool:
        """Versions; `_C` beside each library; wheels."""
        unpack(self.prepared.wheels, self.work / "site")
        with_library(self.prepared.library, self._library("library"))
        build = [self._python("build", "gpu_day.build", self._library("library"), limit=CRITICAL)]
        if self.prepared.baseline:
            folder = with_library(self.prepared.baseline, self._library("baseline"))
            build.append(self._python("build/baseline", "gpu_day.build", folder, limit=CRITICAL))
        build.append(self._python("versions", "gpu_day.versions", limit=CRITICAL))
        outcomes = self._stage("build", 15, build, critical=True)
        self._collect_environment(outcomes[-1].log)
        self.has_torch = outcomes[-1].fine
        return outcomes[0].fine

    def _primitives(self) -> bool:
        """What the emulator was taught is what the hardware does."""
        program = Path(shutil.copy(self.prepared.primitives, self.work / "program_of_primitives"))
        program.chmod(0o755)
        step = Step("primitives", (str(program),), CRITICAL)
        return self._stage("primitives", 25, [step], critical=True)[0].fine

    def _samples(self) -> None:
        step = self._python("samples", "gpu_day.samples", self.tests / "samples.jsonl", limit=35)
        blocking = {"CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "1"}
        self._stage("samples", 45, [_with(step, blocking)])

    def _correctness(self) -> None:
        """Every test of every operator, and graph capture, one process per specification."""
        ordinary = [self._pytest(spec, "correctness", "tests/test_ops.py") for spec in SPECS]
        graphs = [
            self._pytest(spec, "graphs", "tests/test_torch.py", "-k", "test_cuda_graph")
            for spec in SPECS
        ]
        self._stage("correctness", 170, [*ordinary, *(graphs if self._has_graphs else graphs[:1])])

    def _sanitizers(self) -> None:
        wanted = [self._sanitizer(tool, spec) for tool in TOOLS for spec in SPECS]
        self._stage("sanitizers", 250, wanted)

    def _benchmarks(self) -> None:
        """Case by case; a process that dies costs the case it was at, and the next goes on."""
        end, tries = self._until(470), 0
        libraries = ["library", *(["baseline"] if self.prepared.baseline else [])]
        for library in libraries:
            marks = -1
            while self._marks(library) > marks and time.monotonic() + steps.LEAST < end:
                marks, tries = self._marks(library), tries + 1
                step = self._python(
                    f"bench/{library}-{tries}",
                    "gpu_day.measure",
                    self.out / "bench.jsonl",
                    library,
                    limit=max(0.0, end - time.monotonic()),
                )
                variables = {"HEADWORKS_LIBRARY_DIR": str(self._library(library))}
                if self._stage("benchmarks", 470, [_with(step, variables)], workers=1)[0].fine:
                    break

    def _profiles(self) -> None:
        """ncu, and its report as text behind the summary."""
        report = self.work / "kernels"
        sections = [word for name in SECTIONS for word in ("--section", name)]
        command = (
            *("ncu", *sections, "--clock-control", "none", "--profile-from-start", "off"),
            *("--kernel-name-base", "demangled", "--kernel-name", f"regex:{PATTERN}"),
            *("--launch-count", str(LAUNCHES), "--force-overwrite", "--export", str(report)),
            *(self.python, "-m", "gpu_day.kernels"),
        )
        self._stage("profiles", 545, [Step("ncu", command, 90.0)])
        if report.with_suffix(".ncu-rep").is_file():
            command = ("ncu", "--import", f"{report}.ncu-rep", "--page", "details")
            self._stage("their text", 555, [Step("ncu-text", command, 20.0)])

    def _warm(self) -> None:
        """Compiles the peers while the GPU is busy with tests, so that the benchmark need not."""
        step = self._python("warm", "gpu_day.measure", "--compile-only", limit=200)
        end = self._until(250)
        step = _with(step, {"OMP_NUM_THREADS": "2"})
        self._report(steps.run(step, self.logs, end, self.environment))

    # ---- how a step is made ----

    def _python(self, name: str, module: str, *arguments: object, limit: float) -> Step:
        command = (self.python, "-m", module, *map(str, arguments))
        return Step(name, command, limit * self.target.stretch)

    def _pytest(self, spec: str, kind: str, *arguments: str) -> Step:
        name = f"{kind}/{spec}"
        stem = self.tests / name.replace("/", "-")
        command = (
            *(
                self.python,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "gpu_day.one_spec",
            ),
            *("-o", "filterwarnings=default", "--maxfail=15", f"--junitxml={stem}.xml", *arguments),
        )
        variables = {"GPU_DAY_SPEC": spec, "GPU_DAY_LINES": f"{stem}.jsonl"}
        return Step(name, command, 120.0 * self.target.stretch, variables)

    def _sanitizer(self, tool: str, spec: str) -> Step:
        stem = self.found / f"{tool}-{spec}"
        kernels = ("--kernel-regex", "kns=kernel_entry") if self._has_kernel_filter() else ()
        command = (
            *("compute-sanitizer", "--tool", tool, *kernels, "--print-limit", "20"),
            *("--error-exitcode", "9", "--log-file", f"{stem}.txt"),
            *(self.python, "-m", "gpu_day.sanitize", spec, f"{stem}.jsonl"),
        )
        # Each tensor its own allocation, so that an access beyond it is one beyond memory.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
        return Step(f"{tool}/{spec}", command, 60.0 * self.target.stretch, variables)

    @property
    def _has_graphs(self) -> bool:
        return self.target.device == "cuda"

    def _has_kernel_filter(self) -> bool:
        """Whether this compute-sanitizer knows the option that leaves other kernels out."""
        if not hasattr(self, "_filter"):
            self._filter = False  # also if it hangs: one answer is waited for
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                command = ["compute-sanitizer", "--help"]
                told = subprocess.run(
                    command, env=self.environment, capture_output=True, text=True, timeout=10
                )
                self._filter = "--kernel-regex" in told.stdout
        return self._filter

    # ---- running them ----

    def _until(self, second: float) -> float:
        """The end of a stage, in time.monotonic()."""
        return min(self.start + second * self.target.stretch, self.end - steps.GRACE)

    def _stage(
        self,
        name: str,
        until: float,
        wanted: Iterable[Step],
        *,
        workers: int | None = None,
        critical: bool = False,
    ) -> list[Outcome]:
        """Runs the steps of a stage side by side, and brings home what there is so far."""
        begin = time.monotonic() - self.start
        end = self.end if critical else self._until(until)
        count = workers or self.target.workers
        outcomes = steps.run_all(wanted, self.logs, end, self.environment, count, self._report)
        took = time.monotonic() - self.start - begin
        fine = sum(outcome.fine for outcome in outcomes)
        self._say(f"{name}: {fine} of {len(outcomes)} steps fine, {begin:.0f} s + {took:.0f} s")
        self.bring_home()
        return outcomes

    def _report(self, outcome: Outcome) -> None:
        with self.lock:
            self.outcomes.append(outcome)
            text = f"{outcome}\n"
            if not outcome.fine:
                text += "".join(f"    {line}\n" for line in outcome.tail().splitlines())
            self._write(text)

    def _say(self, text: str) -> None:
        with self.lock:
            self._write(f"==== {text}\n")
        print(f"{time.monotonic() - self.start:6.1f} s  {text}", flush=True)

    def _write(self, text: str) -> None:
        """Into the summary, if the disk has room for it."""
        with contextlib.suppress(OSError), (self.out / "summary.txt").open("a") as file:
            file.write(text)

    # ---- what comes home ----

    def bring_home(self) -> None:
        """At most eight files of 16 MB: what there is at this moment, and finds room."""
        for name, folder in (
            ("junit.tgz", self.tests), ("sanitizer.tgz", self.found), ("logs.tgz", self.logs)
        ):  # fmt: skip
            with contextlib.suppress(OSError):
                _pack(self.out / name, folder)
        report = self.work / "kernels.ncu-rep"
        with contextlib.suppress(OSError):
            if report.is_file() and report.stat().st_size <= HOME_LIMIT:
                shutil.copyfile(report, self.out / report.name)

    def _collect_environment(self, log: Path) -> None:
        with contextlib.suppress(OSError):
            shutil.copyfile(log, self.out / "env.txt")

    def _marks(self, library: str) -> int:
        """How many cases of a library the benchmark has begun."""
        lines = (self.out / "bench.jsonl").read_text().splitlines()
        return sum(f'"event": "start", "library": "{library}"' in line for line in lines)

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _library(self, name: str) -> Path:
        return self.work / "libraries" / name

    def _environment(self) -> dict[str, str]:
        """Of every step: where everything lies, and what is compiled on the way."""
        folders = [ROOT / "python", ROOT / "ci", ROOT / "tests", ROOT, self.work / "site"]
        programs = [str(self.prepared.programs)] if self.prepared.programs else []
        return {
            **os.environ,
            VARIABLE: self.target.name,
            "PATH": os.pathsep.join([*programs, os.environ.get("PATH", ""), *_tools()]),
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HEADWORKS_LIBRARY_DIR": str(self._library("library")),
            "TORCHINDUCTOR_CACHE_DIR": str(self._folder("inductor")),
            "TRITON_CACHE_DIR": str(self._folder("triton")),
        }


def _tools() -> list[str]:
    """Where compute-sanitizer and ncu lie that are not on PATH."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    ncu = sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    return [str(folder) for folder in (toolkit / "bin", *ncu) if folder.is_dir()]


def _with(step: Step, environment: dict[str, str]) -> Step:
    return replace(step, environment={**step.environment, **environment})


def _pack(archive: Path, folder: Path) -> None:
    """The folder as a .tgz; without the largest files where it would be too large to come home."""
    files = sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.stat().st_size)
    for most in (len(files), len(files) // 2, len(files) // 4):
        with tarfile.open(archive, "w:gz") as tar:
            for file in files[:most]:
                _add(tar, file)
        if archive.stat().st_size <= HOME_LIMIT:
            return


def _add(tar: tarfile.TarFile, file: Path) -> None:
    """A file, or its end: packing what was printed without end must not cost other stages time."""
    entry = tar.gettarinfo(file, arcname=file.name)
    with file.open("rb") as content:
        content.seek(max(0, entry.size - LONGEST))
        entry.size = min(entry.size, LONGEST)
        tar.addfile(entry, content)
