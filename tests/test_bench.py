# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own machinery. No test here asserts how long anything takes."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import headworks as hw
from headworks.cli import main
from headworks.testing import compare

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

attention = importlib.import_module("bench.attention")
linear_attention = importlib.import_module("bench.linear_attention")
machine = importlib.import_module("bench.machine")
peak = importlib.import_module("bench.peak")
fill_docs = importlib.import_module("bench.fill_docs")
peers = importlib.import_module("bench.peers")
report = importlib.import_module("bench.report")
suite = importlib.import_module("bench.suite")
timing = importlib.import_module("bench.timing")

SHAPE = {"B": 2, "H": 3, "D": 16, "Dv": 24}


def times(seconds):
    return timing.Times(seconds, seconds, seconds, 5)


def result(case="forward S 4096 fp32", **seconds):
    return suite.Result(case, {}, {name: times(value) for name, value in seconds.items()})


# A peer that computes something else would make every ratio meaningless.


@pytest.mark.parametrize("tokens", [1, 63, 64, 200, 1100])
@pytest.mark.parametrize("peer", ["eager", "eager, segments"])
def test_linear_attention_peers_compute_the_same(peer, tokens):
    q, k, v = linear_attention.inputs(SHAPE, tokens, torch.float32, "cpu", grad=True)
    function = peers.linear_attention_peers("cpu", compiled=False)[peer]
    cotangent = torch.randn(2, tokens, 3, 24)
    o = function(q, k, v)
    expected = hw.linear_attention(q.double(), k.double(), v.double(), backend="reference")
    compare(o, expected, torch.float32, name=peer)
    grads = torch.autograd.grad(o, (q, k, v), cotangent)
    wanted = torch.autograd.grad(expected, (q, k, v), cotangent.double())
    for name, got, want in zip("qkv", grads, wanted, strict=True):
        compare(got, want.double(), torch.float32, name=f"{peer}: d_{name}")


def test_fla_peers_compute_the_same():
    q, k, v = linear_attention.inputs(SHAPE, 512, torch.float32, "cpu")
    expected = hw.linear_attention(q.double(), k.double(), v.double(), backend="reference")
    functions = {
        n: f for n, f in peers.linear_attention_peers("cpu", compiled=False).items() if "fla" in n
    }
    if not functions:
        pytest.skip("fla-core is not installed (pip install --no-deps fla-core einops)")
    for name, function in functions.items():
        compare(function(q, k, v), expected, torch.float32, name=name)


def test_step_peer_computes_the_same():
    q, k, v = (x[:, 0] for x in linear_attention.inputs(SHAPE, 1, torch.float32, "cpu"))
    ours, theirs = (hw.LinearState.initial(2, 3, 16, 24) for _ in range(2))
    for state in (ours, theirs):
        state.kv.copy_(torch.linspace(0, 1, state.kv.numel()).view_as(state.kv))
        state.z.fill_(2.0)
    wide = [x.double() for x in (q, k, v)]
    state = hw.LinearState(*(x.double() for x in ours))
    expected = hw.linear_attention_step(*wide, state, backend="reference")
    compare(peers.step_eager(q, k, v, *theirs), expected, torch.float32, name="eager step")
    compare(theirs.kv, state.kv, torch.float32, name="eager step: kv")
    compare(theirs.z, state.z, torch.float32, name="eager step: z")


@pytest.mark.parametrize("peer", ["eager", "eager, stable"])
def test_key_scan_peers_compute_the_same(peer):
    s, v = torch.randn(2, 70, 3), torch.randn(2, 70, 3, 8)
    expected = hw.key_scan(s.double(), v.double(), backend="reference")
    o = peers.key_scan_peers(compiled=False)[peer](s, v)
    compare(o, expected, torch.float32, name=peer)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_attention_peers_compute_the_same(causal, kv_heads):
    shape = {"B": 2, "H": 4, "Hkv": kv_heads, "D": 16}
    written = kv_heads == 4
    case = attention.dense_case(
        "cpu", "", shape, "forward", 20, causal, torch.float32, written=written
    )
    calls = case.contenders()
    expected = calls.pop("headworks")().double()
    assert calls.keys() == ({"sdpa", "eager", "compiled", "flex"} if written else {"sdpa"})
    for name in calls.keys() - {"compiled", "flex"}:
        compare(calls[name](), expected, torch.float32, name=name)


def test_growth_exponent():
    sizes = [1, 2, 4, 8]
    assert timing.growth_exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="need 4"):
        timing.growth_exponent(sizes[:3], [1.0, 2.0, 3.0])


