# SPDX-License-Identifier: Apache-2.0
"""Writes a GPU day into bench/results/<gpu>.json and the tables of bench/GPU.md.

    python -m bench.fill_gpu RESULTS           the folder that ci/gpu.sh filled
    python -m bench.fill_gpu FILE              the tables alone, from a file that this wrote
    python -m bench.fill_gpu --pending         the tables as they are before any day
    python -m bench.fill_gpu RESULTS --root COPY

The results of a dry run are no measurements: they are written into a copy of the repository only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_results import read, result_of, slug
from bench.predictions import PREDICTIONS
from bench.report import seconds_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("bench") / "GPU.md"
PENDING = "pending"
SHOWN = 20  # failures that are named

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """A row of the first table: what its tests are, and the case that is its figure."""

    operator: str
    name: str
    backend: str
    specs: tuple[str, ...]
    case: tuple[str, str] | None = None  # suite and case
    changed: bool = False  # since the last day: what was found there is of an earlier form


ATTENTION = ("attention", "attention_lse", "attention_transpose")
ROUTING = ("bilevel_routing_attention", "kmeans_routing_attention", "moh_attention")
WINDOW = ("window_attention",)
DENSE = "causal D 128 S 8192 bf16"
KERNELS = (
    Kernel("linear_attention", "simt forward", "simt", ("linear_attention",)),
    Kernel("linear_attention", "simt backward", "simt", ("linear_attention",)),
    Kernel("linear_attention", "simt step", "simt", ("linear_attention_step",),
           ("linear_attention", "step B 64 H 16")),
    Kernel("linear_attention", "sm80 forward", "sm80", ("linear_attention",),
           ("linear_attention", "forward S 8192 bf16")),
    Kernel("linear_attention", "sm80 backward", "sm80", ("linear_attention",),
           ("linear_attention", "train S 8192 bf16")),
    Kernel("attention", "simt forward, merge", "simt", ATTENTION),
    Kernel("attention", "simt gradients of queries, keys, bias", "simt", ATTENTION),
    Kernel("attention", "simt columns, weights of pairs", "simt",
           ("column_stats", "attention_probs")),
    Kernel("attention", "simt inner products of rows", "simt", (), changed=True),
    Kernel("attention", "sm80 forward, merge", "sm80", ATTENTION,
           ("attention", f"forward {DENSE}"), changed=True),
    Kernel("attention", "sm80 gradients of queries, keys, bias", "sm80", ATTENTION,
           ("attention", f"train {DENSE}"), changed=True),
    Kernel("attention", "sm80 columns", "sm80", ("column_stats",)),
    Kernel("select_topk", "simt selection", "simt", ("select_topk",),
           ("select_topk", "512 of 8192")),
    Kernel("kmeans_route", "simt similarity", "simt", ("kmeans_route",),
           ("kmeans_routing", "route S 8192")),
    Kernel("kmeans_route", "simt prefix rule", "simt", ("kmeans_route",)),
    Kernel("moh_route", "simt", "simt", ("moh_attention",)),
    Kernel("bilevel_route", "simt means, scores", "simt", ("bilevel_route",),
           ("bilevel_routing", "route 28x28 topk 4")),
    Kernel("routing_attention", "indices: lists by token and by region, spans", "simt", ROUTING),
    Kernel("routing_attention", "sums over slots and over spans, mean, D of slots", "simt",
           ROUTING, changed=True),
    Kernel("routing_attention", "simt forward", "simt", ROUTING),
    Kernel("routing_attention", "simt gradients of queries, keys", "simt", ROUTING),
    Kernel("routing_attention", "sm80 forward (lists of up to 16, 64 and more rows)", "sm80",
           ROUTING, ("bilevel_routing", "forward 28x28 topk 4"), changed=True),
    Kernel("routing_attention", "sm80 gradients of queries, keys (up to 16, more)", "sm80",
           ROUTING, ("bilevel_routing", "train 28x28 topk 4")),
    Kernel("window_attention", "bias of a window, gradient of the table", "simt", WINDOW),
    Kernel("window_attention", "simt forward", "simt", WINDOW),
    Kernel("window_attention", "simt gradients of queries, keys, bias", "simt", WINDOW),
    Kernel("window_attention", "sm80 forward", "sm80", WINDOW),
    Kernel("window_attention", "sm80 gradients of queries, keys, bias", "sm80", WINDOW),
    Kernel("cascaded_group_attention", "simt windows", "simt", ("cascaded_group_attention",),
           ("cascaded_group_attention", "M0 stage 1 B 64")),
    Kernel("cascaded_group_attention", "sm80 windows", "sm80", ("cascaded_group_attention",)),
    Kernel("key_scan", "simt forward", "simt", ("key_scan",), ("key_scan", "forward S 4096 fp32")),
    Kernel("key_scan", "simt backward", "simt", ("key_scan",), ("key_scan", "train S 4096 fp32")),
    Kernel("na2d_av", "simt mix", "simt", ("na2d_av",), ("contmix", "na2d_av forward 28x28 K 7"),
           changed=True),
    Kernel("na2d_av", "simt products with the keys, sums over the queries", "simt", ("na2d_av",),
           ("contmix", "na2d_av train 28x28 K 7"), changed=True),
    Kernel("contmix", "simt forward", "simt", ("contmix",),
           ("contmix", "contmix forward 28x28 K 13"), changed=True),
    Kernel("contmix", "simt weights, gradients of scores, sums", "simt", ("contmix",),
           ("contmix", "contmix train 28x28 K 13"), changed=True),
)  # fmt: skip


def tables(data: Data | None) -> dict[str, str]:
    """What stands between the page's markers, by name."""
    return {
        "run": _run(data),
        "kernels": _kernels(data),
        "predictions": _predictions(data),
        "cases": _cases(data),
        "failures": _failures(data),
    }


