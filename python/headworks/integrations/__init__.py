# SPDX-License-Identifier: Apache-2.0
"""Other libraries' models on headworks' operators. Nothing of theirs is imported before it is used.

transformers    hw.attention as an attention implementation of Hugging Face models
"""

from . import transformers

__all__ = ["transformers"]