def test_contenders_run_in_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = timing.interleave(calls, budget=0.0, rounds=(3, 3))
    assert {name: t.samples for name, t in samples.items()} == dict.fromkeys("abc", 3)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab"  # warm-up, then three rounds


def test_summary_is_median_and_quartiles():
    t = timing.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (t.median, t.samples) == (3.0, 5)
    assert t.low < t.median < t.high


def test_peak_memory_sees_what_a_call_allocates():
    peak = timing.peak_bytes(lambda: torch.ones(16 << 20).sum())
    if peak is None:
        pytest.skip("this system does not tell its peak memory")
    assert 60 << 20 < peak < 200 << 20


def test_targets_are_judged_from_results():
    results = {
        r.case: r
        for r in (
            result(headworks=1.0, eager=5.0, compiled=4.5, sdpa=7.0),
            result("overhead", headworks=30e-6, **{"empty op": 25e-6}),
            result("growth", **{str(1024 << i): float(2**i) for i in range(4)}),
        )
    }
    verdicts = {t.name: t for t in linear_attention.targets(results, "cpu")}
    chunked = verdicts["forward S 4096 fp32: chunked torch"]
    assert (chunked.figure, chunked.verdict) == (4.5, "pass")
    softmax = verdicts["forward S 4096 fp32: causal SDPA"]
    assert (softmax.figure, softmax.verdict) == (7.0, "miss")
    assert verdicts["forward S 1024 fp32: chunked torch"].verdict == "not measured"
    assert verdicts["growth exponent"].figure == pytest.approx(1.0)
    assert verdicts["growth exponent"].verdict == "pass"
    assert verdicts["call overhead"].figure == pytest.approx(5.0)


def test_result_knows_its_roof():
    r = result(headworks=2.0)
    r.least = {"peak": 1.0, "copy": 0.5, "exp": 0.25}
    assert (r.roof, r.fraction("peak"), r.fraction("copy")) == ("peak", 0.5, 0.25)
    assert (r.bound, result(headworks=1.0).bound) == ("50 % of peak", "")
    assert result(headworks=1.0).roof is None


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_roofs_of_the_processor(dtype):
    rulers = machine.yardsticks("cpu", dtype)
    if peak.peak().missing is not None:
        pytest.skip(peak.peak().missing)
    assert set(rulers) == {"peak", "exp", "copy"}
    seconds = timing.interleave({n: y.call for n, y in rulers.items()}, budget=0.0, rounds=(1, 1))
    assert all(rulers[name].work / t.median > 1e6 for name, t in seconds.items())


def test_a_copy_that_is_a_roof_copies_everything():
    if peak.peak().missing is not None:
        pytest.skip(peak.peak().missing)
    source = torch.arange(1001, dtype=torch.int32).view(torch.uint8)[:4001]
    target = torch.zeros_like(source)
    peak.peak().copy(target, source)()
    assert torch.equal(target, source)


