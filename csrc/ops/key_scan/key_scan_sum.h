// SPDX-License-Identifier: Apache-2.0
// Key scan: log-sums as pairs, on every backend.
//
// The log-sum-exp is carried as (m, a): the largest score so far and the sum of e^{s - m}. Scores
// are compared with scores only, so no rounding of L enters a weight, however large L is:
//   (m, a) + (m', a') = (M, a e^{m - M} + a' e^{m' - M}),  M = max(m, m');   L = m + log a
// The empty sum is (-inf, 0). A NaN or +inf among the scores makes every weight NaN, and stays.
//
// What is left for the backward pass are L and its rest, which rounding took from it.
#pragma once

#include <cmath>
#include <limits>

#include "core/macros.h"

namespace hw::key_scan {

template <class A>
HW_HOST_DEVICE HW_INLINE A nothing() {
  return -std::numeric_limits<A>::infinity();
}

// L as a number and its rest.
template <class A>
struct Log {
  A value, rest;
};

// e^{from - to} for from <= to; 0 where `from` is nothing.
template <class A>
HW_HOST_DEVICE HW_INLINE A decay(A from, A to) {
  return from == nothing<A>() ? A(0) : std::exp(from - to);
}
template <class A>
HW_HOST_DEVICE HW_INLINE A decay(const Log<A>& from, const Log<A>& to) {
  if (from.value == nothing<A>()) return A(0);
  return std::exp((from.value - to.value) + (from.rest - to.rest));
}

template <class A>
struct LogSum {
  A m, a;

  HW_HOST_DEVICE HW_INLINE Log<A> log() const {
    if (a == A(0)) return {nothing<A>(), A(0)};
    if (m == -nothing<A>()) return {m, A(0)};
    const A log_a = std::log(a), value = m + log_a;
    return {value, (m - value) + log_a};
  }
};

// 1 + (s - s): NaN for scores that are infinite or NaN.
template <class A>
HW_HOST_DEVICE HW_INLINE LogSum<A> one_score(A s) {
  return {s, s == nothing<A>() ? A(0) : A(1) + (s - s)};
}

template <class A>
HW_HOST_DEVICE HW_INLINE LogSum<A> join(const LogSum<A>& x, const LogSum<A>& y) {
  const A m = x.m > y.m || x.m != x.m ? x.m : y.m;
  const auto part = [m](const LogSum<A>& z) { return z.m == m ? z.a : z.a * decay(z.m, m); };
  return {m, part(x) + part(y)};
}

// The share of x in a sum: e^{log x - log sum}.
template <class A>
HW_HOST_DEVICE HW_INLINE A share(const LogSum<A>& x, const LogSum<A>& sum) {
  if (x.a == A(0)) return A(0);
  return (x.m == sum.m ? x.a : x.a * decay(x.m, sum.m)) / sum.a;
}

}  // namespace hw::key_scan
