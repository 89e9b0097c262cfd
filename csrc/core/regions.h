// SPDX-License-Identifier: Apache-2.0
// Regions of an image: rectangles of tokens in a grid, counted row by row from the upper left, as
// tokens of the image are.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/math.h"

namespace hw {

// How an image is cut into regions. Those of the last row and column may reach beyond it.
struct RegionGrid {
  int64_t columns = 1;            // regions side by side
  int64_t height = 1, width = 1;  // of a region
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

  // A region is a token; region i is token i.
  HW_HOST_DEVICE HW_INLINE bool single() const { return height * width == 1; }
  HW_HOST_DEVICE HW_INLINE bool same() const { return single() && columns == columns_of_image; }

  // Token t of a region; -1 where the image has none.
  HW_HOST_DEVICE HW_INLINE int64_t token(int64_t region, int64_t t) const {
    if (region < 0 || region >= columns * rows_of_image) return -1;
    return token_in<int64_t>(region, t, -1);
  }
  // The same of a region that exists, `absent` where the image has none. Int: divisions of 32 bits
  // cost less, and do where no number of the grid has more.
  template <class Int>
  HW_HOST_DEVICE HW_INLINE Int token_in(Int region, Int t, Int absent) const {
    if (same()) return region;
    const Int side = static_cast<Int>(columns), w = static_cast<Int>(width);
    const Int y = region / side * static_cast<Int>(height) + t / w;
    const Int x = region % side * w + t % w, image = static_cast<Int>(columns_of_image);
    return y < static_cast<Int>(rows_of_image) && x < image ? y * image + x : absent;
  }

  // f(token) for all tokens of a region, in order: the same without a division per token.
  template <class F>
  void each_token(int64_t region, F&& f) const {
    if (same()) return f(token(region, 0));
    const bool none = region < 0 || region >= columns * rows_of_image;
    const int64_t top = none ? rows_of_image : region / columns * height;
    const int64_t left = none ? 0 : region % columns * width;
    for (int64_t y = top; y < top + height; ++y)
      for (int64_t x = left; x < left + width; ++x)
        f(y < rows_of_image && x < columns_of_image ? y * columns_of_image + x : -1);
  }
};

}  // namespace hw
