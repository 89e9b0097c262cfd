// SPDX-License-Identifier: Apache-2.0
// The k largest of each row:
//
//   I = the first k of 0 .. N - 1 ordered by (-s_i, i)
//
// Equal scores rank by their index, -0 equals 0, NaN ranks last: keys of core/sort_key.h. The order
// is complete, so every backend selects the same, and how it does is free.
//
// Selection, not sorting: the key t of the k-th largest is found digit by digit from histograms,
// then one pass in the order of the row takes every key above t and the first `ties` that equal it.
#pragma once

#include <cstdint>

#include "core/host/call.h"

namespace hw::select_topk {

// "select_topk.forward"
struct ForwardParams {
  Ref<const void, 2> score;  // [R, N]
  Ref<int64_t, 2> index;     // [R, k]  out
  bool keep_order;           // by increasing index; else by rank, the best first

  HW_HOST_DEVICE int64_t rows() const { return score.size[0]; }
  HW_HOST_DEVICE int64_t count() const { return score.size[1]; }
  HW_HOST_DEVICE int64_t k() const { return index.size[1]; }
};

// What is selected of a row: keys above `key`, and the first `ties` equal to it.
template <class Key>
struct Threshold {
  Key key;
  int64_t ties;
};

}  // namespace hw::select_topk
