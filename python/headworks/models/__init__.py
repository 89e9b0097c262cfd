# SPDX-License-Identifier: Apache-2.0
"""Small reference language models: BASED, and a softmax transformer to compare it with."""

from .base import LanguageModel, ModelState
from .based import BasedLM
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .config import BasedConfig, SoftmaxConfig
from .sampling import sample
from .softmax import SoftmaxLM
from .tokenizer import ByteTokenizer

__all__ = [
    "BasedConfig",
    "BasedLM",
    "ByteTokenizer",
    "Checkpoint",
    "LanguageModel",
    "ModelState",
    "SoftmaxConfig",
    "SoftmaxLM",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
]
