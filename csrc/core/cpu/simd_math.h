// SPDX-License-Identifier: Apache-2.0
// Elementary functions of CPU vectors. NaN stays NaN.
//
//   exp_of      e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2: a polynomial of degree 6
//               (float, relative error 2e-7 with the rounding of its steps) or 11 (double, 4e-16);
//               below the normal numbers 0 (AVX-512: rounded to a subnormal one), above the largest
//               infinity
//   exp_coarse  e^x to a relative error of 3e-6 + 6e-8 |x|, for what is rounded to bf16: AVX-512
//               alone
//   tanh_of     1 - 2 / (e^2x + 1): absolute error of one rounding of 1
//   sigmoid_of, abs_of, sign_of, positive_of (max(x, 0)), step_of (its derivative)
#pragma once

#include <concepts>
#include <limits>

#include "core/cpu/simd.h"

namespace hw {
namespace {

template <class T>
struct ExpConstants;

// ln 2 in two parts, the first with trailing zeros so that n times it is exact. The polynomial is
// 1 + r + r^2 (c[0] + c[1] r + ...), fitted to the relative error on |r| <= ln 2 / 2.
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.4426950408889634f, ln2_high = 0.693359375f,
                         ln2_low = -2.12194440054690583e-4f;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int mantissa = 23;
  static constexpr float least = -104, most = 89;       // arguments beyond them give 0, infinity
  static constexpr float lowest = -126, highest = 127;  // exponents of normal numbers
  static constexpr float c[] = {0.4999998858839595f, 0.16666518404101823f, 0.04166953422493717f,
                                0.008368923427205723f, 0.0013751382142695378f};
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634074, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa = 52;
  static constexpr double least = -746, most = 710;
  static constexpr double lowest = -1022, highest = 1023;
  static constexpr double c[] = {0.5000000000000018,     0.16666666666666669,
                                 0.04166666666648128,    0.00833333333327565,
                                 0.0013888888955953937,  1.9841270042242554e-04,
                                 2.4801479821558122e-05, 2.7557038266997863e-06,
                                 2.7635216581073184e-07, 2.5191718816419513e-08};
};

// larger: a > b ? a : b, smaller: a < b ? a : b; with a NaN both are b. One instruction of x86,
// which compilers do not find by themselves.
#if defined(__AVX512F__)
#define HW_BY_VECTOR(maximum, type, mask) _mm512_maskz_##maximum##_##type(mask, a, b)
#elif defined(__AVX2__)
#define HW_BY_VECTOR(maximum, type, mask) _mm256_##maximum##_##type(a, b)
#elif defined(__SSE2__)
#define HW_BY_VECTOR(maximum, type, mask) _mm_##maximum##_##type(a, b)
#endif
#if defined(HW_BY_VECTOR)
HW_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return HW_BY_VECTOR(max, ps, 0xffff); }
HW_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return HW_BY_VECTOR(max, pd, 0xff); }
HW_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) { return HW_BY_VECTOR(min, ps, 0xffff); }
HW_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) { return HW_BY_VECTOR(min, pd, 0xff); }
#undef HW_BY_VECTOR
#else
template <class V>
  requires(!std::floating_point<V>)
HW_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
  requires(!std::floating_point<V>)
HW_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}
#endif

// y 2^n for y = 1 .. 2 and integers n; `shifted` is n + round. 0 below the normal numbers, infinity
// above the largest, NaN for NaN.
template <class T>
HW_INLINE Vec<T> times_power_of_2(Vec<T> y, Vec<T> n, Vec<T> shifted) {
#if defined(__AVX512F__)
  static_cast<void>(shifted);
  if constexpr (std::is_same_v<T, float>)
    return _mm512_maskz_scalef_ps(0xffff, y, n);  // the plain one warns of its own header
  else
    return _mm512_maskz_scalef_pd(0xff, y, n);
#else
  // Adding n to the exponent field; n is in the low bits of `shifted`.
  using C = ExpConstants<T>;
  using Index = typename LaneIndexOf<T>::type;
  Index bits, shift;
  std::memcpy(&bits, &y, sizeof bits);
  std::memcpy(&shift, &shifted, sizeof shift);
  bits += shift << C::mantissa;
  Vec<T> scaled;
  std::memcpy(&scaled, &bits, sizeof scaled);
  scaled = n < C::lowest ? Vec<T>{} : scaled;
  scaled = n > C::highest ? splat(std::numeric_limits<T>::infinity()) : scaled;
  return n == n ? scaled : n;
#endif
}

template <class T>
HW_INLINE Vec<T> exp_vector(Vec<T> x) {
  using C = ExpConstants<T>;
  // Far beyond the range n would leave the low bits, and -inf would give r = NaN.
  x = smaller(splat(C::most), larger(splat(C::least), x));
  const Vec<T> shifted = x * C::log2e + C::round;
  const Vec<T> n = shifted - C::round;
  const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
  constexpr int kLast = static_cast<int>(sizeof(C::c) / sizeof(T)) - 1;
  Vec<T> tail = splat(C::c[kLast]);
  HW_UNROLL for (int i = kLast - 1; i >= 0; --i) tail = tail * r + C::c[i];
  return times_power_of_2<T>((tail * r + T(1)) * r + T(1), n, shifted);
}

HW_INLINE Vec<float> exp_of(Vec<float> x) { return exp_vector<float>(x); }
HW_INLINE Vec<double> exp_of(Vec<double> x) { return exp_vector<double>(x); }

#if defined(__AVX512DQ__)
// 2^n 2^r, n + r = x log2 e, |r| <= 1/2: a polynomial of degree 4, 1 at 0. Infinities have r = 0,
// so that no argument has to be held back.
HW_INLINE Vec<float> exp_coarse(Vec<float> x) {
  constexpr float c[] = {0.6931241933678402f, 0.2402409861125954f, 0.055906425036458998f,
                         0.0095828531689102874f};
  const Vec<float> t = x * ExpConstants<float>::log2e;
  const Vec<float> r = _mm512_maskz_reduce_ps(0xffff, t, 0);
  const Vec<float> y = (((c[3] * r + c[2]) * r + c[1]) * r + c[0]) * r + 1.0f;
  return _mm512_maskz_scalef_ps(0xffff, y, t - r);
}
#endif

template <class V>
using ScalarOf = std::remove_cvref_t<decltype(V{}[0])>;

template <class V>
  requires(!std::floating_point<V>)
HW_INLINE V abs_of(V x) {
  return x < ScalarOf<V>(0) ? -x : x;
}
template <class V>
  requires(!std::floating_point<V>)
HW_INLINE V sign_of(V x) {
  return x > ScalarOf<V>(0)   ? V{} + ScalarOf<V>(1)
         : x < ScalarOf<V>(0) ? V{} - ScalarOf<V>(1)
                              : V{};
}
template <class V>
  requires(!std::floating_point<V>)
HW_INLINE V positive_of(V x) {
  return larger(V{}, x);
}
template <class V>
  requires(!std::floating_point<V>)
HW_INLINE V step_of(V x) {
  return x > ScalarOf<V>(0) ? V{} + ScalarOf<V>(1) : V{};
}
template <class V>
  requires(!std::floating_point<V>)
HW_INLINE V sigmoid_of(V x) {
  return ScalarOf<V>(1) / (ScalarOf<V>(1) + exp_of(-x));
}
template <class V>
  requires(!std::floating_point<V>)
HW_INLINE V tanh_of(V x) {
  return ScalarOf<V>(1) - ScalarOf<V>(2) / (exp_of(x + x) + ScalarOf<V>(1));
}

}  // namespace
}  // namespace hw
