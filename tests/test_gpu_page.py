# SPDX-License-Identifier: Apache-2.0
"""What came home from a GPU day becomes bench/results and the page bench/GPU.md."""

from __future__ import annotations

import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from bench import fill_gpu  # noqa: E402


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_archive(path, folder, **files):
    folder.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            (folder / name).write_text(text)
            tar.add(folder / name, arcname=name)


def a_result(case, shape=None, failed=None, **seconds):
    times = {n: {"median": s, "low": s, "high": s, "samples": 5} for n, s in seconds.items()}
    return {"case": case, "shape": shape or {}, "seconds": times, "peak_bytes": {}, "ceiling": {},
            "least": {"gemm": 1e-4, "copy": 5e-4}, "failed": failed or {}}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A made-up day: a folder as ci/gpu.sh fills it."""
    folder = tmp_path / "results"
    folder.mkdir()
    case = "forward S 8192 bf16"
    fla = {"fla parallel_based": 3e-3}
    rows = [
        ("linear_attention", a_result(case, headworks=1e-3, **fla)),
        ("attention", a_result("train causal D 128 S 8192 bf16", failed={"headworks": "no"})),
    ]
    head = {
        "event": "machine",
        "library": "library",
        "dry_run": False,
        "machine": {"gpu": "NVIDIA Made-Up 1", "cuda": "13.0", "torch": "2.11.0"},
    }
    lines = [{"event": "result", "library": "library", "suite": name, "case": row["case"],
              "result": row} for name, row in rows]  # fmt: skip
    lines += [{**lines[0], "library": "baseline", "result": a_result(case, headworks=2e-3)}]
    write_lines(folder / "bench.jsonl", head, *lines)
    with (folder / "bench.jsonl").open("a") as file:
        file.write('{"event": "resu')  # killed as it wrote
    test = "tests/test_ops.py::test_matches_reference[linear_attention-sm80-bfloat16-"
    done = [{"test": f"{test}a]", "event": "end", "outcome": "passed", "message": ""},
            {"test": f"{test}b]", "event": "end", "outcome": "failed", "message": "1 | 2 off"},
            {"test": f"{test}c]", "event": "start"}]  # fmt: skip
    sample = {"spec": "key_scan", "backend": "simt", "dtype": "float64", "outcome": "died (11)",
              "message": "illegal access"}  # fmt: skip
    write_archive(folder / "junit.tgz", tmp_path / "junit", **{
        "correctness-linear_attention.jsonl": "".join(json.dumps(d) + "\n" for d in done),
        "samples.jsonl": json.dumps({"count": 3}) + "\n" + json.dumps(sample) + "\n"})  # fmt: skip
    write_archive(folder / "sanitizer.tgz", tmp_path / "sanitizer", **{
        "memcheck-key_scan.jsonl": json.dumps({"outcome": "ok"}) + "\n",
        "memcheck-key_scan.txt": "========= ERROR SUMMARY: 3 errors\n"})  # fmt: skip
    (folder / "summary.txt").write_text("==== cuda, at most 560 s\nstep\n==== build: 2 of 2\n")
    return folder


@pytest.fixture
def copy(tmp_path):
    root = tmp_path / "copy"
    (root / "bench" / "results").mkdir(parents=True)
    (root / "bench" / "GPU.md").write_text((ROOT / "bench" / "GPU.md").read_text())
    return root


def fill(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fill_gpu", *map(str, arguments)])
    return fill_gpu.main()


def test_a_day_becomes_the_page(results, copy, monkeypatch):
    assert fill(monkeypatch, results, "--root", copy) == 0
    page = (copy / "bench" / "GPU.md").read_text()
    data = json.loads((copy / "bench" / "results" / "nvidia_made_up_1.json").read_text())
    assert data["machine"]["gpu"] == "NVIDIA Made-Up 1" and not data["dry_run"]
    assert "NVIDIA Made-Up 1" in page and "No kernel has run" not in page
    forward = "| linear_attention | sm80 forward | yes | yes | 1 of 3 tests | pending |"
    assert f"{forward} forward S 8192 bf16: 1 ms, 50 % of copy |" in page
    line = "| linear_attention | forward S 8192 bf16: {} | at least {} | {} | {} |"
    assert line.format("best of fla", "2 x", "3 x", "pass") in page
    assert line.format("copy", "40 %", "50 %", "pass") in page
    assert "| attention | train causal D 128 S 8192 bf16 | failed |" in page
    assert "| linear_attention | forward S 8192 bf16 | 0.50 |" in page  # against the baseline
    assert "memcheck: 1 cases of 1 operators, 3 errors" in page
    assert "`key_scan simt float64`: illegal access" in page
    assert "`2 samples`: not run, or did not end" in page
    assert "bfloat16-b]`: 1 | 2 off" in page and "bfloat16-c]`: did not end" in page
    assert fill(monkeypatch, results, "--root", copy) == 0
    assert (copy / "bench" / "GPU.md").read_text() == page


def test_a_file_of_a_day_gives_its_page(results, copy, monkeypatch, capsys):
    assert fill(monkeypatch, results, "--root", copy) == 0
    page, file = copy / "bench" / "GPU.md", copy / "bench" / "results" / "nvidia_made_up_1.json"
    text, data = page.read_text(), file.read_text()
    assert fill(monkeypatch, "--pending", "--root", copy) == 0
    assert page.read_text() != text
    assert fill(monkeypatch, file, "--root", copy) == 0
    assert (page.read_text(), file.read_text()) == (text, data)
    file.write_text("{}")
    assert fill(monkeypatch, file, "--root", copy) == 1
    assert "not of a GPU day" in capsys.readouterr().err


def test_kernels_that_have_changed_are_pending_again(results, copy, monkeypatch):
    first = fill_gpu.KERNELS[3]
    monkeypatch.setattr(fill_gpu, "KERNELS", (replace(first, changed=True),))
    assert fill(monkeypatch, results, "--root", copy) == 0
    page = (copy / "bench" / "GPU.md").read_text()
    assert "| pending (in an earlier form: 1 of 3 tests) | pending |" in page
    assert "| pending (in an earlier form: forward S 8192 bf16: 1 ms, 50 % of copy) |" in page


def test_a_dry_run_does_not_become_our_page(results, copy, monkeypatch, capsys):
    text = (results / "bench.jsonl").read_text().replace('"dry_run": false', '"dry_run": true')
    (results / "bench.jsonl").write_text(text)
    before = (ROOT / "bench" / "GPU.md").read_text()
    assert fill(monkeypatch, results) == 1
    assert "dry run" in capsys.readouterr().err
    assert (ROOT / "bench" / "GPU.md").read_text() == before
    assert fill(monkeypatch, results, "--root", copy) == 0
    assert "nothing below was measured" in (copy / "bench" / "GPU.md").read_text()


def test_a_foreign_folder_is_refused(tmp_path, copy, monkeypatch, capsys):
    assert fill(monkeypatch, tmp_path, "--root", copy) == 1
    assert "bench.jsonl" in capsys.readouterr().err
    (tmp_path / "bench.jsonl").write_text("{}\n".replace("{}", '{"event": "start"}'))
    assert fill(monkeypatch, tmp_path, "--root", copy) == 1


def test_the_committed_page_is_what_the_committed_results_say():
    page = (ROOT / "bench" / "GPU.md").read_text()
    days = [
        data
        for path in sorted((ROOT / "bench" / "results").glob("*.json"))
        if "day" in (data := json.loads(path.read_text()))
    ]
    pages = [fill_gpu.fill(page, data) for data in days or [None]]
    assert page in pages
    assert days or page.count("pending") > 50
