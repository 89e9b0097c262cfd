# SPDX-License-Identifier: Apache-2.0
"""The GPU day: a step costs only itself. What the steps compute is shown by `ci/gpu.sh --dry-run`,
what becomes of what came home by test_gpu_page.py."""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "ci")]

from gpu_day import day as gpu_day  # noqa: E402
from gpu_day import measure, prepared, samples, steps, target, versions  # noqa: E402

from bench import fill_gpu, gpu, gpu_results, predictions, suite  # noqa: E402
from specs import SPECS  # noqa: E402

IGNORE = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
REPORT = (
    "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('reported', flush=True)"
)


def python(name, code, limit=30.0):
    return steps.Step(name, (sys.executable, "-c", code), limit)


def run(step, folder, seconds=60.0):
    return steps.run(step, folder, time.monotonic() + seconds, dict(os.environ))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(steps, "GRACE", 2.0)


# ---- steps ---------------------------------------------------------------------------------------


def test_a_step_ends_as_it_ends(tmp_path):
    assert run(python("good", "print('said')"), tmp_path).status == "ok"
    assert (tmp_path / "good.log").read_text() == "said\n"
    failed = run(python("bad", "raise SystemExit(7)"), tmp_path)
    assert (failed.status, failed.code, failed.fine) == ("failed", 7, False)
    crashed = run(python("crash", "import os; os.abort()"), tmp_path)
    assert (crashed.status, crashed.code) == ("failed", -signal.SIGABRT)
    absent = run(steps.Step("absent", ("no-such-program",), 5.0), tmp_path)
    assert absent.status == "failed" and "no-such-program" in absent.tail()


def test_a_step_that_hangs_is_interrupted_and_can_report(tmp_path):
    outcome = run(python("hang", REPORT, limit=6.0), tmp_path)
    assert outcome.status == "interrupted" and outcome.tail() == "reported"


def test_a_step_that_ignores_int_is_killed(tmp_path, impatient):
    outcome = run(python("deaf", IGNORE, limit=2.0), tmp_path)
    assert (outcome.status, outcome.code) == ("killed", -signal.SIGKILL)


def test_what_a_step_leaves_behind_ends_with_it(tmp_path):
    code = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {IGNORE!r}]).pid)"
    )
    outcome = run(python("parent", code), tmp_path)
    child = int(outcome.tail())
    for _ in range(200):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of a finished step runs on")


def test_what_a_step_prints_without_end_ends_it_and_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "LARGEST", 1 << 20)
    monkeypatch.setattr(gpu_day, "LONGEST", 1 << 10)
    outcome = run(python("loud", "while True:\n print('x' * 99, flush=True)"), tmp_path)
    assert outcome.status == "failed" and outcome.log.stat().st_size == 1 << 20
    assert outcome.tail(1).startswith("x")
    gpu_day._pack(tmp_path / "logs.tgz", tmp_path)
    with tarfile.open(tmp_path / "logs.tgz") as tar:
        assert tar.getmember("loud.log").size == 1 << 10


def test_a_step_leaves_no_core(tmp_path):
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    assert run(python("core", code), tmp_path).tail() == "0"


def test_a_step_is_not_started_when_there_is_no_time(tmp_path):
    assert run(python("late", "pass"), tmp_path, seconds=1.0).status == "not run"


def test_all_steps_can_be_stopped_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_stopped", threading.Event())
    threading.Timer(2.0, steps.stop).start()
    wanted = [python(f"deaf {i}", IGNORE) for i in range(3)]
    end = time.monotonic() + 60
    outcomes = steps.run_all(wanted, tmp_path, end, dict(os.environ), 2, lambda outcome: None)
    assert [o.status for o in outcomes] == ["failed", "failed", "not run"]
    assert max(o.seconds for o in outcomes) < 30


def test_steps_side_by_side_cost_only_themselves(tmp_path, impatient):
    wanted = [
        python("deaf", IGNORE, 2.0),
        python("crash", "import os; os.abort()"),
        python("hang", REPORT, 6.0),
        python("good", "pass"),
    ]
    seen = []
    end = time.monotonic() + 60
    outcomes = steps.run_all(wanted, tmp_path, end, dict(os.environ), 2, seen.append)
    assert [o.status for o in outcomes] == ["killed", "failed", "interrupted", "ok"]
    assert sorted(o.name for o in seen) == ["crash", "deaf", "good", "hang"]


# ---- the day -------------------------------------------------------------------------------------


def a_day(tmp_path, seconds=60.0):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    made = prepared.Prepared(tmp_path, tmp_path / "primitives")
    return gpu_day.Day(target.TARGETS["emulator"], made, work, out, seconds), out


