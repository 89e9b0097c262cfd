// SPDX-License-Identifier: Apache-2.0
// Which keys a row sees: sequences of a call, and the mask of one.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/math.h"

namespace hw::softmax {

// One sequence: rows [q_begin, q_begin + q_count) and keys [k_begin, k_begin + k_count) of `batch`.
struct Sequence {
  int64_t batch, q_begin, q_count, k_begin, k_count;
};

template <class Params>
HW_HOST_DEVICE HW_INLINE Sequence sequence(const Params& p, int64_t n) {
  if (!p.packed()) return {n, 0, p.q.size[1], 0, p.k.size[1]};
  const int64_t q = p.cu_seqlens_q(n), k = p.cu_seqlens_k(n);
  return {0, q, p.cu_seqlens_q(n + 1) - q, k, p.cu_seqlens_k(n + 1) - k};
}

// A half-open range of keys, or of rows.
struct Range {
  int64_t begin, end;
  HW_HOST_DEVICE bool empty() const { return end <= begin; }
  HW_HOST_DEVICE int64_t count() const { return empty() ? 0 : end - begin; }
};

// Which keys a row sees: an interval, whose ends never decrease from row to row.
struct Mask {
  int64_t rows = 0, keys = 0;     // of the sequence
  int64_t left = -1, right = -1;  // around the diagonal; causal is right = 0

  HW_HOST_DEVICE int64_t diagonal(int64_t row) const { return row + keys - rows; }

  HW_HOST_DEVICE Range visible_keys(int64_t row) const {
    const int64_t at = diagonal(row);
    const int64_t begin = left < 0 ? 0 : max_of<int64_t>(at - left, 0);
    const int64_t end = right < 0 ? keys : min_of<int64_t>(at + right + 1, keys);
    return {begin, end < begin ? begin : end};
  }

  // Rows that see `key`.
  HW_HOST_DEVICE Range seeing_rows(int64_t key) const {
    const int64_t at = key - (keys - rows);  // the row whose diagonal is `key`
    const int64_t begin = right < 0 ? 0 : max_of<int64_t>(at - right, 0);
    const int64_t end = left < 0 ? rows : min_of<int64_t>(at + left + 1, rows);
    return {begin, end < begin ? begin : end};
  }

  // Keys that any row of `rows`, rows that any key of `keys` may meet; all of them do in `whole`.
  HW_HOST_DEVICE Range keys_of(const Range& some_rows) const {
    return {visible_keys(some_rows.begin).begin, visible_keys(some_rows.end - 1).end};
  }
  HW_HOST_DEVICE Range rows_of(const Range& some_keys) const {
    return {seeing_rows(some_keys.begin).begin, seeing_rows(some_keys.end - 1).end};
  }
  HW_HOST_DEVICE bool whole(const Range& some_rows, const Range& some_keys) const {
    return visible_keys(some_rows.end - 1).begin <= some_keys.begin &&
           visible_keys(some_rows.begin).end >= some_keys.end;
  }
};

template <class Params>
HW_HOST_DEVICE Mask mask_of(const Params& p, const Sequence& s) {
  return {s.q_count, s.k_count, p.left, p.causal ? 0 : p.right};
}

}  // namespace hw::softmax
