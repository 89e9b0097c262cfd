# SPDX-License-Identifier: Apache-2.0
"""Trains the models of the routing operators on real data and shows what they learn.

python -m bench.train_routing lm        hw.models.RoutingLM on Python's documentation text, bytes
python -m bench.train_routing digits    a small BiFormer on scikit-learn's digits

Each writes bench/results/train_routing_<task>.json, with the curves and the baselines beside them,
and a picture in docs/images. Ctrl-C stops without writing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine, train_plots
from bench import train_tasks as tasks
from headworks.cli.demo_checks import DemoError, choose_device
from headworks.cli.demo_decode import stream_text
from headworks.cli.progress import ctrl_c, progress
from headworks.cli.training import Loop, fastest_threads
from headworks.models import ByteTokenizer

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130
_PROMPT, _GENERATED = "The ", 240  # bytes, together within the model's length


def train_lm(args: argparse.Namespace) -> dict[str, Any]:
    """Routing and local heads, then local heads alone, on the same windows of text."""
    name, train, held_out = tasks.text()
    data = _head(args, "lm") | {
        "title": f"Byte-level Routing Transformer on {name}",
        "data": {"text": name, "train_bytes": len(train), "held_out_bytes": len(held_out)},
        "unit": "bits per byte",
        "baselines": tasks.byte_entropies(train, held_out),
        "config": tasks.LM_CONFIG.to_dict(),
        "runs": {},
    }
    steps = args.steps or tasks.LM_RECIPE.steps
    makers = {
        "routing": lambda: tasks.routing_lm(args.backend, args.device),
        "local heads only": lambda: tasks.local_lm(args.device),
    }
    for kind, make in makers.items():
        torch.manual_seed(args.seed)
        model = make()
        loop = tasks.text_loop(model, train, held_out, steps, args.seed)
        data["runs"][kind] = train_loop(loop, args.quiet, kind)
        if kind == "routing":
            data["runs"][kind]["held_out_without_routing_heads"] = tasks.without_routing(loop)
            pieces = stream_text(model, ByteTokenizer(), _PROMPT, _GENERATED, args.seed)
            data["generated_text"] = _PROMPT + "".join(pieces)
    return data


def train_digits(args: argparse.Namespace) -> dict[str, Any]:
    """The classifier on the digits."""
    images = tasks.digits(args.seed)
    torch.manual_seed(args.seed)
    model = tasks.digit_classifier(args.backend, args.device)
    steps = args.steps or tasks.DIGITS_SCHEDULE.steps
    loop = tasks.ImageLoop(model, images, tasks.DIGITS_SCHEDULE, steps, args.seed)
    return _head(args, "digits") | {
        "title": f"BiFormer of {_parameters(loop) / 1e3:.0f} k parameters on scikit-learn's digits",
        "data": {"train_images": len(images.train), "held_out_images": len(images.held_out)},
        "unit": "percent of the held-out digits; training loss in nats",
        "baselines": tasks.digit_baselines(images),
        "config": tasks.DIGITS_SIZES,
        "runs": {"BiFormer": train_loop(loop, args.quiet, "BiFormer")},
    }


def train_loop(loop: Loop, quiet: bool = True, name: str = "training") -> dict[str, Any]:
    """Trains to the end -> curves, time and the final figure. KeyboardInterrupt after Ctrl-C."""
    with fastest_threads(loop), ctrl_c() as stopped, progress(loop, quiet, name) as report:
        if loop.train(None, stopped, report) == "interrupted":
            raise KeyboardInterrupt
        threads, held_out = torch.get_num_threads(), loop.final_figure()
    return {
        "held_out": held_out,
        "parameters": _parameters(loop),
        "steps": loop.step,
        "batch": loop.schedule.batch,
        "seconds": round(loop.seconds, 1),
        "threads": threads,
        "train_curve": [[step, round(value, 5)] for step, value in loop.train_curve],
        "validation_curve": loop.val_curve,
    }


TASKS = {
    "lm": (train_lm, train_plots.plot_text, "routing_lm.png"),
    "digits": (train_digits, train_plots.plot_digits, "biformer_digits.png"),
}


def _parameters(loop: Loop) -> int:
    return sum(p.numel() for p in loop.model.parameters())


def _head(args: argparse.Namespace, task: str) -> dict[str, Any]:
    place = machine.describe(args.device.type)
    return {"task": task, "machine": place, "backend": args.backend, "seed": args.seed}


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--backend", default="auto", help="of the routing operators")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=int, help="training steps (default: by task)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="most CPU threads (default: torch's)")
    for name, folder in (("results", "bench/results"), ("images", "docs/images")):
        parser.add_argument(
            f"--{name}", type=Path, default=ROOT / folder, metavar="FOLDER",
            help=f"default: {folder}",
        )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    args = parser.parse_args(given)
    for name in ("steps", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    try:
        args.device = choose_device(args.device)
    except DemoError as error:
        parser.error(str(error))
    return args


def main(given: Sequence[str] | None = None) -> int:
    """Runs a task; the exit status: 2 where a backend or a package is missing."""
    args = _arguments(given)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    run, plot, picture = TASKS[args.task]
    try:
        data = run(args)
    except NotImplementedError as error:
        print(f"bench.train_routing: {error}\n--backend reference runs anywhere", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"bench.train_routing: {error}; pip install '.[bench]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.train_routing: stopped, nothing was written", file=sys.stderr)
        return INTERRUPTED
    for folder in (args.results, args.images):
        folder.mkdir(parents=True, exist_ok=True)
    path = args.results / f"train_routing_{args.task}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    plot(data, args.images / picture)
    _summarize(data)
    print(f"written: {path}, {args.images / picture}")
    return 0


def _summarize(data: dict[str, Any]) -> None:
    print(f"{data['title']}: {data['unit']}")
    for name, figure in data["baselines"].items():
        print(f"  {figure:8.3f}  {name}")
    for name, run in data["runs"].items():
        took = f"{run['parameters']} parameters, {run['steps']} steps, {run['seconds']:.0f} s"
        print(f"  {run['held_out']:8.3f}  {name} ({took})")
        if "held_out_without_routing_heads" in run:
            figure = run["held_out_without_routing_heads"]
            print(f"  {figure:8.3f}  the same model, its routing heads silenced")


if __name__ == "__main__":
    sys.exit(main())
