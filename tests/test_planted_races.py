# SPDX-License-Identifier: Apache-2.0
"""Synchronisation planted wrong in operators' kernels: the race check reports it, also where no
order of the threads changes a number.

Each is compiled into a copy of the emulator's library of a build of the preset `races`, whose
folder HEADWORKS_RACES_BUILD names: `ci/races.sh` does it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

BUILD = os.environ.get("HEADWORKS_RACES_BUILD", "")
pytestmark = pytest.mark.skipif(not BUILD, reason="runs in ci/races.sh, which builds for it")

ROOT = Path(__file__).parents[1]

# Runs small cases of an operator in every order of threads and landing of copies against the
# reference, without the race check; then once with it.
CHECK = """
import importlib, itertools, sys
import torch
from headworks import _library
from headworks.testing import check_case
operator, backend, dtype, only = sys.argv[1:]
spec = importlib.import_module(f"specs.{operator}").SPEC
orders = list(itertools.product(("forward", "reverse", "shuffled"), ("late", "early"), ("off",)))
wrong, races = [], []
for order, copies, check in [*orders, ("forward", "late", "on")]:
    _library.configure_emulator(seed=1, order=order, copies=copies, races=check)
    for case in [c for c in spec.emulator_cases if only in str(c)][:6]:
        try:
            check_case(spec, case, backend, getattr(torch, dtype))
        except NotImplementedError:  # a size that this build does not have
            pass
        except AssertionError as error:
            (wrong if check == "off" else races).append(f"{case}, {order}, {copies}: {error}")
        except RuntimeError as error:
            races.append(str(error))
print("wrong numbers:", len(wrong), *[text[:150] for text in wrong[:2]])
print("reports:", len(races), *[text[:1500] for text in races[:1]])
"""


@dataclass(frozen=True)
class Planted:
    name: str
    file: str  # under csrc/
    right: str  # occurs once
    wrong: str
    instance: str  # the generated source that is compiled with it
    operator: str
    cases: str  # those that are run have it in their names
    hidden: bool  # no order of the threads shows it
    report: str  # the message contains it


PLANTED = (
    Planted("removed_barrier", "ops/kmeans_route/kmeans_route_simt.cuh",
            "load(first);\n        dev::sync_block();", "load(first);",
            "kmeans_route_simt_f32_0.cpp", "kmeans_route", "", False, "of shared memory"),
    Planted("copies_behind_the_own_wait", "ops/linear_attention/linear_attention_sm80_loop.cuh",
            "dev::copy_async_wait<0>();\n    dev::sync_block();", "dev::copy_async_wait<0>();",
            "linear_attention_sm80_bf16_64.cpp", "linear_attention", "", False, "of shared memory"),
    Planted("every_thread_writes_the_same", "ops/select_topk/select_topk_simt.cuh",
            "if (dev::thread_index() == 0) smem.prefix = 0", "smem.prefix = 0",
            "select_topk_simt_f32_0.cpp", "select_topk", "", True, "of shared memory"),
)  # fmt: skip


class Sandbox:
    """The build's objects, one of them exchanged."""

    def __init__(self, folder: Path):
        self.folder, self.lib = folder, folder / "lib"
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copytree(Path(BUILD) / "lib", self.lib)
        commands = json.loads((Path(BUILD) / "compile_commands.json").read_text())
        self.commands = {Path(c["file"]).name: c for c in commands if "hw_emulated" in c["command"]}

    def call(self, command, **options) -> str:
        result = subprocess.run(
            command, text=True, timeout=900, check=False, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, **options,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-4000:]
        return result.stdout

    def compile(self, source: str) -> Path:
        """The object of a generated source, with the headers of the copy."""
        entry = self.commands[source]
        words = shlex.split(entry["command"].replace(f"-I{ROOT}/csrc", f"-I{self.folder}/csrc"))
        out = self.folder / f"{source}.o"
        words[words.index("-o") + 1] = str(out)
        self.call(words, cwd=entry["directory"])
        return out

    def link(self, source: str, out: Path) -> None:
        objects = []
        for entry in self.commands.values():
            words = shlex.split(entry["command"])
            objects.append(Path(entry["directory"]) / words[words.index("-o") + 1])
        exchanged = [out if f"/{source}.o" in str(x) else x for x in objects]
        assert exchanged != objects
        exports = Path(BUILD) / "generated" / "headworks_emulator.map"
        self.call(
            ["g++", "-shared", "-fopenmp", *exchanged, f"-Wl,--version-script={exports}",
             "-Wl,--gc-sections", "-ldl", "-o", self.lib / "libheadworks_emulator.so"]
        )  # fmt: skip

    def check(self, planted: Planted) -> str:
        sm80 = "sm80" in planted.instance
        return self.call(
            [sys.executable, "-c", CHECK, planted.operator,
             "emulate:sm80" if sm80 else "emulate:simt", "bfloat16" if sm80 else "float32",
             planted.cases],
            cwd=ROOT / "tests", env=os.environ | {"HEADWORKS_LIBRARY_DIR": str(self.lib)},
        )  # fmt: skip

    def plant(self, planted: Planted) -> str:
        path = self.folder / "csrc" / planted.file
        text = path.read_text()
        assert text.count(planted.right) == 1, f"occurs {text.count(planted.right)} times"
        try:
            path.write_text(text.replace(planted.right, planted.wrong))
            self.link(planted.instance, self.compile(planted.instance))
            return self.check(planted)
        finally:
            path.write_text(text)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    return Sandbox(tmp_path_factory.mktemp("races"))


@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: f"{p.operator}-{p.name}")
def test_a_planted_race_is_reported(sandbox, planted):
    output = sandbox.plant(planted)
    assert ("wrong numbers: 0" in output) == planted.hidden, output
    assert "reports: 0" not in output and planted.report in output, output