def test_without_a_compiler_the_matrix_product_is_the_roof(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(peak, "peak", functools.cache(peak.Peak))
    assert set(machine.yardsticks("cpu", "float32")) == {"gemm", "copy"}
    assert "no-such-compiler" in machine.roofs("cpu")["how"]
    assert "matrix product" in report.roof_text({"roofs": machine.roofs("cpu")})


def test_roofs_are_told_with_their_units_and_old_files_have_none():
    roofs = {"how": "h", "float32": {"peak": 5e11, "exp": 2e10, "copy": 3e10}}
    text = report.roof_text({"roofs": roofs})
    assert text == "float32: peak 500 GFLOP/s, exp 20 G exponentials/s, copy 30 GB/s (h)"
    assert report.roof_text({}) == ""


def test_a_lost_ratio_is_a_regression_and_a_slower_machine_is_not():
    def data(**seconds):
        return report.as_json({}, {"linear_attention": ([result(**seconds)], [])})

    before = data(headworks=1.0, eager=5.0)
    assert report.regressions(before, data(headworks=3.0, eager=15.0)) == []
    assert report.regressions(before, data(headworks=1.1, eager=5.0)) == []
    (line,) = report.regressions(before, data(headworks=1.3, eager=5.0))
    assert "eager" in line and "5.00x" in line


def test_a_quick_run_writes_tables_json_and_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.json"
    command = ["bench", "key_scan", "--quick", "--filter", "^forward", "--device", "cpu"]
    assert main([*command, "--json", str(file), "--plots", str(tmp_path / "plots")]) == 0
    text = capsys.readouterr().out
    assert "forward S 4096 fp32" in text and "headworks" in text and "not measured" in text
    data = report.read_json(file)
    assert data["machine"]["torch"] == torch.__version__
    (first, _) = data["suites"]["key_scan"]["results"]
    assert first["seconds"]["headworks"]["median"] > 0
    assert set(first["least"]) >= {"copy"} and len(first["least"]) >= 2
    assert (tmp_path / "plots" / "key_scan_forward.png").stat().st_size > 1000
    # the same file as the baseline: never a regression against itself
    assert report.regressions(data, data) == []


def test_a_run_that_is_stopped_leaves_what_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, measured = tmp_path / "out.json", []

    def run_case(case, **options):
        measured.append(case.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return result(case.name, headworks=1.0)

    monkeypatch.setattr(suite, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "key_scan", "--quick", "--device", "cpu", "--json", str(file)])
    (row,) = report.read_json(file)["suites"]["key_scan"]["results"]
    assert row["case"] == measured[0]


def test_a_case_in_which_ours_raises_is_named_and_the_status(tmp_path, capsys, monkeypatch):
    def run_case(case, **options):
        return suite.Result(case.name, {}, {"eager": times(1.0)}, failed={"headworks": "Error: no"})

    monkeypatch.setattr(suite, "run_case", run_case)
    assert main(["bench", "key_scan", "--quick", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "key_scan: forward S 1024 fp32: Error: no" in captured.err
    assert "failed" in captured.out and "not measured" in captured.out


def test_dry_run_lists_cases_and_measures_nothing(capsys):
    assert main(["bench", "--dry-run", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "linear_attention: forward S 4096 fp32" in lines
    assert "key_scan: growth" in lines
    for name in suite.SUITES:
        listed = [line for line in lines if line.startswith(f"{name}: ")]
        assert len(listed) == len(suite.load(name).cases("cpu", False))


def test_gpu_cases_can_be_listed_without_a_gpu():
    names = [case.name for case in linear_attention.cases("cuda", False)]
    assert "forward S 8192 bf16" in names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_operator"], "no_such_operator"),
        (["--filter", "("], "regular expression"),
        (["--filter", "nothing like this"], "matches no case"),
        (["--threads", "0"], "--threads is 0"),
        (["--json", "no/such/folder/out.json"], "is no folder"),
        (["--baseline", "no_such_file.json"], "no_such_file.json"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_foreign_json_is_no_baseline(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"format": 99}))
    assert main(["bench", "--baseline", str(file)]) == 2
    assert "format" in capsys.readouterr().err


def test_tables_are_written_between_the_markers():
    data = report.as_json(
        {"processor": "a machine", "threads": 2, "torch": "0"},
        {"op": ([result(headworks=0.002, eager=0.5)], [suite.Target("t", 3.0, 2.0)])},
    )
    tables = fill_docs.tables("op", data, "a.json")
    page = f"above\n{fill_docs.BEGIN}\nold\n{fill_docs.END}\nbelow\n"
    filled = fill_docs.fill(page, tables)
    assert "old" not in filled and filled.startswith("above") and filled.endswith("below\n")
    assert "| forward S 4096 fp32 | 2 ms | 500 ms |" in filled
    assert "| t | 3.00 x | at least 2 x | pass |" in filled
    assert fill_docs.fill(filled, tables) == filled
    with pytest.raises(ValueError, match="markers"):
        fill_docs.fill("no markers", tables)


def test_tables_say_which_roof_bounds_ours():
    bounded = result(headworks=0.002, eager=0.5)
    bounded.least = {"peak": 0.001, "copy": 0.0002}
    results = [bounded, result("forward S 1 fp32", headworks=0.001, eager=0.5)]
    data = report.as_json(
        {"processor": "a machine", "threads": 2, "torch": "0", "roofs": {"how": "guessed"}},
        {"op": (results, [])},
    )
    tables = fill_docs.tables("op", data, "a.json")
    assert "| case | headworks | eager | bound of ours |" in tables and "Roofs: guessed." in tables
    assert "| forward S 4096 fp32 | 2 ms | 500 ms | 50 % of peak |" in tables
    assert "| forward S 1 fp32 | 1 ms | 500 ms |  |" in tables
    assert "50 % of peak" in report.result_table(results)


def test_every_suite_has_a_page_with_markers():
    for name in suite.SUITES:
        text = (ROOT / "docs" / "ops" / f"{name}.md").read_text()
        assert text.index(fill_docs.BEGIN) < text.index(fill_docs.END)
