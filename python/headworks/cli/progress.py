# SPDX-License-Identifier: Apache-2.0
"""What a training shows while it runs, and how Ctrl-C ends it."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from .training import Loop


@contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Ctrl-C only asks for a stop, which comes between two steps; a second one interrupts."""
    asked = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = signal.signal(signal.SIGINT, on_signal)
    except ValueError:  # not in the main thread: nothing to catch here
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress(loop: Loop, quiet: bool, name: str = "training") -> Iterator[Callable[[Loop], None]]:
    """A progress bar with tqdm, now and then a line without it, nothing if quiet."""
    if quiet:
        yield lambda _: None
    elif importlib.util.find_spec("tqdm") is None:
        print("no progress bar: tqdm is missing (pip install 'headworks[demo]')")
        yield _print_progress
    else:
        from tqdm import tqdm

        with tqdm(total=loop.steps, initial=loop.step, desc=name, unit="step") as bar:

            def update(now: Loop) -> None:
                bar.set_postfix_str(_figures(now), refresh=False)
                bar.update(1)

            yield update


def _print_progress(loop: Loop) -> None:
    if loop.step % max(loop.steps // 20, 1) == 0 or loop.step == loop.steps:
        print(f"step {loop.step}/{loop.steps}, {loop.seconds:.0f} s: {_figures(loop)}")


def _figures(loop: Loop) -> str:
    text = loop.loss_text.format(loop.train_curve[-1][1])
    if loop.val_curve:
        text += f", {loop.validation_text.format(loop.val_curve[-1][1])}"
    return text
