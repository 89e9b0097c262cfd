# SPDX-License-Identifier: Apache-2.0
"""One module per operator; `SPECS` is what the generic tests and the GPU gate run."""

from importlib import import_module

from headworks._operator_list import OPERATORS

SPECS = tuple(
    import_module(f"{__name__}.{operator.name}").SPEC for operator in OPERATORS if operator.has_spec
)
