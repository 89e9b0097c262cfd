# SPDX-License-Identifier: Apache-2.0
"""The console script `headworks`: info, demo and bench, each a module loaded when it is needed."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": "what this installation is: versions, backends, and why some are missing",
    "demo": "train a small language model with linear attention and generate from it",
    "bench": "measure every operator against its peers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parse(arguments)
        status = int(options.run(options) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _leave_output()
        return 0
    except OSError as error:  # a full disk, a file that went away
        print(f"headworks {' '.join(arguments[:1])}: {error}", file=sys.stderr)
        _leave_output()
        return 1
    except ImportError as error:
        # The native module or an extra is missing: its message says what to install.
        print(f"headworks {' '.join(arguments[:1])}: {error}", file=sys.stderr)
        return 1


def _leave_output() -> None:
    """What is left in the buffer of an output that failed is not tried again at the exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="headworks", description="Attention kernels for torch, on CUDA and on the CPU."
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    # Only the module of the command that is asked for is imported.
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == wanted:
            module = importlib.import_module(f"headworks.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(arguments)
