// SPDX-License-Identifier: Apache-2.0
// The small matrix product behind every CPU loop: operands lie in L1 or L2, B and C are row-major
// and padded to whole vectors, A has any strides (so a transposed A costs nothing).
//
//   multiply<kAccumulate>(m, n, k, A, B, ldb, C, ldc)     C[m, n] (+)= A[m, k] B[k, n]
//   multiply<kAccumulate>(m, n, k, A, rows, C, ldc)       the same with the rows of B anywhere
//   multiply<false>(..., ldc, LaneFactors{f})             C[m, n] = A[m, k] B[k, n] diag(f[n])
//
// Elements of A and B are those of C or pairs of bf16 (core/pairs.h); k counts them.
//
// A register tile holds kRows x kVectors vectors of C while k runs: B is loaded once per tile row
// group, elements of A are broadcast. 6 x 4 (32 registers) or 6 x 2 (16 registers) keep the fused
// multiply-add units busy: 24 or 12 independent sums against a latency of 4 to 5 at 2 per cycle.
#pragma once

#include <algorithm>

#include "core/math.h"
#include "core/pairs.h"
#include "core/rows.h"
#include "core/simd.h"

namespace hw {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// A(i, j) = data[i * row + j * col]
template <class T>
struct Operand {
  const T* data;
  int64_t row, col;

  Operand rows(int64_t i) const { return {data + i * row, row, col}; }
};

template <class T>
HW_INLINE Operand<T> row_major(const T* data, int64_t ld) {
  return {data, ld, 1};
}
template <class T>
HW_INLINE Operand<T> transposed(const T* data, int64_t ld) {
  return {data, 1, ld};
}

// What a product is multiplied by on its way into C.
struct NoFactors {
  template <class V>
  HW_INLINE V operator()(V x, int) const {
    return x;
  }
  HW_INLINE NoFactors from(int) const { return {}; }
};
template <class T>
struct LaneFactors {
  const T* factor;  // [n]

  HW_INLINE Vec<T> operator()(Vec<T> x, int lane) const { return x * load(factor + lane); }
  HW_INLINE LaneFactors from(int lane) const { return {factor + lane}; }
};

// What else is done while a product runs: after each register tile.
struct NothingMeanwhile {
  HW_INLINE void step() const {}
};
constexpr NothingMeanwhile kNothing;

// Memory that will be wanted afterwards is asked for, some rows a step. Requests in one burst would
// wait for each other; among multiplications they cost next to nothing.
struct Requests {
  const char* const* rows = nullptr;  // [count]
  int64_t count = 0, bytes = 0;       // bytes of a row
  int64_t at_once = 0;

  HW_INLINE void step() { ask(std::min(at_once, count)); }
  void rest() { ask(count); }

 private:
  HW_INLINE void ask(int64_t n) {
    for (; n > 0; --n, --count) prefetch(*rows++, bytes);
  }
};

template <bool kAccumulate, int kRows, int kVectors, class E, class B, class T, class Factors>
HW_INLINE void tile(int k, Operand<E> a, B b, T* __restrict c, int64_t ldc, Factors factors) {
  static_assert(kLanes<E> == kLanes<T>);
  static_assert(!kAccumulate || std::is_same_v<Factors, NoFactors>);
  Vec<T> sum[kRows][kVectors];
  HW_UNROLL for (int i = 0; i < kRows; ++i) {
    HW_UNROLL for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = kAccumulate ? load(c + i * ldc + v * kLanes<T>) : Vec<T>{};
    }
  }
  for (int p = 0; p < k; ++p) {
    const E* __restrict from = b.row(p);
    Vec<E> row[kVectors];
    HW_UNROLL for (int v = 0; v < kVectors; ++v) row[v] = load(from + v * kLanes<E>);
    HW_UNROLL for (int i = 0; i < kRows; ++i) {
      const Vec<E> x = splat(a.data[i * a.row + p * a.col]);
      HW_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(x, row[v], sum[i][v]);
    }
  }
  HW_UNROLL for (int i = 0; i < kRows; ++i) {
    HW_UNROLL for (int v = 0; v < kVectors; ++v) {
      store(c + i * ldc + v * kLanes<T>, factors(sum[i][v], v * kLanes<T>));
    }
  }
}

// All rows of a column panel of kVectors vectors, the last rows by a smaller tile. Never inlined:
// amid other code the compiler would keep some of the sums in memory.
template <bool kAccumulate, int kVectors, int kRows = kTileRows, class E, class B, class T,
          class Factors, class Meanwhile>
[[gnu::noinline]] void panel(int m, int k, Operand<E> a, B b, T* c, int64_t ldc, Factors factors,
                             Meanwhile& meanwhile) {
  for (; m >= kRows; m -= kRows, a = a.rows(kRows), c += kRows * ldc) {
    tile<kAccumulate, kRows, kVectors>(k, a, b, c, ldc, factors);
    meanwhile.step();
  }
  if constexpr (kRows > 1)
    if (m > 0) panel<kAccumulate, kVectors, kRows - 1>(m, k, a, b, c, ldc, factors, meanwhile);
}

// B: rows as core/rows.h knows them.
template <bool kAccumulate, int kVectors = kTileVectors, class E, class B, class T,
          class Factors = NoFactors, class Meanwhile = const NothingMeanwhile>
inline void multiply(int m, int n, int k, Operand<E> a, B b, T* c, int64_t ldc,
                     Factors factors = {}, Meanwhile& meanwhile = kNothing) {
  constexpr int kColumns = kVectors * kLanes<T>;
  for (; n >= kColumns;
       n -= kColumns, b = b.from(kColumns), c += kColumns, factors = factors.from(kColumns))
    panel<kAccumulate, kVectors>(m, k, a, b, c, ldc, factors, meanwhile);
  if constexpr (kVectors > 1)
    if (n > 0) multiply<kAccumulate, kVectors - 1>(m, n, k, a, b, c, ldc, factors, meanwhile);
}

template <bool kAccumulate, class E, class T, class Factors = NoFactors,
          class Meanwhile = const NothingMeanwhile>
inline void multiply(int m, int n, int k, Operand<E> a, const E* b, int64_t ldb, T* c, int64_t ldc,
                     Factors factors = {}, Meanwhile& meanwhile = kNothing) {
  multiply<kAccumulate>(m, n, k, a, Panel<E>{b, ldb}, c, ldc, factors, meanwhile);
}

}  // namespace
}  // namespace hw
