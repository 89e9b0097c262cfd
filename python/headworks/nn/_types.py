# SPDX-License-Identifier: Apache-2.0
"""Names for the types that every layer's constructor takes."""

from __future__ import annotations

from typing import TypeAlias

import torch

Device: TypeAlias = "torch.device | str | None"
DType: TypeAlias = "torch.dtype | None"
