# SPDX-License-Identifier: Apache-2.0
"""Small reference models: language models (BASED, Routing Transformer, and a softmax transformer to
compare them with) and the BiFormer image classifiers."""

from .base import LanguageModel, ModelState
from .based import BasedLM
from .biformer import BiFormer, biformer_base, biformer_small, biformer_tiny
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .config import BasedConfig, SoftmaxConfig
from .routing import RoutingConfig, RoutingLM
from .sampling import sample
from .softmax import SoftmaxLM
from .tokenizer import ByteTokenizer

__all__ = [
    "BasedConfig",
    "BasedLM",
    "BiFormer",
    "ByteTokenizer",
    "Checkpoint",
    "LanguageModel",
    "ModelState",
    "RoutingConfig",
    "RoutingLM",
    "SoftmaxConfig",
    "SoftmaxLM",
    "biformer_base",
    "biformer_small",
    "biformer_tiny",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
]
