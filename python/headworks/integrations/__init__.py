# SPDX-License-Identifier: Apache-2.0
"""Other libraries' models on headworks' operators. Nothing of theirs is imported before it is used.

transformers    hw.attention as an attention implementation of Hugging Face models
timm            attention modules of timm's models replaced in place, for inference
"""

from . import timm, transformers

__all__ = ["timm", "transformers"]
