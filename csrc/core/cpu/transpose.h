// SPDX-License-Identifier: Apache-2.0
// Moving small matrices between layouts on the CPU, and the rims of padded ones.
#pragma once

#include "core/cpu/panel.h"
#include "core/cpu/simd.h"
#include "core/ref.h"

namespace hw {
namespace {

// to[j, i] (+)= from[i, j] for i < rows, j < columns: squares of whole vectors, then the rims.
// `from`: rows as core/cpu/panel.h knows them.
template <bool kAdd = false, class From, class A>
HW_NOINLINE void transpose(From from, int rows, int columns, A* __restrict to, int64_t to_ld) {
  constexpr int kSide = kLanes<A>;
  const int whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int i = 0; i < whole_rows; i += kSide)
    for (int j = 0; j < whole_columns; j += kSide) {
      Vec<A> square[kSide];
      HW_UNROLL for (int r = 0; r < kSide; ++r) square[r] = load(from.row(i + r) + j);
      transpose_square<A>(square);
      HW_UNROLL for (int r = 0; r < kSide; ++r) {
        A* at = to + (j + r) * to_ld + i;
        if constexpr (kAdd) square[r] += load(at);
        store(at, square[r]);
      }
    }
  for (int i = 0; i < rows; ++i)
    for (int j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      A& cell = to[j * to_ld + i];
      if constexpr (kAdd)
        cell += from.row(i)[j];
      else
        cell = from.row(i)[j];
    }
}

template <bool kAdd = false, class A>
void transpose(const A* from, int64_t from_ld, int rows, int columns, A* to, int64_t to_ld) {
  transpose<kAdd>(Panel<A>{from, from_ld}, rows, columns, to, to_ld);
}

// Columns [from, to) of the first `rows` rows become 0.
template <class A>
HW_NOINLINE void clear_columns(A* m, int64_t ld, int rows, int from, int to) {
  for (int i = 0; i < rows && from < to; ++i)
    for (int j = from; j < to; ++j) m[i * ld + j] = A{};
}

// Heads lie between the rows of one head, so the hardware does not see the next rows coming: each
// row that is read prefetches the row `ahead` rows on, which the next chunk reads.
template <bool kWrite = false, class T>
HW_INLINE void prefetch_row(const Ref<T, 2>& x, int64_t row) {
  if (x.stride[1] == 1) prefetch<kWrite>(x.at(row), x.size[1] * static_cast<int64_t>(sizeof(T)));
}

// In lanes, then in order of the lanes.
template <class A>
HW_NOINLINE A inner_product(const A* x, const A* y, int64_t n) {
  Vec<A> lanes{};
  int64_t j = 0;
  for (; j + kLanes<A> <= n; j += kLanes<A>) lanes = fma(load(x + j), load(y + j), lanes);
  A total = sum<A>(lanes);
  for (; j < n; ++j) total += x[j] * y[j];
  return total;
}

}  // namespace
}  // namespace hw
