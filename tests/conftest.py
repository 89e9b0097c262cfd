# SPDX-License-Identifier: Apache-2.0
"""Every test: a fixed seed, torch.empty filled with NaN, two threads (HEADWORKS_TEST_THREADS). A
test marked `operator` that compared nothing (headworks.testing.compare and friends) fails, unless
it is marked `no_comparison`: then it fails if it did compare."""

from __future__ import annotations

import os
import sys

import pytest

# Threads that wait sleep. Spinning, as OpenMP's do by default, they take the cores from those that
# work wherever there are more threads than cores, and a run takes three times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from headworks import testing

THREADS = int(os.environ.get("HEADWORKS_TEST_THREADS", "2"))


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "operator: compares results of an operator; fails when it compared nothing"
    )
    config.addinivalue_line(
        "markers", "no_comparison: an operator's test of something else, such as what it refuses"
    )


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers():
    """What `pytest -n auto` starts: a process for each core, up to 8; each needs a gigabyte."""
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.fixture(autouse=True)
def _deterministic_start():
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with testing.poison_empty():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = testing.comparisons()
    result = yield
    compared = testing.comparisons() > before
    if item.get_closest_marker("no_comparison"):
        if compared:
            pytest.fail("this test compares: it needs no mark no_comparison", pytrace=False)
    elif item.get_closest_marker("operator") and not compared:
        pytest.fail("this operator test compared nothing", pytrace=False)
    return result
