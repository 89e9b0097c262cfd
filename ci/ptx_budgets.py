# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels may take, which check_ptx.py compares with what the compiler made of them.

BUDGETS has registers, shared memory and blocks of every kernel, WORK what the interior loop of
those on tensor cores may cost per product. The first line whose expression is found in a kernel's
name is that kernel's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Budget:
    """The plan of a kernel: registers of a thread, bytes of shared memory, blocks side by side."""

    kernel: str  # regular expression for the demangled name
    registers: int
    threads: int
    blocks: int = 1
    shared: int = 0
    needs: tuple[str, ...] = ()


OPERATORS80 = (
    "attention", "cascaded_group_attention", "linear_attention", "routing_attention",
    "window_attention",
)  # fmt: skip
TENSOR = ("mma", "ldmatrix", "cp.async")
SM80 = "hw::linear_attention::sm80::"
SOFT80, SOFT = "hw::softmax::sm80::", "hw::softmax::simt::"
ROUTING, WINDOW = "hw::routing_attention::", "hw::window_attention::"
CASCADE = "hw::cascaded_group_attention::"
NEAR, MIX = "hw::neighborhood::simt::", "hw::contmix::simt::"
LIST80 = r"(?=.*::ListCut<)" + SOFT80  # the kernels of attention, over lists
TO_64, TO_128 = r"<hw::b?f16, (32|64),", r"<hw::b?f16, (32|64|96|128),"
PLAIN, FULL = " [^,]*PlainScore", " [^,]*FullScore"  # of attention, or within a score of lists
DENSE = ".*Dense"
GRADIENTS = "(QueryGrad|KeyGrad)Kernel<hw::b?f16, (64|128),"
NARROW, MEDIUM, WIDE = (f".*ListCut<{n}>" for n in (16, 64, 128))

