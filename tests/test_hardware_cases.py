# SPDX-License-Identifier: Apache-2.0
"""The cases that are meant for a GPU, in the emulator: the full lists of every specification, on
its small device, and on one of 132 multiprocessors, for which calls are cut otherwise.

    pytest -m hardware                         all of them: half an hour of a core
    HEADWORKS_SHARE=i/n pytest -m hardware     the large device in DAILY's dtypes, which reach every
                                               kernel, and of the rest every n-th
"""

from __future__ import annotations

import os

import pytest
import torch

from backends import identify, targets
from headworks import _library
from headworks.testing import check_case
from specs import SPECS

pytestmark = [pytest.mark.operator, pytest.mark.hardware]

DEVICES = {
    "132": {"capability": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024},
    "4": {},
}
DAILY = (("132", "emulate:simt", torch.float32), ("132", "emulate:sm80", torch.bfloat16))


def share():
    """(which, of how many) from HEADWORKS_SHARE: all by default."""
    which, _, count = os.environ.get("HEADWORKS_SHARE", "0/1").partition("/")
    if not 0 <= int(which) < int(count):
        raise ValueError(f"HEADWORKS_SHARE is {which}/{count}, expected i/n with 0 <= i < n")
    return int(which), int(count)


def cases():
    """(device, spec, case, backend, dtype), those that the share leaves out not among them."""
    which, count = share()
    number = 0
    for device in DEVICES:
        for spec in SPECS:
            for backend, _, dtype in targets(spec, emulated=True):
                listed = {case.name: case for case in (*spec.cases, *spec.sample_cases)}
                for case in listed.values():
                    if spec.limit(backend, case):
                        continue
                    number += (device, backend, dtype) not in DAILY
                    if (device, backend, dtype) in DAILY or number % count == which:
                        name = identify(spec, backend, dtype, case, device)
                        yield pytest.param(device, spec, case, backend, dtype, id=name)


@pytest.mark.parametrize("device, spec, case, backend, dtype", list(cases()))
def test_matches_reference(device, spec, case, backend, dtype):
    """Every output and gradient against the reference in fp64."""
    try:
        _library.configure_emulator(**DEVICES[device])
        check_case(spec, case, backend, dtype)
    finally:
        _library.configure_emulator()


def test_the_shares_make_the_whole(monkeypatch):
    monkeypatch.setenv("HEADWORKS_SHARE", "0/1")
    every = [p.id for p in cases()]
    assert every, "the emulator is not built: nothing would be compared"
    parts = []
    for which in range(3):
        monkeypatch.setenv("HEADWORKS_SHARE", f"{which}/3")
        parts.append([p.id for p in cases()])
    daily = set(parts[0]) & set(parts[1])
    assert set().union(*parts) == set(every) and len(every) == len(set(every))
    assert sum(map(len, parts)) == len(every) + 2 * len(daily)
    check_case(SPECS[0], SPECS[0].emulator_cases[0], "cpu", torch.float32)
