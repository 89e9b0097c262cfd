// SPDX-License-Identifier: Apache-2.0
// Key scan on CUDA: units, the columns of a lane, and log-sums as pairs.
//
// The log-sum-exp is carried as (m, a): the largest score so far and the sum of e^{s - m}. Scores
// are compared with scores only, so no rounding of L enters a weight, however large L is:
//   (m, a) + (m', a') = (M, a e^{m - M} + a' e^{m' - M}),  M = max(m, m');   L = m + log a
// The empty sum is (-inf, 0). NaN in a score makes a NaN and stays.
#pragma once

#include <cmath>
#include <limits>

#include "ops/key_scan/key_scan.h"
#include "ops/key_scan/key_scan_simt_layout.cuh"

#include "core/device.h"
#include "core/dtype.h"
#include "core/vector.h"

namespace hw::key_scan::simt {

template <class Acc>
HW_DEVICE HW_INLINE Acc nothing() {
  return -std::numeric_limits<Acc>::infinity();
}

// e^{from - to} for from <= to; 0 where `from` is nothing.
template <class Acc>
HW_DEVICE HW_INLINE Acc decay(Acc from, Acc to) {
  return from == nothing<Acc>() ? Acc(0) : std::exp(from - to);
}

template <class Acc>
struct LogSum {
  Acc m, a;

  HW_DEVICE HW_INLINE Acc log() const { return a == Acc(0) ? nothing<Acc>() : m + std::log(a); }
};

template <class Acc>
HW_DEVICE HW_INLINE LogSum<Acc> one_score(Acc s) {
  return {s, s == nothing<Acc>() ? Acc(0) : Acc(1)};
}

template <class Acc>
HW_DEVICE HW_INLINE LogSum<Acc> join(const LogSum<Acc>& x, const LogSum<Acc>& y) {
  const Acc m = x.m > y.m ? x.m : y.m;
  const auto part = [m](const LogSum<Acc>& z) { return z.m == m ? z.a : z.a * decay(z.m, m); };
  return {m, part(x) + part(y)};
}

// The share of x in a sum: e^{log x - log sum}.
template <class Acc>
HW_DEVICE HW_INLINE Acc share(const LogSum<Acc>& x, const LogSum<Acc>& sum) {
  if (x.a == Acc(0)) return Acc(0);
  return (x.m == sum.m ? x.a : x.a * decay(x.m, sum.m)) / sum.a;
}

// ---- Units --------------------------------------------------------------------------------------

// What the lanes of a unit work on. Lanes beyond the last unit repeat it, and write nothing.
struct Unit {
  int64_t batch, head, segment;
  int slice;
  int64_t begin, end;  // rows
  int lane;            // within the unit
  int first_lane;      // of the unit within the warp
  bool used;

  HW_DEVICE HW_INLINE int64_t pair(const Geometry& g) const { return batch * g.heads + head; }
  // Position of this unit's entry in [segments, B, H].
  HW_DEVICE HW_INLINE int64_t entry(const Geometry& g) const {
    return segment * g.pairs() + pair(g);
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

template <class Element>
using OwnRow = Vec<Element, kOwn<Element>>;

// The own columns of row `row`, 0 where there is none.
template <bool kVectors, class Element>
HW_DEVICE HW_INLINE OwnRow<Element> load_own(const Element* row, int64_t stride, const Columns& c,
                                             bool valid) {
  OwnRow<Element> x = {};
  if (!valid) return x;
  if constexpr (kVectors) {
    if (c.count > 0) x = load_vector<kOwn<Element>>(row + c.first);
  } else {
    HW_UNROLL
    for (int i = 0; i < kOwn<Element>; ++i) {
      if (i < c.count) x.v[i] = row[(c.first + i * c.step) * stride];
    }
  }
  return x;
}

template <bool kVectors, class Element, class Acc>
HW_DEVICE HW_INLINE void store_own(Element* row, int64_t stride, const Columns& c,
                                   const Acc (&x)[kOwn<Element>], Acc factor) {
  if constexpr (kVectors) {
    OwnRow<Element> packed;
    HW_UNROLL
    for (int i = 0; i < kOwn<Element>; ++i) packed.v[i] = Element(factor * x[i]);
    if (c.count > 0) store_vector(row + c.first, packed);
  } else {
    HW_UNROLL
    for (int i = 0; i < kOwn<Element>; ++i) {
      if (i < c.count) row[(c.first + i * c.step) * stride] = Element(factor * x[i]);
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