BUDGETS = (
    Budget(SM80 + r"ApplyKernel<hw::bf16, 64,", 240, 128, 2, 60 * KIB, TENSOR),
    Budget(SM80 + r"ApplyKernel<hw::bf16, 128,", 240, 256, 1, 96 * KIB, TENSOR),
    Budget(SM80 + r"ApplyKernel<hw::f16, 64,", 255, 128, 2, 63 * KIB, (*TENSOR, "tf32")),
    Budget(SM80 + r"ApplyKernel<hw::f16, 128,", 255, 256, 1, 99 * KIB, (*TENSOR, "tf32")),
    Budget(SM80 + r"TotalsKernel<hw::bf16, 64,", 168, 128, 3, 30 * KIB, TENSOR),
    Budget(SM80 + r"TotalsKernel<hw::f16, 64,", 208, 128, 2, 30 * KIB, (*TENSOR, "tf32")),
    Budget(SM80 + r"TotalsKernel<hw::b?f16, 128,", 208, 256, 1, 46 * KIB, TENSOR),
    Budget(SM80 + r"GradientKernel<hw::b?f16, 64,", 255, 128, 2, 78 * KIB, TENSOR),
    Budget(SM80 + r"GradientKernel<hw::b?f16, 128,", 255, 256, 1, 130 * KIB, TENSOR),
    Budget(SM80 + r"RowsKernel<", 96, 256, 2),
    Budget(r"hw::linear_attention::simt::PrefixKernel<", 96, 256, 2),
    # over lists (routing_attention): a block owns 16, 64 or 128 slots
    Budget(LIST80 + "ForwardKernel" + TO_64 + NARROW, 128, 32, 8, 20 * KIB, TENSOR),
    Budget(LIST80 + "ForwardKernel" + NARROW, 128, 32, 7, 22 * KIB, TENSOR),
    Budget(LIST80 + "ForwardKernel" + TO_64 + PLAIN + MEDIUM, 168, 128, 3, 44 * KIB, TENSOR),
    Budget(LIST80 + "ForwardKernel" + MEDIUM, 168, 128, 3, 52 * KIB, TENSOR),
    Budget(LIST80 + "ForwardKernel" + WIDE, 255, 128, 2, 70 * KIB, TENSOR),
    Budget(LIST80 + "QueryGradKernel" + TO_64 + NARROW, 168, 32, 7, 23 * KIB, TENSOR),
    Budget(LIST80 + "(QueryGrad|KeyGrad)Kernel" + NARROW, 255, 32, 5, 30 * KIB, TENSOR),
    Budget(SOFT80 + "ForwardKernel" + TO_128 + PLAIN, 255, 128, 2, 66 * KIB, TENSOR),
    Budget(SOFT80 + "ForwardKernel" + TO_128 + FULL, 255, 128, 2, 68 * KIB, TENSOR),
    Budget(SOFT80 + "ForwardKernel<", 255, 128, 1, 99 * KIB, TENSOR),
    Budget(SOFT80 + "QueryGradKernel" + TO_64 + PLAIN + DENSE, 255, 128, 2, 68 * KIB, TENSOR),
    Budget(SOFT80 + "QueryGradKernel" + TO_64, 168, 128, 3, 52 * KIB, TENSOR),
    # two strips of 128 columns: a block of 99 KB, of which sm_90 holds two
    Budget(SOFT80 + "QueryGradKernel" + TO_128 + PLAIN + DENSE, 255, 128, 1, 99 * KIB, TENSOR),
    Budget(SOFT80 + "QueryGradKernel" + TO_128, 255, 128, 2, 68 * KIB, TENSOR),
    Budget(SOFT80 + "PairedKeyGradKernel" + TO_128, 240, 128, 2, 75 * KIB, TENSOR),
    Budget(SOFT80 + "KeyGradKernel" + TO_128, 255, 128, 2, 68 * KIB, TENSOR),
    Budget(SOFT80 + "ColumnsKernel" + TO_128, 255, 128, 2, 52 * KIB, TENSOR),
    Budget(SOFT80 + "(QueryGrad|KeyGrad|Columns)Kernel<", 255, 128, 1, 99 * KIB, TENSOR),
    Budget(SOFT80 + "BiasGradKernel<", 255, 128, 1, 99 * KIB, TENSOR),
    Budget(SOFT80 + "MergeKernel<", 96, 128, 4),
    Budget(SOFT + "RowsKernel<.*, 1>", 80, 256, 3),
    Budget(SOFT + "(RowsKernel<|QueryGradKernel<|KeyGradKernel<.*, 1>)", 128, 256, 2),
    Budget(SOFT + "KeyGradKernel<", 255, 256, 1),
    Budget(ROUTING + "SumKernel<", 64, 256, 4),
    Budget(SOFT + "RowDotKernel<", 64, 256, 4),
    Budget(ROUTING + "SpansKernel", 64, 256, 4),
    Budget(WINDOW + "ExpandKernel<", 64, 256, 4),
    Budget(WINDOW + "FoldKernel<", 72, 128, 7),
    Budget(r"hw::CsrKernel<", 64, 512, 2),
    # shared memory with one head's tile of relu; the others' are behind it
    Budget(CASCADE + "sm80::WindowKernel<hw::b?f16, (32|64)>", 192, 128, 2, 55 * KIB, TENSOR),
    Budget(CASCADE + "sm80::WindowKernel<hw::b?f16, 96>", 192, 128, 2, 75 * KIB, TENSOR),
    Budget(CASCADE + "sm80::WindowKernel<hw::b?f16, 128>", 232, 128, 1, 102 * KIB, TENSOR),
    Budget(CASCADE + "simt::WindowKernel<", 128, 256, 2),
    Budget(NEAR, 104, 128, 4),
    Budget(MIX + "(Forward|Store)Kernel<", 136, 128, 3),
    Budget(MIX + "MapKernel<", 120, 256, 2),
    Budget(MIX, 96, 128, 5),
)


@dataclass(frozen=True)
class Work:
    """Of a round of the interior loop (sass.py), per product: instructions and loads from shared
    memory that are allowed, and those that are aimed at."""

    kernel: str
    instructions: float
    loads: float
    inner: int = 0  # loops within, which the counts have once
    aim: tuple[float, float] | None = None


