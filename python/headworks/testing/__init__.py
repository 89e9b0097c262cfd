# SPDX-License-Identifier: Apache-2.0
"""What the tests, the GPU gate and the benchmarks share.

Spec, Case     one operator's cases, inputs and how to call it (tests/specs/<op>.py)
check_case     outputs and gradients of one backend against the fp64 reference
compare        one tensor against its oracle, with the tolerance rules; counts comparisons
restride       the same values in another memory layout
poison_empty   torch.empty filled with NaN, so that unwritten output is seen
restride_empty what torch.empty gives in another memory layout, so outputs that operators allocate
"""

from .compare import assert_same_bits, compare, comparisons
from .inputs import LAYOUTS, poison_empty, restride, restride_empty
from .spec import EVERY_DTYPE, HALF, Case, Spec, check_case, evaluate

__all__ = [
    "EVERY_DTYPE",
    "HALF",
    "LAYOUTS",
    "Case",
    "Spec",
    "assert_same_bits",
    "check_case",
    "compare",
    "comparisons",
    "evaluate",
    "poison_empty",
    "restride",
    "restride_empty",
]
