// SPDX-License-Identifier: Apache-2.0
// What the operands of small products consist of: numbers of the accumulation type or, where the
// instruction set multiplies bf16, pairs of bf16 that are neighbours along the summed index.
//
//   Multiplied<T>      that type for elements T
//   kDepth<E>          terms of the sum that one E stands for: 1, or 2 for pairs
//   steps<E>(k)        elements E that cover k terms; a term too many is a zero in both operands
//
// and, with the instruction set:
//
//   fma(a, b, c)            c + a.first b.first + a.second b.second, lane by lane
//   zip(x, y)               lane i: the pair (x_i, y_i), rounded to nearest even
//   neighbours(low, high)   lane i: the pair of elements 2 i, 2 i + 1 of low and high in a row
//   zip_rows(...)           rows x, y of bf16: element i: the pair (x_i, y_i)
//
// All but zip_rows take subnormal numbers as 0, and none comes out of fma.
#pragma once

#include "core/cpu/simd.h"
#include "core/math.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace hw {
namespace {

template <class T>
struct MultipliedOf {
  using type = Accum<T>;
};
template <class E>
constexpr int kDepth = 1;

#if defined(__AVX512BF16__)

struct Bf16Pair {
  bf16 first, second;
};
template <>
struct MultipliedOf<bf16> {
  using type = Bf16Pair;
};
template <>
constexpr int kDepth<Bf16Pair> = 2;

// A lane holds `first` in its lower half.
template <>
struct LaneIndexOf<Bf16Pair> : LaneIndexOf<float> {};
template <>
struct VecOf<Bf16Pair> : LaneIndexOf<float> {};

// 2 kLanes<Bf16Pair> elements in a row.
using Bf16Row [[gnu::vector_size(kVectorBytes)]] = int16_t;

HW_INLINE Vec<Bf16Pair> splat(Bf16Pair x) { return Vec<Bf16Pair>{} + std::bit_cast<int32_t>(x); }

HW_INLINE Vec<float> fma(Vec<Bf16Pair> a, Vec<Bf16Pair> b, Vec<float> c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}

HW_INLINE Vec<Bf16Pair> neighbours(Vec<float> low, Vec<float> high) {
  return (Vec<Bf16Pair>)_mm512_cvtne2ps_pbh(high, low);
}

// Elements [kFrom, kFrom + lanes) of two rows, in turn.
template <int kFrom>
HW_INLINE Vec<Bf16Pair> in_turn(Bf16Row x, Bf16Row y) {
  constexpr int kCount = 2 * kLanes<Bf16Pair>;
  Bf16Row order{};
  HW_UNROLL for (int i = 0; i < kCount; ++i) {
    order[i] = static_cast<int16_t>(kFrom + i / 2 + (i % 2) * kCount);
  }
  return (Vec<Bf16Pair>)__builtin_shuffle(x, y, order);
}

HW_INLINE Vec<Bf16Pair> zip(Vec<float> x, Vec<float> y) {
  const Bf16Row both = (Bf16Row)_mm512_cvtne2ps_pbh(y, x);
  Bf16Row order{};
  HW_UNROLL for (int i = 0; i < 2 * kLanes<Bf16Pair>; ++i) {
    order[i] = static_cast<int16_t>(i / 2 + (i % 2) * kLanes<Bf16Pair>);
  }
  return (Vec<Bf16Pair>)__builtin_shuffle(both, order);
}

// Elements [from, n) of a row, at most a vector of them; zeros behind the end.
HW_INLINE Bf16Row load_row(const bf16* row, int from, int n) {
  const int count = min_of(n - from, 2 * kLanes<Bf16Pair>);
  const __mmask32 some = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  return (Bf16Row)_mm512_maskz_loadu_epi16(some, row + from);
}

// to[i] = (x[i stride], y[i stride]) for i < n, then zeros up to a whole vector. y null: all zeros.
inline void zip_rows(Bf16Pair* __restrict to, const bf16* x, const bf16* y, int n, int64_t stride) {
  constexpr int kLane = kLanes<Bf16Pair>;
  if (stride != 1) {
    for (int i = 0; i < round_up(n, kLane); ++i)
      to[i] = {i < n ? x[i * stride] : bf16{}, i < n && y ? y[i * stride] : bf16{}};
    return;
  }
  for (int i = 0; i < n; i += 2 * kLane) {
    const Bf16Row first = load_row(x, i, n), second = y ? load_row(y, i, n) : Bf16Row{};
    store(to + i, in_turn<0>(first, second));
    if (i + kLane < n) store(to + i + kLane, in_turn<kLane>(first, second));
  }
}

#endif

template <class T>
using Multiplied = typename MultipliedOf<T>::type;

template <class E>
constexpr int steps(int k) {
  return ceil_div(k, kDepth<E>);
}

}  // namespace
}  // namespace hw
