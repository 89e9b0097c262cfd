# SPDX-License-Identifier: Apache-2.0
"""Results as text, JSON and pictures, and the comparison of two result files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.suite import Result, Target

FORMAT = 1
SLOWER = 1.15  # a speedup that falls by more than this factor is a regression


def as_json(
    machine: Mapping[str, Any],
    suites: Mapping[str, tuple[Sequence[Result], Sequence[Target]]],
) -> dict[str, Any]:
    """Everything of a run as plain data."""
    return {
        "format": FORMAT,
        "machine": dict(machine),
        "suites": {
            name: {
                "results": [asdict(result) for result in results],
                "targets": [target.as_dict() for target in targets],
            }
            for name, (results, targets) in suites.items()
        },
    }


def read_json(path: Path) -> dict[str, Any]:
    """A result file; ValueError if it is none."""
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"bench: {path} is no result file: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"bench: {path} is no result file of format {FORMAT}")
    return data


def result_table(results: Iterable[Result]) -> str:
    """One line per contender: time, quartiles, how many times slower than ours, memory."""
    rows = [("case", "contender", "time", "quartiles", "against ours", "peak memory", "bound")]
    for result in results:
        base = result.seconds.get("headworks")
        for name, times in sorted(result.seconds.items(), key=lambda item: item[1].median):
            peak = result.peak_bytes.get(name)
            rows.append(
                (
                    result.case,
                    name,
                    seconds_text(times.median),
                    f"{seconds_text(times.low)} - {seconds_text(times.high)}",
                    f"{times.median / base.median:.2f}x" if base else "",
                    "" if peak is None else f"{peak / 2**20:.1f} MiB",
                    result.bound if name == "headworks" else "",
                )
            )
        for name, why in result.failed.items():
            rows.append((result.case, name, "failed", why[:60], "", "", ""))
    return columns(rows)


def roof_text(machine: Mapping[str, Any]) -> str:
    """What the roofs of a machine were measured to be; empty in older files."""
    roofs = machine.get("roofs", {})
    units = {"peak": "GFLOP/s", "gemm": "GFLOP/s", "exp": "G exponentials/s", "copy": "GB/s"}
    lines = []
    for dtype, rates in roofs.items():
        if isinstance(rates, Mapping):
            each = (f"{name} {1e-9 * rate:.3g} {units[name]}" for name, rate in rates.items())
            lines.append(f"{dtype}: {', '.join(each)}")
    return "; ".join(lines) + f" ({roofs['how']})" if lines else str(roofs.get("how", ""))


def target_table(targets: Iterable[Target]) -> str:
    """One line per target: figure, threshold, verdict."""
    rows = [("target", "figure", "must be", "verdict")]
    for target in targets:
        figure = "" if target.figure is None else f"{target.figure:.2f} {target.unit}"
        bound = f"{'<=' if target.at_most else '>='} {target.threshold:g} {target.unit}"
        rows.append((target.name, figure.strip(), bound.strip(), target.verdict))
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns; the first row is the head; a repeated first cell is left blank."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    last = ""
    for number, row in enumerate(rows):
        cells = list(row)
        if number and cells[0] == last:
            cells[0] = ""
        last = row[0]
        lines.append("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())
        if number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def seconds_text(seconds: float) -> str:
    """A time with a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def regressions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Cases in which ours lost ground to the same peer since the baseline.

    Ratios to a peer of the same run are compared, not times, so that a slower machine or a busy
    minute is no regression.
    """
    lines = []
    for suite, old in before["suites"].items():
        new_results = {r["case"]: r for r in now["suites"].get(suite, {}).get("results", [])}
        for result in old["results"]:
            new = new_results.get(result["case"])
            if new is None or "headworks" not in result["seconds"]:
                continue
            for peer in result["seconds"]:
                if peer == "headworks" or peer not in new["seconds"]:
                    continue
                was, is_now = _ratio(result, peer), _ratio(new, peer)
                if is_now * SLOWER < was:
                    lines.append(
                        f"{suite} {result['case']}: {is_now:.2f}x of {peer}, was {was:.2f}x"
                    )
    return lines


def _ratio(result: Mapping[str, Any], peer: str) -> float:
    seconds = result["seconds"]
    return seconds[peer]["median"] / seconds["headworks"]["median"]


def plot(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Time against length for every suite and mode of a result file: one PNG each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for suite, content in data["suites"].items():
        for mode in ("forward", "train"):
            lines = _lines(content["results"], mode)
            if not any(len(points) > 1 for points in lines.values()):
                continue
            figure, axes = pyplot.subplots(figsize=(7.5, 4.5), constrained_layout=True)
            for name, points in lines.items():
                ours = name == "headworks"
                axes.loglog(
                    [s for s, _ in points],
                    [1e3 * t for _, t in points],
                    marker="o",
                    label=name,
                    linewidth=2.6 if ours else 1.2,
                    color="black" if ours else None,
                    zorder=3 if ours else 2,
                )
            title = {"forward": "forward", "train": "forward + backward"}[mode]
            axes.set_title(f"{suite}: {title}, {data['machine'].get('gpu') or _cpu(data)}")
            axes.set_xlabel("tokens")
            axes.set_ylabel("milliseconds")
            sizes = sorted({s for points in lines.values() for s, _ in points})
            axes.set_xticks(sizes, [str(s) for s in sizes])
            axes.minorticks_off()
            axes.grid(True, which="major", alpha=0.3)
            axes.legend(fontsize=8)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{suite}_{mode}.png"
            figure.savefig(path, dpi=130)
            pyplot.close(figure)
            written.append(path)
    return written


def _cpu(data: Mapping[str, Any]) -> str:
    return f"{data['machine']['threads']} threads, {data['machine']['processor']}"


def _lines(results: Iterable[Mapping[str, Any]], mode: str) -> dict[str, list[tuple[int, float]]]:
    """Contender -> [(tokens, seconds)] over the main dtype of a mode."""
    rows = [r for r in results if r["shape"].get("mode") == mode and "S" in r["shape"]]
    if not rows:
        return {}
    main = rows[0]["shape"]["dtype"]
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["shape"]["dtype"] == main:
            for name, times in row["seconds"].items():
                lines.setdefault(name, []).append((row["shape"]["S"], times["median"]))
    return {name: sorted(points) for name, points in lines.items()}
