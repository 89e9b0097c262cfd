// SPDX-License-Identifier: Apache-2.0
// Neighbourhoods: the window of keys that each token of an image sees. Those of a sequence have one
// row. Windows at a border are shifted, not cut, so that every query has the same number of keys:
//
//   start(i; L, K) = min(max(i - floor(K/2), 0), L - K)         first of the K keys of query i
//   query i sees key j  <=>  start(i) <= j < start(i) + K
//
// start never decreases: the queries that see a key lie side by side, more than K of them near a
// border. Key t = a Kx + b of query (y, x) is the token (start(y) + a, start(x) + b). Tables of
// relative positions are read at (key - query + K - 1) along each axis, from 0 to 2 K - 2.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/math.h"

namespace hw::neighborhood {

struct Axis {
  int64_t size = 0, kernel = 1;  // L >= K >= 1, K odd

  HW_HOST_DEVICE HW_INLINE int64_t start(int64_t i) const {
    return min_of(max_of<int64_t>(i - kernel / 2, 0), size - kernel);
  }
  // Queries [first_query(j), end_query(j)) see key j.
  HW_HOST_DEVICE HW_INLINE int64_t first_query(int64_t j) const {
    return j < kernel ? 0 : j - kernel + 1 + kernel / 2;
  }
  HW_HOST_DEVICE HW_INLINE int64_t end_query(int64_t j) const {
    return j >= size - kernel ? size : j + 1 + kernel / 2;
  }
  // Entries of a table, and that of the first key of query i.
  HW_HOST_DEVICE HW_INLINE int64_t offsets() const { return 2 * kernel - 1; }
  HW_HOST_DEVICE HW_INLINE int64_t first_offset(int64_t i) const {
    return start(i) - i + kernel - 1;
  }

  bool fits() const { return kernel % 2 == 1 && kernel >= 1 && kernel <= max_of<int64_t>(size, 1); }
};

struct Window {
  Axis y, x;

  HW_HOST_DEVICE HW_INLINE int64_t taps() const { return y.kernel * x.kernel; }
  HW_HOST_DEVICE HW_INLINE int64_t tokens() const { return y.size * x.size; }
  HW_HOST_DEVICE HW_INLINE int64_t offsets() const { return y.offsets() * x.offsets(); }
  bool fits() const { return y.fits() && x.fits(); }
};

}  // namespace hw::neighborhood
