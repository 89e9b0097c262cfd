# SPDX-License-Identifier: Apache-2.0
"""`hw.build_info()` and `headworks info`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest
import torch

import headworks as hw
from headworks import _library, cli
from headworks._native import ACCUMULATION, NATIVE_CALLS
from headworks.cli.info import report
from specs import SPECS

BACKENDS = ["reference", "cpu", "sm90", "sm80", "simt", "emulate:sm80", "emulate:simt"]


def test_build_info_says_what_there_is():
    info = hw.build_info()
    assert info["versions"]["torch"] == torch.__version__
    assert info["cpu"]["isa"] in info["cpu"]["available"]
    assert set(info["cpu"]["available"]) <= set(info["cpu"]["built"])
    assert info["cuda"]["built"] == (info["cuda"]["reason"] == "")
    operators = info["operators"]
    assert operators["linear_attention"]["functions"] == ["forward", "backward", "step"]
    assert operators["key_scan"]["functions"] == ["forward", "backward"]
    for op in operators.values():
        assert list(op["backends"]) == BACKENDS
        assert set(op["backends"]["reference"].values()) == {""}


def test_build_info_agrees_with_the_dispatcher():
    """A dtype that the table offers is taken, one that it does not is refused."""
    info = hw.build_info()
    function = _library.function("key_scan.forward")
    for backend, dtypes in info["operators"]["key_scan"]["backends"].items():
        for name, reason in dtypes.items():
            if backend not in ("cpu", "emulate:simt", "emulate:sm80"):
                continue
            s = torch.zeros(1, 2, 1, dtype=getattr(torch, name))
            v = torch.zeros(1, 2, 1, 4, dtype=s.dtype)
            lse = torch.zeros(2, 1, 2, 1, dtype=ACCUMULATION[s.dtype])
            tensors = [s, v, None, None, v, lse, None, None, None]
            assert bool(_library.reasons(function, tensors)[backend]) == bool(reason), (
                backend,
                name,
            )


def test_info_prints_it(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("headworks", "Python", "torch", "C++ compiler", "CPU", "CUDA code", "emulator"):
        assert any(line.startswith(part) for line in text.splitlines()), part
    assert "linear_attention: forward, backward, step" in text
    for backend in BACKENDS:
        assert f"\n  {backend} " in text


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert len(info["cuda"].pop("devices")) == torch.cuda.device_count()
    assert info == hw.build_info()


def test_the_report_gives_reasons():
    """The text of a build that lacks things, from made-up data."""
    missing = dict.fromkeys(("float64", "float32", "bfloat16", "float16"), "no nvcc")
    some = dict.fromkeys(missing, "") | {"float64": "built for float32"}
    text = report(
        {
            "versions": {"headworks": "1", "python": "3", "torch": "2", "torch_cuda": None},
            "build": {"preset": "auto", "build_type": "Release", "compiler": "GNU 12"},
            "cpu": {"processor": "x", "isa": "avx2", "built": ["avx2", "avx512"],
                    "available": ["avx2"]},
            "cuda": {"built": False, "reason": "no nvcc", "devices": []},
            "emulator": False,
            "operators": {"op": {"functions": ["f"], "backends": {"cpu": some, "simt": missing}}},
        }
    )  # fmt: skip
    assert "CUDA code     no, because no nvcc" in text
    assert "not on this machine: avx512" in text
    cpu, simt = text.splitlines()[-2:]
    assert cpu.split()[:2] == ["cpu", "-"]
    assert cpu.endswith("built for float32")
    assert simt.endswith("no nvcc")


def test_module_and_bad_command():
    run = [sys.executable, "-m", "headworks"]
    assert subprocess.run([*run, "info"], capture_output=True, check=False).returncode == 0
    bad = subprocess.run([*run, "fly"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "invalid choice: 'fly'" in bad.stderr
    assert subprocess.run(run, capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("spec", [s for s in SPECS if s.function in NATIVE_CALLS], ids=str)
def test_explain_computes_nothing(spec, monkeypatch):
    """Arguments are validated and backends asked; nothing native is called, not to route either."""

    def refuse(*arguments):
        raise AssertionError("native code was called")

    answers = []

    def explained(*arguments, **options):
        answers.append(hw.explain(spec.function, *arguments, **options))

    monkeypatch.setattr(_library, "call", refuse)
    monkeypatch.setattr(hw, spec.function.__name__, explained)
    case = spec.emulator_cases[0]
    tensors = spec.make(case, torch.float32)
    with contextlib.suppress(TypeError, AttributeError):  # where the spec looks into the result
        spec.run(tensors, case, "auto")
    assert len(answers) == 1 and answers[0].backend == "cpu"
