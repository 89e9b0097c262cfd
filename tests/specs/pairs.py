# SPDX-License-Identifier: Apache-2.0
"""Cases in which every two choices meet: all pairs of values of two options, in few cases."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def pairwise(**options: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Choices {option: value} such that every pair of values of two options is in one of them: the
    best of some draws, one after another, until no pair is left. A value that is a dict stands for
    the options in it."""
    generator = random.Random(0)
    left = set(_pairs_of(options))

    def gain(choice: Mapping[str, int]) -> int:
        return sum(p in left for p in _pairs({n: (i,) for n, i in choice.items()}))

    while left:
        draws = []
        for first in generator.sample(sorted(left), min(20, len(left))):
            choice = {n: generator.randrange(len(values)) for n, values in options.items()}
            draws.append(choice | dict(first))
        best = max(draws, key=gain)
        left.difference_update(_pairs({n: (i,) for n, i in best.items()}))
        chosen = {n: options[n][i] for n, i in best.items()}
        flat: dict[str, Any] = {}
        for n, x in chosen.items():
            flat |= x if isinstance(x, dict) else {n: x}
        yield flat


def _pairs_of(options: Mapping[str, Sequence[Any]]) -> Iterator[tuple[tuple[str, int], ...]]:
    return _pairs({n: range(len(values)) for n, values in options.items()})


def _pairs(indices: Mapping[str, Sequence[int]]) -> Iterator[tuple[tuple[str, int], ...]]:
    for a, b in itertools.combinations(indices, 2):
        for i, j in itertools.product(indices[a], indices[b]):
            yield (a, i), (b, j)
