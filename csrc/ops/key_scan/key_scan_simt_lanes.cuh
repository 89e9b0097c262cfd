// SPDX-License-Identifier: Apache-2.0
// Key scan on CUDA: units, and the columns of a lane.
#pragma once

#include "ops/key_scan/key_scan.h"
#include "ops/key_scan/key_scan_simt_layout.h"
#include "ops/key_scan/key_scan_sum.h"

#include "core/dtype.h"
#include "core/gpu/device.cuh"
#include "core/gpu/vector.h"

namespace hw::key_scan::simt {

// ---- Units --------------------------------------------------------------------------------------

// What the lanes of a unit work on. Lanes beyond the last unit repeat it, and write nothing.
struct Unit {
  int64_t batch, head, segment;
  int slice;
  int64_t begin, end;  // rows
  int lane;            // within the unit
  int first_lane;      // of the unit within the warp
  bool used;

  HW_DEVICE HW_INLINE int64_t batch_head(const Geometry& g) const { return batch * g.heads + head; }
  // Position of this unit's entry in [segments, B, H].
  HW_DEVICE HW_INLINE int64_t entry(const Geometry& g) const {
    return segment * g.batch_heads() + batch_head(g);
  }
};

// Neighbouring units are neighbouring heads: they share the cache lines of s and lse.
HW_DEVICE HW_INLINE Unit find_unit(const Geometry& g) {
  const int64_t index = static_cast<int64_t>(dev::block_index_x()) * g.units_per_block() +
                        dev::thread_index() / g.lanes;
  Unit u;
  u.used = index < g.units();
  int64_t rest = u.used ? index : g.units() - 1;
  u.head = rest % g.heads, rest /= g.heads;
  u.slice = static_cast<int>(rest % g.slices), rest /= g.slices;
  u.segment = rest % g.segments;
  u.batch = rest / g.segments;
  u.begin = u.segment * g.segment_tokens;
  u.end = min_of(u.begin + g.segment_tokens, g.tokens);
  u.lane = dev::thread_index() % g.lanes;
  u.first_lane = dev::lane() - u.lane;
  return u;
}

// Sum over the lanes of a unit, the same bits in each.
template <class Acc>
HW_DEVICE HW_INLINE Acc unit_sum(Acc x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += dev::shuffle_xor(x, mask);
  return x;
}

// ---- The columns of a lane ----------------------------------------------------------------------

// Own column i is first + i * step; `count` of them exist.
struct Columns {
  int64_t first, step;
  int count;
};

template <class Element, bool kVectors>
HW_DEVICE HW_INLINE Columns own_columns(const Geometry& g, const Unit& u) {
  constexpr int kColumns = kOwn<Element>;
  const int64_t slice = static_cast<int64_t>(u.slice) * g.lanes * kColumns;
  const int64_t first = slice + (kVectors ? u.lane * kColumns : u.lane);
  const int64_t step = kVectors ? 1 : g.lanes;
  const int64_t left = g.value_dim - first;
  const int64_t count = left <= 0 ? 0 : ceil_div(left, step);
  return {first, step, static_cast<int>(min_of<int64_t>(count, kColumns))};
}

template <class T, int kColumns>
struct OwnRow {
  T v[kColumns];
};

// The own columns of row `row`, 0 where there is none. Vectors are of 16 bytes.
template <bool kVectors, int kColumns, class T>
HW_DEVICE HW_INLINE OwnRow<T, kColumns> load_own(const T* row, int64_t stride, const Columns& c,
                                                 bool valid) {
  OwnRow<T, kColumns> x = {};
  if (!valid) return x;
  if constexpr (kVectors) {
    constexpr int kTogether = kOwn<T>;
    static_assert(kColumns % kTogether == 0, "whole vectors");
    HW_UNROLL
    for (int i = 0; i < kColumns; i += kTogether) {
      if (c.count <= i) continue;
      const auto part = load_vector<kTogether>(row + c.first + i);
      HW_UNROLL
      for (int j = 0; j < kTogether; ++j) x.v[i + j] = part.v[j];
    }
  } else {
    HW_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      if (i < c.count) x.v[i] = row[(c.first + i * c.step) * stride];
    }
  }
  return x;
}

template <bool kVectors, class T, class Acc, int kColumns>
HW_DEVICE HW_INLINE void store_own(T* row, int64_t stride, const Columns& c,
                                   const Acc (&x)[kColumns], Acc factor) {
  if constexpr (kVectors) {
    constexpr int kTogether = kOwn<T>;
    HW_UNROLL
    for (int i = 0; i < kColumns; i += kTogether) {
      if (c.count <= i) continue;
      Vec<T, kTogether> packed;
      HW_UNROLL
      for (int j = 0; j < kTogether; ++j) packed.v[j] = T(factor * x[i + j]);
      store_vector(row + c.first + i, packed);
    }
  } else {
    HW_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      if (i < c.count) row[(c.first + i * c.step) * stride] = T(factor * x[i]);
    }
  }
}

// visit(i, column) over the own columns.
template <int kColumns, class Visit>
HW_DEVICE HW_INLINE void for_own(const Columns& c, const Visit& visit) {
  HW_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    if (i < c.count) visit(i, c.first + i * c.step);
  }
}

}  // namespace hw::key_scan::simt
