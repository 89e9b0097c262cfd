# SPDX-License-Identifier: Apache-2.0
"""Files that are cut off, incomplete or cannot be written: one clear line, and nothing is lost."""

from __future__ import annotations

import errno
import io
import os
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from headworks import models
from headworks.cli import demo as demo_module
from headworks.cli import main
from headworks.models import BasedConfig, BasedLM, load_checkpoint, save_checkpoint

SMALL = BasedConfig(
    vocab_size=61, d_model=32, num_layers=2, linear_layers=(1,), window_layers=(), num_heads=2,
    mlp_hidden=32,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start):
    torch.set_num_threads(1)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, BasedLM(SMALL), extra={"step": 3})
    return path


def test_a_checkpoint_that_is_cut_off(saved):
    whole = saved.read_bytes()
    for part in (1, 4, 100, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        saved.write_bytes(whole[:part])
        with pytest.raises(ValueError, match=r"is not a headworks checkpoint: .") as caught:
            load_checkpoint(saved)
        assert len(str(caught.value).splitlines()) == 1


CHANGES = {
    "model": (lambda c: c.pop("model"), r"\['model'\] are missing"),
    "extra": (lambda c: c.pop("extra"), r"\['extra'\] are missing"),
    "all": (lambda c: [c.pop(k) for k in list(c) if k != "format"], "'state_dict', 'tokenizer'"),
    "weight": (lambda c: c["state_dict"].popitem(), "weights of another model .*: Missing key"),
    "shape": (
        lambda c: c["state_dict"].update({"lm_head.weight": torch.ones(2)}), "another model"),
    "weights": (lambda c: c.update(state_dict=3), "weights of another model"),
    "config": (lambda c: c.update(config=None), "a config that is none"),
    "field": (lambda c: c["config"].update(colour=1), "a config that is none: .*colour"),
    "type": (lambda c: c["config"].update(d_model="wide"), "a config that is none"),
    "kind": (lambda c: c.update(model="OtherLM"), "holds a model OtherLM, expected one of"),
    "tokenizer": (lambda c: c.update(tokenizer="words"), "holds a tokenizer words, expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_that_lacks_something(name, saved):
    change, message = CHANGES[name]
    content = torch.load(saved, weights_only=True)
    change(content)
    torch.save(content, saved)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        load_checkpoint(saved)
    assert str(saved) in str(caught.value)


def test_what_cannot_be_loaded_is_not_saved(saved):
    before = saved.read_bytes()
    model = BasedLM(SMALL)

    class Mine(BasedLM):
        pass

    for wrong in (Mine(SMALL), torch.nn.Linear(2, 2), torch.nn.Sequential(model)):
        with pytest.raises(ValueError, match=r"expected one of .*BasedLM.* itself"):
            save_checkpoint(saved, wrong)
    for extra in ({"path": Path("a")}, {"curve": [numpy.ones(2)]}, {"f": model}):
        with pytest.raises(ValueError, match="extra holds what a checkpoint cannot"):
            save_checkpoint(saved, model, extra=extra)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.fixture
def full_disk():
    """No file can grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_is_not_saved(saved):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match="extra holds what a checkpoint cannot"):
        save_checkpoint(saved, BasedLM(SMALL), extra={"rule": lambda step: step})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_only_files_are_replaced(saved):
    """Not a pipe or a device, whose place a file would take; a link still points to its file."""
    pipe, link = saved.with_name("pipe"), saved.with_name("latest.pt")
    os.mkfifo(pipe)
    for path in (pipe, saved.parent):
        with pytest.raises(OSError, match="not a file"):
            save_checkpoint(path, BasedLM(SMALL))
    assert pipe.is_fifo()
    link.symlink_to(saved.name)
    save_checkpoint(link, BasedLM(SMALL), extra={"step": 4})
    assert link.is_symlink()
    assert load_checkpoint(saved).extra == {"step": 4}


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path, full_disk):
    path = tmp_path / "model.pt"
    path.write_text("older")
    with pytest.raises(OSError, match=re.escape(str(path))) as caught:
        save_checkpoint(path, models.BasedLM(BasedConfig.byte_level("tiny"), device="cpu"))
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "older" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("some words of a text and more of them\n" * 200, encoding="utf-8")
    return path


def demo(text, out, *options):
    fixed = ["--text", str(text), "--out", str(out), "--contexts", "16", "--tokens", "5"]
    return main(["demo", *fixed, "--no-plots", "--quiet", "--steps", "1", *options])


def one_line(capsys):
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("headworks ")
    return line


def test_a_disk_that_fills_up_in_training(text, tmp_path, monkeypatch, capsys):
    """The checkpoint goes to the temporary folder."""
    save = save_checkpoint

    def full(path, *args, **options):
        if Path(path).parent == tmp_path / "out":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(path, *args, **options)

    monkeypatch.setattr(demo_module, "save_checkpoint", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert demo(text, tmp_path / "out") == 1
    line = one_line(capsys)
    assert "checkpoint.pt cannot be written: No space left on device" in line
    path = line.rpartition("the checkpoint is ")[2]
    assert load_checkpoint(path).extra["training"]["step"] == 1
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert demo(text, tmp_path / "out") == 1  # nowhere to write at all
    assert "cannot be written" in one_line(capsys)


@pytest.mark.parametrize("name", ["generated.txt", "results.json"])
def test_a_result_that_cannot_be_written(name, text, tmp_path, monkeypatch, capsys):
    write = Path.write_text

    def full(path, *args, **options):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert demo(text, tmp_path) == 1
    line = one_line(capsys)
    assert name in line and "No space left" in line
    assert load_checkpoint(line.rpartition("the checkpoint is ")[2]).extra["size"] == "tiny"


def test_too_little_room_is_seen_before_training(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert demo(text, tmp_path) == 2
    assert re.search(r"has 1 MiB free, expected \d+ MiB", one_line(capsys))


@pytest.mark.parametrize("prompt", ["\udcff\udcfe", "good \udce9"])
def test_a_prompt_that_is_no_text(prompt, text, tmp_path, capsys):
    assert demo(text, tmp_path, "--prompt", prompt) == 2
    assert "--prompt is not UTF-8 text" in one_line(capsys)


def test_output_that_cannot_be_printed(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Full())
        assert main(["info"]) == 1
    assert capsys.readouterr().err == "headworks info: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("option", ["--json", "--plots"])
def test_bench_writes_where_it_can(option, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    target = tmp_path if option == "--json" else file
    assert main(["bench", "select_topk", "--dry-run", option, str(target)]) == 2
    line = one_line(capsys)
    assert line.startswith(f"headworks bench: {option} {target} cannot be written")
    assert file.read_text() == "kept"
