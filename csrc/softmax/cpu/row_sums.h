// SPDX-License-Identifier: Apache-2.0
// What the forward pass of attention on the CPU keeps of each row while it walks over the keys.
#pragma once

#include <algorithm>
#include <cmath>

#include "softmax/cpu/operands.h"

#include "core/cpu/simd_math.h"

namespace hw::softmax {
namespace {

// Running sums of a block's rows, over the keys so far; `shift` is what the exponents are relative
// to: a maximum, 0 before any finite score.
template <class A>
struct RowSums {
  alignas(64) A max[kRows];      // of s, or a little less (kSlack); -inf before any
  alignas(64) A top[kRows];      // of s where max may be less
  alignas(64) A sum[kRows];      // softmaxes: sum e^(s - shift); others: sum a(s)
  alignas(64) A tilt[kRows];     // sum e^(s - shift) (s - shift)
  alignas(64) A squares[kRows];  // sum e^(2 (s - shift))
  alignas(64) A mass[kRows];     // sum e^(s - shift) m

  HW_NOINLINE void clear() {
    for (A* x : {max, top}) std::fill_n(x, kRows, -kInfinity<A>);
    for (A* x : {sum, tilt, squares, mass}) std::fill_n(x, kRows, A(0));
  }

  // Moves row i to a new maximum; returns the factor of everything that was summed.
  HW_NOINLINE A move(int i, A to) {
    const A from = max[i];
    max[i] = to;
    if (from == to || to == -kInfinity<A>) return 1;
    if (from == -kInfinity<A>) return 0;  // nothing was summed
    const A factor = std::exp(from - to);
    tilt[i] = factor * (tilt[i] + (from - to) * sum[i]);
    sum[i] *= factor;
    squares[i] *= factor * factor;
    mass[i] *= factor;
    return factor;
  }

  // The same for a vector of lanes. `counts`: lanes of which anything was summed become 1.
  Vec<A> move(int l, Vec<A> to, Vec<A>& counts) {
    using V = Vec<A>;
    const V from = load(max + l), one = splat(A(1));
    const V down = from == -kInfinity<A> ? V{} : from - to;
    V factor = from == -kInfinity<A> ? V{} : exp_of(down);
    factor = from == to ? one : factor;
    store(max + l, to);
    store(tilt + l, factor * (load(tilt + l) + (from == to ? V{} : down) * load(sum + l)));
    store(sum + l, factor * load(sum + l));
    store(squares + l, factor * factor * load(squares + l));
    store(mass + l, factor * load(mass + l));
    counts = (from == to ? V{} : from == -kInfinity<A> ? V{} : one) + counts;
    return factor;
  }
};

// The largest of `top` and n scores of each lane; NaN scores are passed over. Four maxima at a time:
// one would wait for itself.
template <class A>
HW_INLINE Vec<A> top_of(const A* s, int n, Vec<A> top) {
  Vec<A> some[4] = {top, top, top, top};
  int j = 0;
  for (; j + 4 <= n; j += 4) {
    HW_UNROLL for (int i = 0; i < 4; ++i) some[i] = larger(load(s + (j + i) * kRows), some[i]);
  }
  for (; j < n; ++j) some[0] = larger(load(s + j * kRows), some[0]);
  return larger(larger(some[0], some[1]), larger(some[2], some[3]));
}

// e^x of weights that will be multiplied as T.
template <class T>
HW_INLINE Vec<Accum<T>> weight_exp(Vec<Accum<T>> x) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) return exp_coarse(x);
#endif
  return exp_of(x);
}

}  // namespace
}  // namespace hw::softmax
