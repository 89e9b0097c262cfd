// SPDX-License-Identifier: Apache-2.0
// The small matrix product behind every CPU loop: operands lie in L1 or L2, B and C are row-major
// and padded to whole vectors, A has any strides (so a transposed A costs nothing).
//
//   multiply<kAccumulate>(m, n, k, A, B, ldb, C, ldc)     C[m, n] (+)= A[m, k] B[k, n]
//   multiply<kAccumulate>(m, n, k, A, rows, C, ldc)       the same with the rows of B anywhere
//   multiply<false>(..., ldc, LaneFactors{f})             C[m, n] = A[m, k] B[k, n] diag(f[n])
//
// Elements of A and B are those of C or pairs of bf16 (core/cpu/bf16_dot.h); k counts them.
//
// A register tile holds kRows x kVectors vectors of C while k runs: B is loaded once per tile row
// group, elements of A are broadcast. 6 x 4 (32 registers) or 6 x 2 (16 registers) keep the fused
// multiply-add units busy: 24 or 12 independent sums against a latency of 4 to 5 at 2 per cycle.
#pragma once

#include <algorithm>

#include "core/cpu/bf16_dot.h"
#include "core/cpu/panel.h"
#include "core/cpu/simd.h"
#include "core/math.h"

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

// Rows that will be read afterwards are prefetched, some a step. Prefetches in one burst would
// wait for each other; among multiplications they cost next to nothing.
struct Prefetches {
  const char* const* rows = nullptr;  // [count]
  int64_t count = 0, bytes = 0;       // bytes of a row
  int64_t at_once = 0;

  HW_INLINE void step() { prefetch_next(std::min(at_once, count)); }
  void rest() { prefetch_next(count); }

 private:
  HW_INLINE void prefetch_next(int64_t n) {
    for (; n > 0; --n, --count) prefetch(*rows++, bytes);
  }
};

// C (+)= A B of one register tile, k > 0: a loop that may be left at once would keep sums in
// memory.
template <int kRows, int kVectors, class E, class B, class T, class Factors>
HW_INLINE void tile(bool accumulate, int k, Operand<E> a, B b, T* __restrict c, int64_t ldc,
                    Factors factors) {
  static_assert(kLanes<E> == kLanes<T>);
  Vec<T> sum[kRows][kVectors];
  HW_UNROLL for (int i = 0; i < kRows; ++i) {
    HW_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = Vec<T>{};
  }
  if (accumulate) {
    HW_UNROLL for (int i = 0; i < kRows; ++i) {
      HW_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = load(c + i * ldc + v * kLanes<T>);
    }
  }
  int p = 0;
  do {
    const E* __restrict from = b.row(p);
    Vec<E> row[kVectors];
    HW_UNROLL for (int v = 0; v < kVectors; ++v) row[v] = load(from + v * kLanes<E>);
    HW_UNROLL for (int i = 0; i < kRows; ++i) {
      const Vec<E> x = splat(a.data[i * a.row + p * a.col]);
      HW_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(x, row[v], sum[i][v]);
    }
  } while (++p < k);
  HW_UNROLL for (int i = 0; i < kRows; ++i) {
    HW_UNROLL for (int v = 0; v < kVectors; ++v) {
      store(c + i * ldc + v * kLanes<T>, factors(sum[i][v], v * kLanes<T>));
    }
  }
}

// All rows of a column panel of kVectors vectors, the last rows by a smaller tile. Never inlined:
// amid other code the compiler would keep some of the sums in memory. Whether sums start from C,
// and whether anything is prefetched, is known at run time only: a size of a tile is compiled once.
template <int kVectors, int kRows = kTileRows, class E, class B, class T, class Factors>
HW_NOINLINE void panel(bool accumulate, int m, int k, Operand<E> a, B b, T* c, int64_t ldc,
                       Factors factors, Prefetches* prefetches) {
  for (; m >= kRows; m -= kRows, a = a.rows(kRows), c += kRows * ldc) {
    tile<kRows, kVectors>(accumulate, k, a, b, c, ldc, factors);
    if (prefetches != nullptr) prefetches->step();
  }
  if constexpr (kRows > 1)
    if (m > 0) panel<kVectors, kRows - 1>(accumulate, m, k, a, b, c, ldc, factors, prefetches);
}

template <class T>
HW_NOINLINE void clear(int m, int n, T* c, int64_t ldc) {
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) c[i * ldc + j] = T(0);
}

template <int kVectors, class E, class B, class T, class Factors>
HW_NOINLINE void panels(bool accumulate, int m, int n, int k, Operand<E> a, B b, T* c, int64_t ldc,
                        Factors factors, Prefetches* prefetches) {
  constexpr int kColumns = kVectors * kLanes<T>;
  if (k <= 0) {
    if (!accumulate) clear(m, n, c, ldc);
    return;
  }
  for (; n >= kColumns;
       n -= kColumns, b = b.from(kColumns), c += kColumns, factors = factors.from(kColumns))
    panel<kVectors>(accumulate, m, k, a, b, c, ldc, factors, prefetches);
  if constexpr (kVectors > 1)
    if (n > 0) panels<kVectors - 1>(accumulate, m, n, k, a, b, c, ldc, factors, prefetches);
}

// B: rows as core/cpu/panel.h knows them. `prefetches`: a step of it after each register tile, or
// null.
template <bool kAccumulate, class E, class B, class T, class Factors = NoFactors>
HW_INLINE void multiply(int m, int n, int k, Operand<E> a, B b, T* c, int64_t ldc,
                        Factors factors = {}, Prefetches* prefetches = nullptr) {
  static_assert(!kAccumulate || std::is_same_v<Factors, NoFactors>);
  panels<kTileVectors>(kAccumulate, m, n, k, a, b, c, ldc, factors, prefetches);
}

template <bool kAccumulate, class E, class T, class Factors = NoFactors>
HW_INLINE void multiply(int m, int n, int k, Operand<E> a, const E* b, int64_t ldb, T* c,
                        int64_t ldc, Factors factors = {}, Prefetches* prefetches = nullptr) {
  multiply<kAccumulate>(m, n, k, a, Panel<E>{b, ldb}, c, ldc, factors, prefetches);
}

}  // namespace
}  // namespace hw