def test_a_stage_goes_on_behind_what_fails_and_brings_home(tmp_path, impatient):
    day, out = a_day(tmp_path)
    (day.tests / "a.jsonl").write_text("{}\n")
    first = [python("deaf", IGNORE, 2.0), python("crash", "import os; os.abort()")]
    day._stage("one", 100, first)
    day._stage("two", 100, [python("good", "print(1)")])
    text = (out / "summary.txt").read_text()
    assert "one: 0 of 2 steps fine" in text and "two: 1 of 1 steps fine" in text
    assert "killed" in text and "failed (-6)" in text and not day.fine
    with tarfile.open(out / "junit.tgz") as tar:
        assert tar.getnames() == ["a.jsonl"]
    with tarfile.open(out / "logs.tgz") as tar:
        assert sorted(tar.getnames()) == ["crash.log", "deaf.log", "good.log"]


def test_the_day_ends_in_time_whatever_hangs(tmp_path, impatient):
    day, out = a_day(tmp_path, seconds=8.0 / target.TARGETS["emulator"].stretch)
    start = time.monotonic()
    day._stage("one", 100, [python(f"hang {i}", REPORT) for i in range(6)])
    day._stage("two", 100, [python("late", "pass")])
    statuses = [o.status for o in day.outcomes]
    assert statuses.count("interrupted") == 2 and statuses.count("not run") == 5
    assert time.monotonic() - start < 60
    assert "two: 0 of 1 steps fine" in (out / "summary.txt").read_text()


def test_nothing_runs_without_the_primitives(tmp_path, monkeypatch):
    day, out = a_day(tmp_path)
    monkeypatch.setattr(day, "_build", lambda: True)
    (tmp_path / "primitives").write_text(f"#!{sys.executable}\nraise SystemExit(1)\n")
    monkeypatch.setattr(day, "_samples", lambda: pytest.fail("went on"))
    day.run()
    assert "stopped here" in (out / "summary.txt").read_text()


def test_nothing_runs_where_torch_has_no_device(tmp_path, monkeypatch):
    day, out = a_day(tmp_path)
    blind = "import sys; from gpu_day import versions as v; v._torch_works = lambda: False; "
    made = {
        "gpu_day.build": "pass",
        "gpu_day.versions": f"{blind} sys.exit(v.main())",
    }
    monkeypatch.setattr(day, "_python", lambda name, module, *_, limit: python(name, made[module]))
    monkeypatch.setattr(day, "_primitives", lambda: True)
    monkeypatch.setattr(day, "_samples", lambda: pytest.fail("went on"))
    day.run()
    text = (out / "summary.txt").read_text()
    assert "stopped here: torch cannot use the device" in text


def test_whether_torch_can_use_the_device_is_found_out(monkeypatch, capsys):
    monkeypatch.setenv(target.VARIABLE, "emulator")
    assert versions._torch_works()
    here = replace(target.TARGETS["emulator"], device="nowhere")
    monkeypatch.setattr(versions, "target", lambda: here)
    assert not versions._torch_works()
    assert "nowhere" in capsys.readouterr().out


def test_a_full_disk_does_not_end_the_day(tmp_path, monkeypatch, impatient):
    day, out = a_day(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gpu_day, "_pack", full)
    (out / "summary.txt").unlink()
    (out / "summary.txt").mkdir()  # nothing can be written there either
    day._stage("one", 100, [python("good", "print(1)")])
    assert day.fine


def test_a_wheel_that_is_broken_is_a_peer_that_is_missing(tmp_path):
    good, bad = tmp_path / "good.whl", tmp_path / "bad.whl"
    for path in (bad, good):
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{path.stem}.py", "print('imported')\n")
    content = bad.read_bytes()
    bad.write_bytes(content.replace(b"imported", b"imp0rted"))
    site = prepared.unpack((bad, good), tmp_path / "site")
    assert (site / "good.py").exists()


def test_tools_of_the_toolkit_need_not_be_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    day, _ = a_day(tmp_path)
    assert str(tmp_path / "bin") in day.environment["PATH"].split(os.pathsep)[1:]


def test_a_sanitizer_that_hangs_is_asked_once(tmp_path, monkeypatch):
    day, _ = a_day(tmp_path)
    asked = []

    def hang(command, **options):
        asked.append(command)
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(gpu_day.subprocess, "run", hang)
    assert [day._has_kernel_filter() for _ in range(3)] == [False] * 3
    assert len(asked) == 1


def test_the_day_knows_every_specification():
    assert sorted(gpu_day.SPECS) == sorted(spec.name for spec in SPECS)


