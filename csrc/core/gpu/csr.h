// SPDX-License-Identifier: Apache-2.0
// Csr: of lists of values, where each value stands ("compressed sparse rows"). No device code.
//
//   list l, of n items, item i has the value x_i;  bucket v holds the items with x_i = v, in order:
//
//   item[l, begin[l, v] .. begin[l, v + 1])        i_0 < i_1 < ... with x_i = v
//
// Values outside [0, buckets) are in no bucket. Lists are those of [batches, heads]; either is 1
// where all share one.
#pragma once

#include <cstdint>

#include "core/host/workspace.h"
#include "core/macros.h"

namespace hw {

inline constexpr int kCsrWarps = 16;  // of the block that makes a list's part

struct Csr {
  int32_t* begin = nullptr;   // [batches, heads, buckets + 1]
  int32_t* item = nullptr;    // [batches, heads, items]
  int32_t* counts = nullptr;  // [batches, heads, buckets, kCsrWarps]  of use while it is made
  int64_t batches = 0, heads = 0, buckets = 0, items = 0;

  HW_HOST_DEVICE int64_t lists() const { return batches * heads; }
  // The list of (batch entry, head).
  HW_HOST_DEVICE int64_t list(int64_t b, int64_t head) const {
    return (batches == 1 ? 0 : b) * heads + (heads == 1 ? 0 : head);
  }
  HW_HOST_DEVICE int32_t* begin_of(int64_t list) const { return begin + list * (buckets + 1); }
  HW_HOST_DEVICE int32_t* items_of(int64_t list) const { return item + list * items; }
};

// Memory for a Csr; `make_csr` (core/gpu/csr.cuh) fills it.
inline Csr csr_in(Arena& arena, int64_t batches, int64_t heads, int64_t buckets, int64_t items) {
  check(buckets < INT32_MAX && items < INT32_MAX, ErrorKind::value, "lists of ", items,
        " items of ", buckets, " values: at most 2^31 - 2 can be sorted");
  Csr c{nullptr, nullptr, nullptr, batches, heads, buckets, items};
  c.begin = arena.take<int32_t>(c.lists() * (buckets + 1));
  c.item = arena.take<int32_t>(c.lists() * items);
  c.counts = arena.take<int32_t>(c.lists() * buckets * kCsrWarps);
  return c;
}

}  // namespace hw
