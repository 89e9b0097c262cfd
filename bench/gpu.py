# SPDX-License-Identifier: Apache-2.0
"""The cases of the GPU day (ci/gpu_day), in the order of importance: time may run out.

A dry run has the same ones, of the CPU's sizes or smaller, without compiled peers.
"""

from __future__ import annotations

import torch

from bench import (
    attention,
    bilevel_routing,
    cascaded_group_attention,
    contmix,
    key_scan,
    kmeans_routing,
    linear_attention,
    moh_attention,
    peers,
    select_topk,
    window_attention,
)
from bench.suite import Case, Effort

Named = tuple[str, Case]  # a suite and one of its cases

EFFORT = Effort(0.4, (5, 30))
DRY_EFFORT = Effort(0.0, (1, 1), memory=False)

# The peers that only compile as they are called: compiled ahead where there is time.
COMPILED = ("compiled", "flex")


def cases(device: str, tiny: bool) -> list[Named]:
    """All of them: (suite, case)."""
    dense = [("attention", case) for case in attention.gpu_cases(device, tiny)]
    first = [pair for pair in dense if not pair[1].name.startswith("decode")]
    decode = [pair for pair in dense if pair[1].name.startswith("decode")]
    return [
        *first,
        *(("linear_attention", case) for case in linear_attention.gpu_cases(device, tiny)),
        *decode,
        *(("bilevel_routing", case) for case in bilevel_routing.gpu_cases(device, tiny)),
        *(("kmeans_routing", case) for case in kmeans_routing.gpu_cases(device, tiny)),
        *(("moh_attention", case) for case in moh_attention.gpu_cases(device, tiny)),
        *(("window_attention", case) for case in window_attention.gpu_cases(device, tiny)),
        *(("attention", case) for case in ([] if tiny else attention.gpu_options(device))),
        *(("select_topk", case) for case in select_topk.cases(device, tiny)),
        *(
            ("cascaded_group_attention", case)
            for case in cascaded_group_attention.gpu_cases(device, tiny)
        ),
        *(("key_scan", case) for case in key_scan.cases(device, True)[: 1 if tiny else None]),
        *(("contmix", case) for case in contmix.gpu_cases(device, tiny)),
    ]


def compile_ahead(pairs: list[Named]) -> None:
    """Calls each compiled peer once, so that its code is on the disk when it is to be timed."""
    for _, case in pairs:
        peers.forget_compiled()
        for name, call in case.contenders().items():
            if name.startswith(COMPILED):
                try:
                    call()
                except Exception as error:
                    print(f"{case.name}: {name}: {type(error).__name__}", flush=True)
                else:
                    print(f"{case.name}: {name}: compiled", flush=True)


def poisoned(device: str) -> bool:
    """Whether no further call of this process can succeed: an illegal access is for good."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False
