# SPDX-License-Identifier: Apache-2.0
"""`headworks bench`: runs the suites of a source checkout and judges the speed targets."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("suite", nargs="?", help="operator to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, no compiled peers")
    parser.add_argument("--filter", metavar="REGEX", default="", help="only matching case names")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads of every contender")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything to FILE")
    parser.add_argument("--plots", metavar="FOLDER", type=Path, help="write PNG plots")
    parser.add_argument(
        "--baseline", metavar="FILE", type=Path, help="exit 1 if a ratio fell against this JSON"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the cases and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status: 1 for a lost baseline or a case in which ours raised, 2
    for bad arguments."""
    try:
        _find_bench()
        suite = importlib.import_module("bench.suite")
        report = importlib.import_module("bench.report")
        baseline = report.read_json(args.baseline) if args.baseline else None
        _check_writable("--json", args.json)
        _check_folder("--plots", args.plots)
        device = _device(args)
        chosen = {
            name: _cases(suite.load(name), args, device)
            for name in ([args.suite] if args.suite else suite.SUITES)
        }
        if not any(chosen.values()):
            raise ValueError(f"--filter {args.filter!r} matches no case; --dry-run lists them")
    except ValueError as error:
        print(f"headworks bench: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        for name, cases in chosen.items():
            for case in cases:
                print(f"{name}: {case.name}")
        return 0
    data = _measure(suite, report, chosen, device, args)
    return max(_hand_out(report, data, baseline, args), _report_failures(data))


def _device(args: argparse.Namespace) -> str:
    """The device to measure, with the CPU's threads set."""
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}, expected at least 1")
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no GPU; use --device cpu")
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _find_bench() -> None:
    """Puts the checkout that holds bench/ on the path: above here, or above the package."""
    here = Path.cwd()
    roots = [here, *here.parents, *Path(__file__).resolve().parents]
    for root in roots:
        if (root / "bench" / "suite.py").is_file():
            sys.path.insert(0, str(root))
            return
    raise ValueError("the suites are not in the installed package; run this in a source checkout")


def _check_writable(option: str, path: Path | None) -> None:
    """Opens the file as it will be opened after minutes of measuring, and leaves it as it is."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} is {path}, but {path.absolute().parent} is no folder")
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}") from error
    if is_new:
        path.unlink()


def _check_folder(option: str, path: Path | None) -> None:
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}") from error


def _cases(module: Any, args: argparse.Namespace, device: str) -> list[Any]:
    try:
        pattern = re.compile(args.filter)
    except re.error as error:
        raise ValueError(f"--filter is {args.filter!r}, no regular expression: {error}") from error
    return [case for case in module.cases(device, args.quick) if pattern.search(case.name)]


def _measure(
    suite: Any, report: Any, chosen: dict[str, list[Any]], device: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Times all cases behind a progress bar, prints the tables, returns the data of the run. What
    there is so far is written case by case: a run that is stopped is not lost."""
    total = sum(len(cases) for cases in chosen.values())
    effort = suite.QUICK if args.quick else suite.THOROUGH
    machine = importlib.import_module("bench.machine").describe(device)
    suites: dict[str, tuple[list[Any], list[Any]]] = {}
    with _progress(total) as bar:
        for name, cases in chosen.items():
            results: list[Any] = []
            for case in cases:
                bar.set_description(f"{name}: {case.name}")
                results.append(suite.run_case(case, device=device, effort=effort))
                by_name = {result.case: result for result in results}
                suites[name] = (results, suite.load(name).targets(by_name, device))
                if args.json:
                    _write(args.json, dict(report.as_json(machine, suites)))
                bar.update(1)
    if roofs := report.roof_text(machine):
        print(f"\nroofs: {roofs}")
    for name, (results, targets) in suites.items():
        print(f"\n{name}\n\n{report.result_table(results)}\n\n{report.target_table(targets)}")
    return dict(report.as_json(machine, suites))


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def _report_failures(data: dict[str, Any]) -> int:
    """Names the cases in which ours raised; 1 if there is one."""
    status = 0
    for name, suite in data["suites"].items():
        for result in suite["results"]:
            if why := result["failed"].get("headworks"):
                print(f"headworks bench: {name}: {result['case']}: {why}", file=sys.stderr)
                status = 1
    return status


def _hand_out(
    report: Any, data: dict[str, Any], baseline: dict[str, Any] | None, args: argparse.Namespace
) -> int:
    """Writes JSON and plots, compares with the baseline; the exit status."""
    if args.json:
        _write(args.json, data)
        print(f"\nwrote {args.json}")
    if args.plots:
        for path in report.plot(data, args.plots):
            print(f"wrote {path}")
    if baseline is None:
        return 0
    lost = report.regressions(baseline, data)
    print("\n" + ("\n".join(["slower than the baseline:", *lost]) if lost else "no regression"))
    return 1 if lost else 0


def _progress(total: int) -> Any:
    """A tqdm bar, or a plain line per case where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _Lines(total)
    return tqdm(total=total, unit="case", dynamic_ncols=True)


class _Lines:
    """The part of tqdm that is used here, as lines of text."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_description(self, text: str) -> None:
        """Announces the case that starts."""
        print(f"[{self.done + 1}/{self.total}] {text}", file=sys.stderr)

    def update(self, count: int) -> None:
        """Counts finished cases."""
        self.done += count
