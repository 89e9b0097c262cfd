# SPDX-License-Identifier: Apache-2.0
"""What CI says about builds: their cost, the CUDA stage without a compiler, README's minutes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def script(name: str, *arguments: str | Path, **variables: str):
    """Run one of the programs in ci/."""
    return subprocess.run(
        [str(ROOT / "ci" / name), *map(str, arguments)], env=os.environ | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100, check=False,
    )  # fmt: skip


def test_a_unit_or_a_build_over_its_budget_is_a_fault(tmp_path):
    log = tmp_path / "log.tsv"
    log.write_text("9.0\tx/a_cpu_avx2.cpp.o\n30.0\tx/b_sm80_f16_64.cu.o\n5.0\tx/a_cpu_avx2.cpp.o\n")
    budget = ("build_budget.py", "report", log)
    within = script(*budget, "--total", "35", "--unit", "30")
    assert within.returncode == 0, within.stdout
    assert "35.0      2  all" in within.stdout  # of a unit that was built twice the last
    assert "30.0      1  cuda sm80" in within.stdout
    over = script(*budget, "--total", "34", "--unit", "29")
    assert over.returncode == 1
    assert "b_sm80_f16_64.cu takes 30.0 core-seconds, budget 29" in over.stdout
    assert "the build takes 35.0 core-seconds, budget 34" in over.stdout


def test_a_budget_without_a_build_is_a_fault(tmp_path):
    assert "was anything compiled?" in script("build_budget.py", "report", tmp_path / "no").stdout


def test_the_launcher_logs_the_cost_and_passes_the_status_on(tmp_path):
    log = tmp_path / "log.tsv"
    launch = ("build_budget.py", "launch", log, "sh", "-c")
    work = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exit 3"
    assert script(*launch, work, "-o", "folder/unit.cpp.o").returncode == 3
    seconds, name = log.read_text().split()
    assert float(seconds) > 0
    assert name == "folder/unit.cpp.o"


def test_the_cuda_stage_without_nvcc_fails_unless_asked_to_pass(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho /nowhere\n")
    python.chmod(0o755)
    without = {"PATH": "/usr/bin:/bin", "CUDA_HOME": "/nowhere", "PYTHON": str(python)}
    result = script("cuda.sh", **without)
    assert result.returncode == 1
    assert "the CUDA code was NOT compiled" in " ".join(result.stdout.split())
    assert script("cuda.sh", **without, HEADWORKS_WITHOUT_NVCC="1").returncode == 0


def test_the_times_of_readmes_command(tmp_path):
    trace = tmp_path / "trace.tsv"
    trace.write_text(
        "+\t100.0\tpython3 -m venv .venv\n++\t101\tunset x\n+\t150\tpip install '.[demo]'\n"
        "+\t320.5\theadworks demo\n+\t440\tend\n"
    )
    told = [
        line.split(" s  ") for line in script("readme_times.py", "print", trace).stdout.splitlines()
    ]
    assert [(float(s), c) for s, c in told] == [
        (50.0, "python3 -m venv .venv"), (170.5, "pip install '.[demo]'"), (119.5, "headworks demo")
    ]  # fmt: skip


def test_the_times_in_readme_add_up():
    """The sentence is that of the committed figures, whose parts make the whole."""
    assert script("readme_times.py", "check").returncode == 0
    text = (ROOT / "README.md").read_text()
    said = re.search(r"It took (\d+) .*?: (\d+) .*?, (\d+) .*?, (\d+) for the demo", text)
    whole, *parts = map(int, said.groups())
    assert whole == sum(parts)