def test_what_a_machine_lacks_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run ci/gpu_prepare\.sh first"):
        prepared.Prepared.found(tmp_path)
    command = ["bash", str(ROOT / "ci" / "gpu.sh"), "--only", "dinner", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "dinner; the stages are samples" in result.stderr


def test_the_stand_ins_take_what_the_day_says_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day.Day, "_has_kernel_filter", lambda self: True)
    day, _ = a_day(tmp_path)
    command = list(day._sanitizer("racecheck", "key_scan").command)
    command[0] = str(prepared.STAND_INS / command[0])
    at = command.index(day.python)
    log = Path(command[command.index("--log-file") + 1])
    assert subprocess.run([*command[:at], "false"]).returncode == 1
    assert "racecheck" in log.read_text()
    assert subprocess.run([command[0], "--no-such-option", "true"], capture_output=True).returncode


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (lambda: None, "ok"),
        (lambda: pytest.fail("wrong result"), "failed"),
        (lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)), "died (11)"),
        (lambda: time.sleep(60), "died (9)"),
    ],
    ids=["good", "wrong", "crash", "hang"],
)
def test_a_sample_is_alone_in_its_process(monkeypatch, body, outcome):
    monkeypatch.setattr(samples, "check_case", lambda *a, **k: body())
    monkeypatch.setattr(samples, "LIMIT", 2.0)
    spec = SPECS[0]
    child = samples.Child(spec, spec.emulator_cases[0], "simt", "torch.float32")
    while not child.ended():
        time.sleep(0.01)
    line = child.line()
    assert line["outcome"] == outcome and line["dtype"] == "float32"
    assert ("wrong result" in line["message"]) == (outcome == "failed")


# ---- the benchmark -------------------------------------------------------------------------------


def some_cases(*names):
    calls = {"headworks": lambda: 1, "peer": lambda: 2}
    return [("op", suite.Case(name, {}, lambda: calls)) for name in names]


def test_a_case_that_took_the_process_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "bench.jsonl"
    path.write_text("")
    monkeypatch.setattr(gpu, "cases", lambda device, tiny: some_cases("a", "b", "c"))
    first = measure.Lines(path, "library")
    first.add("start", suite="op", case="a")  # and then the process was killed
    with path.open("a") as file:
        file.write('{"event": "resu')  # while it wrote
    assert measure.measure(measure.Lines(path, "library"), "cpu", dry=True) == 0
    lines = list(measure._readable(path.read_text()))
    rows = {line["case"]: line["result"] for line in lines if line["event"] == "result"}
    assert list(rows) == ["a", "b", "c"]
    assert "ended before" in rows["a"]["failed"]["process"] and not rows["a"]["seconds"]
    assert rows["b"]["seconds"]["peer"]["samples"] == 1
    before = path.read_text()
    assert measure.measure(measure.Lines(path, "library"), "cpu", dry=True) == 0
    assert path.read_text() == before


def test_a_poisoned_process_ends_behind_its_row(tmp_path, monkeypatch):
    path = tmp_path / "bench.jsonl"
    monkeypatch.setattr(gpu, "cases", lambda device, tiny: some_cases("a", "b"))
    monkeypatch.setattr(gpu, "poisoned", lambda device: True)
    for count in (1, 2):
        assert measure.measure(measure.Lines(path, "library"), "cpu", dry=True) == measure.POISONED
        assert path.read_text().count('"event": "result"') == count
    assert measure.measure(measure.Lines(path, "library"), "cpu", dry=True) == 0


def test_inputs_that_do_not_fit_are_a_row(tmp_path, monkeypatch):
    def contenders():
        raise RuntimeError("out of memory\nand more")

    cases = [("op", suite.Case("a", {}, contenders))]
    monkeypatch.setattr(gpu, "cases", lambda device, tiny: cases)
    path = tmp_path / "bench.jsonl"
    assert measure.measure(measure.Lines(path, "library"), "cpu", dry=True) == 0
    row = json.loads(path.read_text().splitlines()[-1])["result"]
    assert row["failed"] == {"case": "RuntimeError: out of memory"}


def test_the_cases_of_the_day_are_those_of_its_predictions():
    for device, tiny in (("cuda", False), ("cpu", True)):
        pairs = [(name, case.name) for name, case in gpu.cases(device, tiny)]
        assert len(pairs) == len(set(pairs)) > 20
        assert {name for name, _ in pairs} == set(suite.SUITES)
    names = {(name, case.name) for name, case in gpu.cases("cuda", False)}
    figures = {kernel.case for kernel in fill_gpu.KERNELS if kernel.case}
    assert figures <= names


def test_every_prediction_gets_a_figure_from_the_cases_of_the_day():
    """Made-up times of every case and contender that predictions ask for."""
    peers = (*predictions.FLASH, *predictions.FLA, *predictions.EAGER, *predictions.COMPILED)
    peers += (*predictions.OPTIONS, "flex, bias", "column sums", "dense", "headworks")
    for name in suite.SUITES:
        results = {}
        for owner, case in gpu.cases("cuda", False):
            seconds = dict.fromkeys(peers, gpu_results.Times(1.0, 1.0, 1.0, 5))
            if case.name == "growth":
                seconds = {str(s): gpu_results.Times(s, s, s, 5) for s in (1, 2, 4, 8)}
            least = {"gemm": 0.5, "copy": 0.8}
            if owner == name:
                results[case.name] = suite.Result(case.name, dict(case.shape), seconds, least=least)
        for judged in predictions.targets(name, results):
            assert judged.figure is not None, judged.name
