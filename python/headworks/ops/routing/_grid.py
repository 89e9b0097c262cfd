# SPDX-License-Identifier: Apache-2.0
"""How an image is cut into regions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Grid(NamedTuple):
    """Regions of equal size, row by row from the upper left; the last ones may reach beyond."""

    rows: int  # of regions
    columns: int
    height: int  # of a region, in tokens
    width: int

    @property
    def regions(self) -> int:
        """R, of the whole image."""
        return self.rows * self.columns


def grid_of(image: Tensor, num_regions: tuple[int, int]) -> Grid:
    """The grid of an image [B, Y, X, ...] that holds at least the regions asked for each way."""
    rows, height = _cut(image.shape[1], num_regions[0])
    columns, width = _cut(image.shape[2], num_regions[1])
    return Grid(rows, columns, height, width)


def _cut(size: int, wanted: int) -> tuple[int, int]:
    """The number of the pieces that cover `size` tokens, and the tokens of each."""
    piece = size // wanted
    return (size + piece - 1) // piece, piece
