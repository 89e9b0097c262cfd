// SPDX-License-Identifier: Apache-2.0
// Regions of an image: a grid of rectangles of tokens, its cells, counted row by row from the upper
// left, as tokens of the image are, and the tokens of a cell.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/math.h"

namespace hw {

// How an image is cut into cells. The cells of the last row and column may reach beyond it.
struct RegionGrid {
  int64_t columns = 1;            // cells in a row of cells
  int64_t height = 1, width = 1;  // of a cell
  int64_t rows_of_image = 1, columns_of_image = 1;

  HW_HOST_DEVICE HW_INLINE int64_t size() const { return height * width; }
  HW_HOST_DEVICE HW_INLINE int64_t count() const {
    return columns * ceil_div(rows_of_image, height);
  }
  // Whether the image has `tokens` tokens, and no product of these numbers overflows.
  bool within(int64_t tokens) const {
    constexpr int64_t kMost = int64_t{1} << 31;
    if (rows_of_image < 0 || columns_of_image < 0 || columns < 1 || height < 1 || width < 1)
      return false;
    if (rows_of_image > kMost || size_overflows(kMost)) return false;
    if (columns > kMost && !(rows_of_image <= 1 && same())) return false;
    if (rows_of_image == 0 || columns_of_image == 0) return tokens == 0;
    return tokens % columns_of_image == 0 && tokens / columns_of_image == rows_of_image;
  }
  bool size_overflows(int64_t most) const {
    return height > most || width > most || height * width > most;
  }

  // A block is a token; block i is token i.
  HW_HOST_DEVICE HW_INLINE bool single() const { return height * width == 1; }
  HW_HOST_DEVICE HW_INLINE bool same() const { return single() && columns == columns_of_image; }

  // Token of place t of a cell; -1 where there is none.
  HW_HOST_DEVICE HW_INLINE int64_t token(int64_t block, int64_t t) const {
    if (block < 0 || block >= columns * max_of<int64_t>(rows_of_image, 1)) return -1;
    if (same()) return block < rows_of_image * columns_of_image ? block : -1;
    const int64_t y = block / columns * height + t / width;
    const int64_t x = block % columns * width + t % width;
    return y < rows_of_image && x < columns_of_image ? y * columns_of_image + x : -1;
  }

  // f(token) for all places of a cell, in order: the same without a division per token.
  template <class F>
  void each_token(int64_t block, F&& f) const {
    if (same()) return f(token(block, 0));
    const bool none = block < 0 || block >= columns * rows_of_image;
    const int64_t top = none ? rows_of_image : block / columns * height;
    const int64_t left = none ? 0 : block % columns * width;
    for (int64_t y = top; y < top + height; ++y)
      for (int64_t x = left; x < left + width; ++x)
        f(y < rows_of_image && x < columns_of_image ? y * columns_of_image + x : -1);
  }
};

}  // namespace hw
