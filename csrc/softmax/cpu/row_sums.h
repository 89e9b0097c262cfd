// SPDX-License-Identifier: Apache-2.0
// What the forward pass of attention on the CPU keeps of each row while it walks over the keys.
#pragma once

#include <algorithm>
#include <cmath>

#include "softmax/cpu/tile.h"
#include "softmax/online.h"

namespace hw::softmax {
namespace {

// The sums of a block's rows, side by side.
template <class A>
struct BlockSums {
  alignas(64) A max[kRows];  // of s, or a little less (kSlack): what the exponents are relative to
  alignas(64) A top[kRows];  // of s where max may be less
  alignas(64) A sum[kRows];
  alignas(64) A tilt[kRows];
  alignas(64) A squares[kRows];
  alignas(64) A mass[kRows];

  HW_NOINLINE void clear() {
    for (A* x : {max, top}) std::fill_n(x, kRows, -kInfinity<A>);
    for (A* x : {sum, tilt, squares, mass}) std::fill_n(x, kRows, A(0));
  }

  RowSums<A> row(int i) const { return {max[i], sum[i], tilt[i], squares[i], mass[i]}; }

  // Moves row i to a new maximum; returns the factor of everything that was summed.
  HW_NOINLINE A move(int i, A to) {
    RowSums<A> r = row(i);
    const A factor = r.move_to(to);
    max[i] = r.max, sum[i] = r.sum, tilt[i] = r.tilt, squares[i] = r.squares, mass[i] = r.mass;
    return factor;
  }

  // The same for a vector of lanes. `counts`: lanes of which anything was summed become 1.
  Vec<A> move(int l, Vec<A> to, Vec<A>& counts) {
    using V = Vec<A>;
    RowSums<V, A> r{load(max + l), load(sum + l), load(tilt + l), load(squares + l),
                    load(mass + l)};
    const V from = r.max;
    const V factor = r.move_to(to);
    store(max + l, r.max);
    store(sum + l, r.sum);
    store(tilt + l, r.tilt);
    store(squares + l, r.squares);
    store(mass + l, r.mass);
    counts = (from == to ? V{} : from == -kInfinity<A> ? V{} : splat(A(1))) + counts;
    return factor;
  }
};

// The largest of `top` and n scores of each lane; NaN scores are passed over. Four maxima at
// a time: one would wait for itself.
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

// tilt += e (s - shift), 0 for e = 0
template <class A>
HW_INLINE void add_tilt(const A* s, Vec<A> shift, Vec<A> e, A* sum) {
  const Vec<A> d = load(s) - shift;
  store(sum, load(sum) + e * (d < A(-1e4) ? Vec<A>{} : d));
}

template <class A>
HW_NOINLINE void add_squares(const A* e, int n, A* sum) {
  Vec<A> total = load(sum);
  for (int j = 0; j < n; ++j) total = fma(load(e + j * kRows), load(e + j * kRows), total);
  store(sum, total);
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
