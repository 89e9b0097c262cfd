// SPDX-License-Identifier: Apache-2.0
// CPU vectors: one source, compiled once per instruction set.
//
//   Vec<T>          Lanes<T> elements of float or double in one register, with + - * and a[i]
//   load, store     unaligned; splat(x) fills every lane; fma(a, b, c) = a * b + c
//   sum(v)          of the lanes, in a fixed order
//   widen, narrow   rows of any element type to and from the accumulation type
//
// The types are GCC vector extensions, so that the same lines become SSE, AVX2, AVX-512 or NEON by
// compiler flags alone. Everything here has internal linkage: an instance compiled for AVX-512 must
// never lend a function to one compiled for the baseline.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "core/macros.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace hw {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using type [[gnu::vector_size(kVectorBytes)]] = float;
};
template <>
struct VecOf<double> {
  using type [[gnu::vector_size(kVectorBytes)]] = double;
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
HW_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
HW_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
HW_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// Contracted to one instruction by -ffp-contract=fast.
template <class V>
HW_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

template <class T>
HW_INLINE T sum(Vec<T> v) {
  T s = 0;
  for (int i = 0; i < kLanes<T>; ++i) s += v[i];
  return s;
}

template <class T>
struct LaneIndexOf;
template <>
struct LaneIndexOf<float> {
  using type [[gnu::vector_size(kVectorBytes)]] = int32_t;
};
template <>
struct LaneIndexOf<double> {
  using type [[gnu::vector_size(kVectorBytes)]] = int64_t;
};

// One round of a transpose: rows a and b, `kStep` apart, exchange the lanes with the bit kStep.
template <int kStep, class T>
HW_INLINE void exchange(Vec<T>& a, Vec<T>& b) {
  using Index = typename LaneIndexOf<T>::type;
  Index low{}, high{};
  HW_UNROLL for (int i = 0; i < kLanes<T>; ++i) {
    low[i] = (i & kStep) == 0 ? i : kLanes<T> + i - kStep;
    high[i] = (i & kStep) == 0 ? i + kStep : kLanes<T> + i;
  }
  const Vec<T> first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}

// rows[i][j] <-> rows[j][i] of a square of vectors.
template <class T, int kStep = kLanes<T> / 2>
HW_INLINE void transpose_square(Vec<T> (&rows)[kLanes<T>]) {
  HW_UNROLL for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & kStep) == 0) exchange<kStep, T>(rows[i], rows[i + kStep]);
  }
  if constexpr (kStep > 1) transpose_square<T, kStep / 2>(rows);
}

// Of a square of vectors: lane i of the result is sum(rows[i]), to the bit.
template <class T>
HW_INLINE Vec<T> sums(Vec<T> (&rows)[kLanes<T>]) {
  transpose_square<T>(rows);
  Vec<T> total{};
  HW_UNROLL for (int i = 0; i < kLanes<T>; ++i) total += rows[i];
  return total;
}

// Of a square of vectors: lane i of the result combines all lanes of rows[i]. Each round halves the
// number of rows.
template <class T, int kStep = kLanes<T> / 2, class Combine>
HW_INLINE Vec<T> across(Vec<T> (&rows)[kLanes<T>], Combine combine) {
  HW_UNROLL for (int i = 0; i < kStep; ++i) {
    exchange<kStep, T>(rows[i], rows[i + kStep]);
    rows[i] = combine(rows[i], rows[i + kStep]);
  }
  if constexpr (kStep > 1) return across<T, kStep / 2>(rows, combine);
  return rows[0];
}

// Asks for the cache lines of `bytes` bytes at p ahead of their use; any address will do.
template <bool kWrite = false>
HW_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(p) + i, kWrite ? 1 : 0, 2);
}

// Zeros in `bytes` bytes at p, whole cache lines of which are written past the caches: nothing is
// read first, nothing is thrown out. Before others read them, finish_past_caches().
HW_INLINE void clear_past_caches(void* p, int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  char* at = static_cast<char*>(p);
  const char* const end = at + (reinterpret_cast<uintptr_t>(p) % kLine == 0 ? bytes & -kLine : 0);
  bytes -= end - at;
  for (p = const_cast<char*>(end); at != end; at += kVectorBytes) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(at), _mm512_setzero_si512());
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at), _mm256_setzero_si256());
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(at), _mm_setzero_si128());
#endif
  }
#endif
  if (bytes > 0) std::memset(p, 0, static_cast<size_t>(bytes));
}
inline void finish_past_caches() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// f(i) for the vectors of n elements that begin at i; returns how many elements those are. Two a
// step: of a plain copy, one a step, compilers make a call that takes as long as a short row.
template <class A, class F>
HW_INLINE int64_t each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 2 * kLanes<A> <= n; i += 2 * kLanes<A>) {
    f(i);
    f(i + kLanes<A>);
  }
  if (i + kLanes<A> <= n) {
    f(i);
    i += kLanes<A>;
  }
  return i;
}

// Words of a vector of float, and the halves of such words.
using Words [[gnu::vector_size(kVectorBytes)]] = uint32_t;
using Halves [[gnu::vector_size(kVectorBytes / 2)]] = uint16_t;

// Of kLanes<float> elements in a row. By name, since compilers make two halves of the conversion.
HW_INLINE Vec<float> load_bf16(const bf16* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  Halves half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, Words) << 16);
#endif
}

// dst[0..n) = src[0..n), widened to the accumulation type.
template <class T, class A>
inline void widen(A* __restrict dst, const T* __restrict src, int64_t n) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, A>)
    i = each_vector<A>(n, [&](int64_t at) { store(dst + at, load(src + at)); });
  if constexpr (std::is_same_v<T, bf16>)
    i = each_vector<A>(n, [&](int64_t at) { store(dst + at, load_bf16(src + at)); });
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, f16>)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(dst + i,
                       _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
#endif
  for (; i < n; ++i) dst[i] = static_cast<A>(src[i]);
}

// Rounded to bf16 as bf16(x) does, in whole vectors.
inline void store_bf16(bf16* p, Vec<float> x) {
  const Words u = (Words)x;
  const Words nan = (u >> 16) | 0x40u, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Halves half = __builtin_convertvector(x == x ? rounded : nan, Halves);
  std::memcpy(p, &half, sizeof half);
}

// dst[0..n) = src[0..n), rounded to the element type.
template <class T, class A>
inline void narrow(T* __restrict dst, const A* __restrict src, int64_t n) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, A>)
    i = each_vector<A>(n, [&](int64_t at) { store(dst + at, load(src + at)); });
  if constexpr (std::is_same_v<T, bf16>)
    for (; i + kLanes<A> <= n; i += kLanes<A>) store_bf16(dst + i, load(src + i));
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, f16>)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) dst[i] = static_cast<T>(src[i]);
}

// The same for rows whose elements are `stride` apart.
template <class T, class A>
inline void widen(A* __restrict dst, const T* __restrict src, int64_t n, int64_t stride) {
  if (stride == 1) return widen(dst, src, n);
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<A>(src[i * stride]);
}

template <class T, class A>
inline void narrow(T* __restrict dst, const A* __restrict src, int64_t n, int64_t stride) {
  if (stride == 1) return narrow(dst, src, n);
  for (int64_t i = 0; i < n; ++i) dst[i * stride] = static_cast<T>(src[i]);
}

}  // namespace
}  // namespace hw