def fill(text: str, data: Data | None) -> str:
    """The page with every table between its markers."""
    for name, table in tables(data).items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"fill_gpu: the page lacks the markers {begin} and {end}")
        text = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return text


def _run(data: Data | None) -> str:
    if data is None:
        return "**No kernel has run on a GPU so far.**"
    machine, day = data["machine"], data["day"]
    what = "**A dry run, on no GPU: nothing below was measured on one.** " * data["dry_run"]
    place = f"{machine.get('gpu', 'no GPU')}, CUDA {machine.get('cuda')}, torch {machine['torch']}"
    source = f"`bench/results/{slug(machine)}.json`"
    stages = "\n".join(f"- {line}" for line in day["steps"])
    profile = "`kernels.ncu-rep` was written." if day["profiled"] else "No profile was written."
    return f"{what}{place}; from {source}. {profile}\n\n{stages}"


def _kernels(data: Data | None) -> str:
    rows = [("operator", "kernel", "compiled", "emulated", "run on", "tuned", "figure")]
    for kernel in KERNELS:
        found = (_ran(kernel, data), PENDING, _figure(kernel, data))
        cells = found if not kernel.changed or data is None else tuple(map(_of_earlier, found))
        rows.append((kernel.operator, kernel.name, "yes", "yes", *cells))
    return _table(rows)


def _of_earlier(text: str) -> str:
    if text in ("not run", "not measured"):  # a kernel that is newer than the day
        return PENDING
    return text if text in ("", PENDING) else f"{PENDING} (in an earlier form: {text})"


def _ran(kernel: Kernel, data: Data | None) -> str:
    """How many of the tests of the kernel's operators passed on its backend."""
    if data is None or not kernel.specs:
        return PENDING
    passed = total = 0
    for row in data["day"]["tests"]:
        name = row["backend"].removeprefix("emulate:")
        if row["spec"] in kernel.specs and name == kernel.backend:
            passed += row["counts"].get("passed", 0)
            total += sum(n for outcome, n in row["counts"].items() if outcome != "skipped")
    return f"{passed} of {total} tests" if total else "not run"


def _figure(kernel: Kernel, data: Data | None) -> str:
    """Time of its case, and the share of the ceiling that binds."""
    if data is None:
        return PENDING
    suite, case = kernel.case or ("", "")
    row = next((r for r in _results(data, suite) if r["case"] == case), None)
    if row is None or "headworks" not in row["seconds"]:
        return "" if kernel.case is None else "not measured"
    result = result_of(row)
    text = f"{case}: {seconds_text(result.median('headworks'))}"
    return f"{text}, {result.bound}" if result.bound else text


def _results(data: Data, suite: str) -> list[dict[str, Any]]:
    return list(data["suites"].get(suite, {}).get("results", []))


def _predictions(data: Data | None) -> str:
    rows = [("suite", "case", "predicted", "came", "")]
    for suite in dict.fromkeys(p.suite for p in PREDICTIONS):
        results = {r["case"]: result_of(r) for r in _results(data, suite)} if data else {}
        for target in (p.target(results) for p in PREDICTIONS if p.suite == suite):
            bound = f"{'at most' if target.at_most else 'at least'} {target.threshold:.3g}"
            figure = PENDING if data is None else "not measured"
            if target.figure is not None:
                figure = f"{target.figure:.3g} {target.unit}".strip()
            verdict = target.verdict if target.figure is not None else ""
            rows.append((suite, target.name, f"{bound} {target.unit}".strip(), figure, verdict))
    return _table(rows)


