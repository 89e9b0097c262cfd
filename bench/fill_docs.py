# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of a committed result file into docs/ops/<operator>.md, between the markers.

headworks bench --json bench/results/cpu.json --plots docs/images
python -m bench.fill_docs bench/results/cpu.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu_results import result_of
from bench.report import read_json, roof_text, seconds_text

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def fill(text: str, tables: str) -> str:
    """The page with `tables` between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def tables(suite: str, data: Mapping[str, Any], source: str) -> str:
    """Where it was measured, the targets, and the times of every contender by case."""
    machine = data["machine"]
    place = machine.get("gpu") or f"{machine['threads']} threads of {machine['processor']}"
    head = f"{place}, torch {machine['torch']}; from `{source}`."
    if roofs := roof_text(machine):
        head += f" Roofs: {roofs}."
    content = data["suites"][suite]
    return "\n\n".join([head, _targets(content["targets"]), _times(content["results"])]).strip()


def _targets(targets: list[dict[str, Any]]) -> str:
    rows = ["| target | figure | must be | |", "|---|---|---|---|"]
    for t in targets:
        figure = "" if t["figure"] is None else f"{t['figure']:.2f} {t['unit']}".strip()
        bound = (
            f"{'at most' if t['at_most'] else 'at least'} {t['threshold']:g} {t['unit']}".strip()
        )
        rows.append(f"| {t['name']} | {figure} | {bound} | {t['verdict']} |")
    return "\n".join(rows)


def _times(results: list[dict[str, Any]]) -> str:
    columns = (n for r in results if _is_peer(r) for n in (*r["seconds"], *r.get("failed", ())))
    names = list(dict.fromkeys(columns))
    bounds = {r["case"]: result_of(r).bound for r in filter(_is_peer, results)}
    heads = ["case", *names, *(["bound of ours"] if any(bounds.values()) else [])]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in filter(_is_peer, results):
        cells = [_cell(r, name) for name in names]
        if any(bounds.values()):
            cells.append(bounds[r["case"]])
        rows.append(f"| {r['case']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _is_peer(result: Mapping[str, Any]) -> bool:
    """Whether ours stands beside others; in the growth case the contenders are lengths."""
    return "headworks" in result["seconds"]


def _cell(result: Mapping[str, Any], name: str) -> str:
    """Time, and peak memory where it was measured; or that it failed."""
    if name in result.get("failed", ()):
        return "failed"
    if name not in result["seconds"]:
        return ""
    text = seconds_text(result["seconds"][name]["median"])
    peak = result["peak_bytes"].get(name)
    return text if peak is None else f"{text}, {peak / 2**20:.0f} MiB"


def main() -> int:
    """Fills the page of every operator in the file; the exit status."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(sys.argv[1]).resolve()
    data = read_json(path)
    for suite in data["suites"]:
        page = ROOT / "docs" / "ops" / f"{suite}.md"
        source = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        page.write_text(fill(page.read_text(), tables(suite, data, str(source))))
        print(f"filled {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
