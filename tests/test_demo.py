# SPDX-License-Identifier: Apache-2.0
"""`headworks demo`: short runs through the command line, its files, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from headworks.cli import main
from headworks.cli.demo_train import RECIPES, Trainer
from headworks.models import BasedConfig, BasedLM, load_checkpoint

WORDS = ("the", "state", "of", "a", "model", "holds", "what", "it", "has", "read", "and", "no")
PLOTS = ("training.png", "decode.png")


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start):
    """Steady speed also where other work runs beside the tests."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (3000,), generator=draw).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(WORDS[i] for i in picks) + " café\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, text_file):
    """A run of six steps in a process of its own: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = subprocess.run(
        [sys.executable, "-m", "headworks", "demo", "--steps", "6", "--tokens", "30",
         "--contexts", "64,300", "--text", str(text_file), "--out", str(out), "--seed", "5"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done


def demo(text_file, out, *options):
    """The command in this process, short and quiet unless told otherwise."""
    fixed = ["--text", str(text_file), "--out", str(out), "--contexts", "16", "--tokens", "5"]
    return main(["demo", *fixed, "--no-plots", *options])


def test_files_of_a_run(short_run):
    out, _ = short_run
    names = {*PLOTS, "results.json", "generated.txt", "checkpoint.pt"}
    assert {p.name for p in out.iterdir()} == names
    for name in PLOTS:
        content = (out / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
        width, height = struct.unpack(">II", content[16:24])
        assert width > 800 and height > 500


def test_results_of_a_run(short_run):
    out, done = short_run
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["ended"] == "finished" and results["steps"] == 6 and results["seed"] == 5
    bits = [bits for _, bits in results["train_curve"]]
    assert len(bits) == 6 and bits[-1] < bits[0] < 9
    assert results["validation_curve"][-1] == [6, results["validation_bits_per_byte"]]
    assert 0 < results["validation_bits_per_byte"] < 8
    assert f"{results['validation_bits_per_byte']:.3f}" in done.stdout
    rows = results["decode"]
    assert [row["context"] for row in rows] == [64, 300]
    assert rows[0]["based_state_bytes"] == rows[1]["based_state_bytes"]
    assert rows[1]["softmax_state_bytes"] * 64 == rows[0]["softmax_state_bytes"] * 300
    assert all(row["based_tokens_per_second"] > 0 for row in rows)
    assert results["total_seconds"] > results["training_seconds"] > 0


def test_text_of_a_run(short_run):
    out, done = short_run
    text = (out / "generated.txt").read_text(encoding="utf-8")
    assert text.startswith("The ") and text in done.stdout
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    start = checkpoint.tokenizer.encode("The ").unsqueeze(0)
    made = checkpoint.model.generate(start, 30, temperature=0.7, top_k=50, seed=5)
    assert checkpoint.tokenizer.decode(made[0]) == text[4:]


def test_progress_shows_loss_and_validation(short_run):
    _, done = short_run
    assert "loss" in done.stderr and "validation" in done.stderr and "6/6" in done.stderr


def test_resume_takes_steps_and_seed_from_the_checkpoint(short_run, text_file, tmp_path, capsys):
    out, _ = short_run
    given = ["--resume", str(out / "checkpoint.pt"), "--quiet"]
    assert demo(text_file, tmp_path, *given, "--steps", "9") == 0
    assert capsys.readouterr().out == ""
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [step for step, _ in results["train_curve"]] == list(range(1, 10))
    assert results["seed"] == 5
    assert demo(text_file, tmp_path / "again", *given) == 0
    results = json.loads((tmp_path / "again" / "results.json").read_text(encoding="utf-8"))
    assert results["steps"] == results["planned_steps"] == 6


def test_an_interrupted_training_goes_on_as_if_it_had_not_been():
    text = torch.randint(97, 105, (2000,), dtype=torch.uint8)
    whole = _trainer(text)
    assert whole.train(None, lambda: False, lambda _: None) == "finished"
    first = _trainer(text)
    assert first.train(None, lambda: first.step == 2, lambda _: None) == "interrupted"
    second = _trainer(text)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state(first.state())
    assert second.train(None, lambda: False, lambda _: None) == "finished"
    assert second.train_curve == whole.train_curve
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def _trainer(text, steps=4):
    torch.manual_seed(0)
    recipe = dataclasses.replace(RECIPES["tiny"], batch=2, length=32)
    model = BasedLM(BasedConfig.byte_level("tiny"))
    return Trainer(model, text[:1700], text[1700:], recipe, steps, seed=1)


def test_ctrl_c_leaves_a_checkpoint(text_file, tmp_path):
    command = ["-m", "headworks", "demo", "--steps", "100000", "--text", str(text_file)]
    process = subprocess.Popen(
        [sys.executable, *command, "--out", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        seen = b""
        while b"loss" not in seen:
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    path = tmp_path / "checkpoint.pt"
    assert str(path).encode() in rest and b"--resume" in rest and b"Traceback" not in rest
    checkpoint = load_checkpoint(path)
    assert checkpoint.extra["training"]["step"] >= 1
    checkpoint.model.generate(torch.tensor([[65]]), 2)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["ended"] == "interrupted"
    assert demo(text_file, tmp_path, "--resume", str(path), "--steps", "1", "--quiet") == 0


def test_ctrl_c_during_generation_leaves_a_checkpoint(text_file, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("headworks.cli.demo.stream_text", interrupted)
    assert demo(text_file, tmp_path, "--steps", "1", "--quiet") == 130
    assert "checkpoint.pt" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoint.pt").extra["training"]["step"] == 1


def test_the_time_limit_stops_the_training(text_file, tmp_path, capsys):
    start = time.monotonic()
    assert demo(text_file, tmp_path, "--minutes", "0.01", "--steps", "100000") == 0
    assert time.monotonic() - start < 60
    assert "time limit: stopped after" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["ended"] == "time" and 1 <= results["steps"] < 100000


def test_the_learning_rate_has_decayed_when_the_time_is_up(monkeypatch):
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 0.25 * next(ticks))
    monkeypatch.setattr("headworks.cli.training.time", clock)
    trainer = _trainer(torch.randint(97, 105, (2000,), dtype=torch.uint8), steps=100000)
    assert trainer.train(20, lambda: False, lambda _: None) == "time"
    peak = trainer.recipe.learning_rate
    assert 30 < trainer.step < 80
    assert trainer.optimizer.param_groups[0]["lr"] < 0.05 * peak


def test_the_default_text_is_learnt(tmp_path):
    out = ["--out", str(tmp_path), "--steps", "40", "--contexts", "16", "--tokens", "5"]
    assert main(["demo", *out, "--no-plots", "--quiet"]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["text"] == "pydoc_data.topics"
    assert results["validation_bits_per_byte"] < 4.5


def _write(path, content):
    path.write_bytes(content)
    return str(path)


BAD = {
    "text_missing": (lambda d: ["--text", str(d / "none.txt")], "No such file"),
    "text_folder": (lambda d: ["--text", str(d)], "directory"),
    "text_empty": (lambda d: ["--text", _write(d / "t", b"")], "is empty"),
    "text_nul": (lambda d: ["--text", _write(d / "t", b"ab\0c" * 2000)], "NUL bytes"),
    "text_latin": (lambda d: ["--text", _write(d / "t", b"caf\xe9 " * 2000)], "not UTF-8"),
    "text_short": (lambda d: ["--text", _write(d / "t", b"word " * 100)], "expected at least"),
    "out_is_file": (lambda d: ["--out", _write(d / "f", b"x")], "--out .* cannot be written"),
    "out_below_file": (
        lambda d: ["--out", _write(d / "f", b"x") + "/sub"], "--out .* cannot be written"),
    "device": (lambda d: ["--device", "toaster"], "expected auto, cpu, cuda"),
    "device_other": (lambda d: ["--device", "meta"], "expected auto, cpu, cuda"),
    "device_absent": (lambda d: ["--device", "cuda:99"], "torch sees"),
    "steps": (lambda d: ["--steps", "0"], "--steps is 0"),
    "tokens": (lambda d: ["--tokens", "-1"], "--tokens is -1"),
    "minutes": (lambda d: ["--minutes", "nan"], "--minutes is nan"),
    "seed": (lambda d: ["--seed", "-3"], "--seed is -3"),
    "prompt": (lambda d: ["--prompt", ""], "--prompt is empty"),
    "contexts_words": (lambda d: ["--contexts", "1k,4k"], "whole numbers"),
    "contexts_zero": (lambda d: ["--contexts", "0,10"], "lengths from 1"),
    "resume_missing": (lambda d: ["--resume", str(d / "none.pt")], "--resume .*No such file"),
    "resume_folder": (lambda d: ["--resume", str(d)], "--resume .*directory"),
    "resume_text": (
        lambda d: ["--resume", _write(d / "t", b"words")], "not a headworks checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(name, tmp_path, text_file, capsys):
    options, message = BAD[name]
    given = ["--text", str(text_file), "--out", str(tmp_path / "out"), *options(tmp_path)]
    assert main(["demo", *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("headworks demo: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(printed.err)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_another_size_than_that_of_the_checkpoint(short_run, text_file, tmp_path, capsys):
    resume = ["--resume", str(short_run[0] / "checkpoint.pt"), "--size", "small"]
    assert demo(text_file, tmp_path, *resume) == 2
    assert "the checkpoint to resume is tiny" in capsys.readouterr().err


@pytest.fixture
def without(monkeypatch):
    """Hides a package from find_spec."""

    def hide(package):
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == package else real(name)
        )

    return hide


def test_without_matplotlib(without, text_file, tmp_path, capsys):
    without("matplotlib")
    assert main(["demo", "--text", str(text_file), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'headworks[demo]'" in error and "--no-plots" in error
    assert demo(text_file, tmp_path, "--steps", "1", "--quiet") == 0


def test_without_tqdm(without, text_file, tmp_path, capsys):
    without("tqdm")
    assert demo(text_file, tmp_path, "--steps", "2") == 0
    out = capsys.readouterr().out
    assert "pip install 'headworks[demo]'" in out and "step 2/2" in out


def test_a_backend_that_does_not_run_is_named(monkeypatch, text_file, tmp_path, capsys):
    def broken(*_, **__):
        raise RuntimeError("no library\nbuild it")

    monkeypatch.setattr("headworks.cli.demo_checks.linear_attention", broken)
    assert demo(text_file, tmp_path) == 2
    assert "does not run on cpu: no library build it" in capsys.readouterr().err
