# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.select_topk: beside torch.topk, with the sort that puts indices in order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import headworks as hw
from bench.parts import no_grad
from bench.suite import Case, Result, Target
from bench.timing import Call
from headworks.cost import cost

# (rows, N, k): k-means routing of 8 heads x 16 clusters, and the regions of BiFormer's third stage.
SHAPES = ((128, 8192, 512), (128, 32768, 2048), (64 * 49, 49, 16))


def cases(device: str, quick: bool) -> list[Case]:
    """Selection in the order of the row."""
    return [_case(device, *shape) for shape in (SHAPES[:1] if quick else SHAPES)]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """The thresholds of the design, judged on this run."""
    return [
        Target(f"{name}: torch", result.speedup("topk and sort"), 5.0)
        for name, result in results.items()
        if result.shape["N"] >= 8192
    ]


def _topk_and_sort(score: Tensor, k: int) -> Tensor:
    return score.topk(k, dim=-1, sorted=False).indices.sort(-1).values


def _case(device: str, rows: int, n: int, k: int) -> Case:
    def contenders() -> dict[str, Call]:
        generator = torch.Generator(device).manual_seed(0)
        score = torch.randn(rows, n, generator=generator, device=device)
        return {
            "headworks": no_grad(hw.select_topk, score, k),
            "topk and sort": no_grad(_topk_and_sort, score, k),
        }

    shape = {"B": rows, "N": n, "k": k}
    return Case(
        f"{k} of {n}", {**shape, "dtype": "float32"}, contenders, cost("select_topk", **shape)
    )
