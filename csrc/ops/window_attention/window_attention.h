// SPDX-License-Identifier: Apache-2.0
// Attention inside the windows of an image: the loops of csrc/softmax over windows.
//
// An image of Y x X tokens is cut into windows of wy x wx (RegionGrid, core/regions.h); those of
// the last row and column end with the image. Token i attends to the tokens j of its window:
//
//   s_ij = scale <q_i, k_j> + t[h, bin(i, j)]     bin(i, j) = |dy| tx + |dx|      t: bias table
//   p_ij = exp(s_ij - L_i)      o_i = sum_j p_ij v_j
//
// with (dy, dx) the way from i to j, so that a window needs no positions but those inside it.
// Scores, weights and row statistics are those of softmax/params.h; the table becomes the bias of
// the engine, [N, N] for the N = wy wx slots of a window, which all windows share. Backward
//
//   d_t[h, b] = sum over batch entries, windows and pairs with bin(i, j) = b of ds_ij
//
// in two steps, without atomics: parts of the windows add up their ds_ij [N, N] in order, then a
// bin adds up its pairs, part after part.
//
// Symbols beside those of softmax/params.h: S = Y X tokens, W windows of an image, N slots of one,
// M bins of a table. A window that exceeds the image is one of the image's size, whose table has
// the distances of the larger one: M = ty tx >= N.
#pragma once

#include "softmax/params.h"

#include "core/math.h"
#include "core/regions.h"

namespace hw::window_attention {

struct Windows {
  RegionGrid grid;                // of windows, no larger than the image
  int64_t bins, table_width;      // M, tx
  Ref<const void, 2> bias_table;  // [Hq, M]  element type, or absent
};

// The element of the table for slots i and j of a window `width` wide.
template <class Int>
HW_HOST_DEVICE HW_INLINE Int bin(Int i, Int j, Int width, Int table_width) {
  const Int dy = i / width - j / width, dx = i % width - j % width;
  return (dy < 0 ? -dy : dy) * table_width + (dx < 0 ? -dx : dx);
}

// "window_attention.forward": o, and row with its rest where wanted.
struct ForwardParams : softmax::ForwardParams, Windows {};

// "window_attention.backward"
struct BackwardParams : softmax::BackwardParams, Windows {
  Ref<void, 2> d_bias_table;  // [Hq, M]  out, acc; absent: not wanted
};

}  // namespace hw::window_attention
