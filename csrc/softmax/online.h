// SPDX-License-Identifier: Apache-2.0
// Online softmax: what is kept of a row while its keys come by, and what becomes of it at the end.
//
//   M = max s_j     l = sum e^{s_j - M}     t = sum e^{s_j - M} (s_j - M)     over the keys so far
//   q = sum e^{2 (s_j - M)}     m = sum e^{s_j - M} m_j
//
// With a new maximum M' and f = e^{M - M'}, w, l and m become f times what they were, q f^2 times,
// and t becomes f (t + (M - M') l). At the end, with a logit z besides the scores (-inf: none),
// whose weight no value gets:
//
//   l' = l + e^{z - M}     L = M + log l'     w = (sum e^{s_j - M} v_j) / l'
//   entropy = (l log l' - t) / l'     p_max = e^{M - L}     sum p^2 = q / l'^2     mass = m / l'
//
// M is then the larger of the scores' maximum and z. Rows whose scores are all -inf, and that have
// no z, have L = -inf and w = 0.
//
// Scores may be kept in units of their own (Units): a kernel that multiplies them by a scale only
// in the exponent. `V` is a number, or a CPU vector whose lanes are rows.
#pragma once

#include <limits>

#include "core/macros.h"
#include "core/scalar_math.h"
#if defined(HW_ISA)  // a CPU instance
#include "core/cpu/simd_math.h"
#endif

namespace hw::softmax {

// Scores as they are.
template <class V>
struct NaturalUnits {
  HW_HOST_DEVICE HW_INLINE static V exp(V difference) { return exp_of(difference); }
  HW_HOST_DEVICE HW_INLINE static V log(V x) { return std::log(x); }
  HW_HOST_DEVICE HW_INLINE static V natural(V score) { return score; }
  HW_HOST_DEVICE HW_INLINE static V kept(V natural) { return natural; }
  // A score's distance from a natural number.
  HW_HOST_DEVICE HW_INLINE static V distance(V score, V natural) { return score - natural; }
};

// The sums of a row. Activations that are no softmax: sum = sum a(s), the others stay.
template <class V, class A = V>
struct RowSums {
  V max;      // M, -inf before any score
  V sum;      // l
  V tilt;     // t
  V squares;  // q
  V mass;     // m

  HW_HOST_DEVICE HW_INLINE void clear() {
    const V zero{};
    max = zero - std::numeric_limits<A>::infinity();
    sum = tilt = squares = mass = zero;
  }

  // To a maximum that is not smaller; returns the factor of everything that was summed: 1 where the
  // maximum stays, 0 where there was none.
  template <class Units = NaturalUnits<V>>
  HW_HOST_DEVICE HW_INLINE V move_to(V to, const Units& units = {}) {
    const V zero{}, one = zero + A(1);
    const auto none = max == zero - std::numeric_limits<A>::infinity();
    const V gap = none ? zero : max - to;
    const V moved = none ? zero : units.exp(gap);
    const V factor = max == to ? one : moved;
    const V moved_tilt = factor * (tilt + (max == to ? zero : gap) * sum);
    tilt = factor == zero ? zero : moved_tilt;  // however far
    sum *= factor;
    squares *= factor * factor;
    mass *= factor;
    max = to;
    return factor;
  }

  // What was summed over other keys, relative to the same maximum.
  HW_HOST_DEVICE HW_INLINE void add(const RowSums& part) {
    sum += part.sum;
    tilt += part.tilt;
    squares += part.squares;
    mass += part.mass;
  }
};

// What becomes of a row of a softmax.
template <class A>
struct RowResult {
  A factor;     // of the values summed
  A row, rest;  // the row statistic L and what rounding took from it
  A entropy, p_max, sq_norm, mass;
};

// `extra`: the logit z, natural.
template <class A, class Units = NaturalUnits<A>>
HW_HOST_DEVICE HW_INLINE RowResult<A> finalize_softmax(RowSums<A> r, A extra,
                                                       const Units& units = {}) {
  constexpr A kInfinite = std::numeric_limits<A>::infinity();
  const A largest = r.max;
  A moved = 1, total = r.sum;
  if (extra != -kInfinite) {
    const A z = units.kept(extra);
    moved = r.move_to(z > r.max ? z : r.max, units);
    total = r.sum + (z == r.max ? A(1) : units.exp(z - r.max));
  }
  const bool some = total != A(0);
  const A log_total = units.log(total), inverse = some ? A(1) / total : A(0);
  RowResult<A> x;
  x.factor = moved * inverse;
  // A score of +inf is L, though p is NaN there.
  x.row = r.max == kInfinite ? r.max : some ? units.natural(r.max) + log_total : -kInfinite;
  x.rest = x.row - x.row == A(0) ? units.distance(r.max, x.row) + log_total : A(0);
  x.entropy = some ? (r.sum * log_total - r.tilt) * inverse : A(0);
  x.p_max = some ? exp_of(units.distance(largest, x.row) - x.rest) : A(0);
  x.sq_norm = r.squares * inverse * inverse;
  x.mass = r.mass * inverse;
  return x;
}

}  // namespace hw::softmax