def _cases(data: Data | None) -> str:
    """Every case: ours, its share of both ceilings, every other contender."""
    if data is None:
        return PENDING
    rows = [("suite", "case", "headworks", "of bf16 product", "of copy", "others")]
    for suite in data["suites"]:
        for row in _results(data, suite):
            rows.append((suite, row["case"], *_case_cells(row)))
    text = _table(rows)
    before = _against_baseline(data)
    return f"{text}\n\n{before}" if before else text


def _case_cells(row: Data) -> tuple[str, str, str, str]:
    result = result_of(row)
    others = [
        f"{name} {seconds_text(times.median)}"
        for name, times in result.seconds.items()
        if name != "headworks"
    ]
    others += [f"{name} failed" for name in result.failed if name != "headworks"]
    ours = "failed" if "headworks" in result.failed else ""
    if "headworks" in result.seconds:
        ours = seconds_text(result.median("headworks"))
    shares = (result.fraction(roof) for roof in ("gemm", "copy"))
    gemm, copy = ("" if share is None else f"{100 * share:.0f} %" for share in shares)
    return ours, gemm, copy, ", ".join(others)


def _against_baseline(data: Data) -> str:
    """Times of this library over those of the other one, where there was one."""
    rows = [("suite", "case", "now over before")]
    for suite, content in data["baseline"].items():
        old = {r["case"]: result_of(r) for r in content["results"]}
        for row in _results(data, suite):
            now, before = result_of(row), old.get(row["case"])
            if before and "headworks" in now.seconds and "headworks" in before.seconds:
                ratio = now.median("headworks") / before.median("headworks")
                rows.append((suite, row["case"], f"{ratio:.2f}"))
    return _table(rows) if len(rows) > 1 else ""


def _failures(data: Data | None) -> str:
    """Samples, tests and sanitizers: the counts, and what failed by name."""
    if data is None:
        return PENDING
    day = data["day"]
    good = sum(s["outcome"] == "ok" for s in day["samples"])
    counts = [f"- samples: {good} launched and were right"]
    for tool in sorted({row["tool"] for row in day["sanitizers"]}):
        rows = [row for row in day["sanitizers"] if row["tool"] == tool]
        errors = sum(row.get("errors") or 0 for row in rows)
        unknown = sum(row.get("errors") is None for row in rows)
        ran = sum(row["cases"] for row in rows)
        tail = f", {unknown} operators without a summary" if unknown else ""
        counts.append(f"- {tool}: {ran} cases of {len(rows)} operators, {errors} errors{tail}")
    failed = [(s["spec"], s["backend"], s["dtype"], s["message"])
              for s in day["samples"] if s["outcome"] != "ok"]  # fmt: skip
    named = [f"- `{' '.join(words[:3]).strip()}`: {words[3]}" for words in failed]
    for row in day["tests"]:
        named += [f"- `{test}`: {message}" for test, message in row["failed"]]
    more = [f"- and {len(named) - SHOWN} more"] if len(named) > SHOWN else []
    return "\n".join([*counts, *named[:SHOWN], *more])


def _table(rows: Sequence[Sequence[str]]) -> str:
    clean = [[cell.replace("|", "/") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in clean]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def _given(results: Path) -> Data:
    """From a folder of a day, or from a file that was written of one."""
    if not results.is_file():
        return read(results)
    data: Data = json.loads(results.read_text())
    if "day" not in data:
        raise ValueError(f"fill_gpu: {results} is not of a GPU day; give a file that this wrote")
    return data


def main() -> int:
    """Fills; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.fill_gpu", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", metavar="RESULTS")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository, or of a copy")
    parser.add_argument("--pending", action="store_true", help="as if no day had been")
    arguments = parser.parse_args()
    if arguments.pending == (arguments.results is not None):
        parser.error("give either RESULTS or --pending")
    page = arguments.root / PAGE
    try:
        data = _given(arguments.results) if arguments.results else None
        if data and data["dry_run"] and arguments.root.resolve() == ROOT:
            raise ValueError(
                f"fill_gpu: {arguments.results} is of a dry run, which measured no GPU; "
                "let --root name a copy of the repository"
            )
        text = fill(page.read_text(), data)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if data and not arguments.results.is_file():
        file = arguments.root / "bench" / "results" / f"{slug(data['machine'])}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n")
        print(f"wrote {file}")
    page.write_text(text)
    print(f"filled {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
