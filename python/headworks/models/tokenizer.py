# SPDX-License-Identifier: Apache-2.0
"""Text as bytes."""

from __future__ import annotations

import torch
from torch import Tensor


class ByteTokenizer:
    """A token is a byte of the UTF-8 text."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> Tensor:
        """text -> [S] int64."""
        return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """[S] -> text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")


TOKENIZERS = {ByteTokenizer.name: ByteTokenizer}