FORWARD_128, FORWARD_64, BACKWARD = (4.5, 0.4), (5.5, 0.4), (5.0, 0.4)

WORK = (
    # the keys (first: the queries) added to the state; of gradients in f16, the state read
    Work(SM80 + r"(Apply|Totals)Kernel<hw::bf16, (64|128), true>", 5.5, 0.56),
    Work(SM80 + r"(Apply|Totals)Kernel<hw::bf16,", 3.6, 0.26),
    Work(SM80 + r"(Apply|Totals)Kernel<hw::f16, (64|128), true>", 6.9, 0.28),
    Work(SM80 + r"(Apply|Totals)Kernel<hw::f16,", 5.2, 0.13),
    Work(SM80 + r"GradientKernel<hw::bf16, (64|128), true>", 5.2, 0.41),
    Work(SM80 + r"GradientKernel<hw::bf16,", 3.2, 0.26),
    Work(SM80 + r"GradientKernel<hw::f16,", 8.8, 0.43),
    # over lists
    Work(
        LIST80 + r"(Forward|QueryGrad|KeyGrad)Kernel<hw::b?f16, (64|128)," + NARROW, 12.1, 1.28, 2
    ),
    Work(LIST80 + r"ForwardKernel<hw::b?f16, (64|128)," + PLAIN, 8.6, 1.12, 2),
    Work(LIST80 + GRADIENTS + PLAIN, 7.2, 1.03, 2),
    Work(LIST80 + r"ForwardKernel<hw::b?f16, (64|128)," + FULL, 18.0, 2.25, 2),
    Work(LIST80 + GRADIENTS + FULL + ".*WindowSource", 13.3, 1.66, 2),
    Work(LIST80 + GRADIENTS + FULL, 12.7, 1.64, 2),
    # plain scores, rows and keys of a sequence
    Work(SOFT80 + r"ForwardKernel<hw::b?f16, 64," + PLAIN + DENSE, 5.1, 0.34, 0, FORWARD_64),
    Work(SOFT80 + r"ForwardKernel<hw::b?f16, 128," + PLAIN + DENSE, 4.1, 0.4, 0, FORWARD_128),
    Work(SOFT80 + r"QueryGradKernel<hw::b?f16, 64," + PLAIN + DENSE, 4.2, 0.38, 0, BACKWARD),
    Work(SOFT80 + r"QueryGradKernel<hw::b?f16, 128," + PLAIN + DENSE, 3.4, 0.46, 0, BACKWARD),
    # of the warps of d_v or of d_k; 0.29 and 0.38 are matrix loads, the rest numbers and weights
    Work(SOFT80 + r"PairedKeyGradKernel<hw::b?f16, 64,", 4.5, 0.54, 0, BACKWARD),
    Work(SOFT80 + r"PairedKeyGradKernel<hw::b?f16, 128,", 3.7, 0.53, 0, BACKWARD),
    Work(SOFT80 + r"(Forward|QueryGrad|KeyGrad)Kernel<hw::b?f16, 256," + PLAIN + DENSE, 5.4, 0.93),
    # other scores, and columns
    Work(SOFT80 + r"(Forward|QueryGrad)Kernel<hw::b?f16, (64|128|256)," + FULL + DENSE, 10.2, 1.12),
    Work(SOFT80 + r"KeyGradKernel<hw::b?f16, (64|128|256)," + FULL + DENSE, 9.9, 1.12, 1),
    Work(SOFT80 + r"ColumnsKernel<hw::b?f16, (64|128|256)," + PLAIN, 10.4, 0.88),
)


def budget_of(name: str, budgets: Iterable[Budget] = BUDGETS) -> Budget | None:
    return next((b for b in budgets if re.search(b.kernel, name)), None)


def work_of(name: str, work: Iterable[Work] = WORK) -> Work | None:
    return next((w for w in work if re.search(w.kernel, name)), None)
