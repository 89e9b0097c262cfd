// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores: the pieces that all loops are made of.
//
//   sees             whether a row sees a key, by their positions
//   load_slice       buffer[i][c] = x[row i, column + c]
//   add_dot          acc[r][u] += <own row g + 16 r, other row l + 16 u>
//   add_weighted     acc[r][c] += sum_j weights[own row g + 16 r][j] x[j, columns V l + c]
//   each_row         the rows of a thread, one after another
//
// Thread (g, l) of 16 x 16 is the same in all of them, so weights pass only among the 16 lanes that
// share g, half a warp. Every sum has one order, fixed by the shapes.
#pragma once

#include "softmax/key_source.h"
#include "softmax/simt/layout.h"

#include "core/dtype.h"
#include "core/gpu/device.cuh"
#include "core/gpu/vector.h"

namespace hw::softmax::simt {

// The place of the calling thread: g along the own side, l along the other.
HW_DEVICE HW_INLINE int own_lane() { return dev::thread_index() / kLanes; }
HW_DEVICE HW_INLINE int other_lane() { return dev::thread_index() % kLanes; }

HW_DEVICE HW_INLINE bool sees(const Mask& mask, int64_t row, int64_t key) {
  const Range seen = mask.visible_keys(row);
  return key >= seen.begin && key < seen.end;
}

// ---- Loading ------------------------------------------------------------------------------------

// A tensor whose rows go to a buffer.
template <class Element>
struct OperandRows {
  Ref<const Element, 4> x;  // [B, S, heads, width]
  bool vectors = false;     // rows can be read 16 bytes at a time

  HW_HOST_DEVICE int width() const { return static_cast<int>(x.size[3]); }
  HW_HOST_DEVICE int slices() const { return slices_of<Accum<Element>>(x.size[3]); }
};

template <class Element>
OperandRows<Element> operand_rows(const Ref<const void, 4>& x) {
  const Ref<const Element, 4> typed = x.as<const Element>();
  return {typed, x && has_vectors(typed)};
}

// buffer[i][c] = x[row_of(i), column + c] for i < kRows; zero from row `count` and x's last column
// on and, with kGaps, where row_of is negative. Returns, with kVote, whether the thread saw
// anything but zeros.
template <int kRows, bool kVote, bool kGaps, class Element, class RowOf>
HW_DEVICE HW_INLINE bool load_slice(Accum<Element>* buffer, const OperandRows<Element>& from,
                                    int64_t batch, int head, int column, int count,
                                    const RowOf& row_of) {
  using A = Accum<Element>;
  const int width = min_of(from.width() - column, kSide<A>);
  bool some = false;
  if (from.vectors) {
    constexpr int kTogether = 16 / static_cast<int>(sizeof(Element));
    // Two loads a thread are in flight: more would cost registers where sums are held.
    constexpr int kGroups = kSide<A> / kTogether, kBatch = 2;
    HW_UNROLL_BY(1)
    for (int first = dev::thread_index(); first < kRows * kGroups; first += kBatch * kThreads) {
      Vec<Element, kTogether> x[kBatch] = {};
      HW_UNROLL
      for (int n = 0; n < kBatch; ++n) {
        const int i = (first + n * kThreads) / kGroups, c = first % kGroups * kTogether;
        if (i >= count || c >= width) continue;
        const int64_t row = row_of(i);
        if (!kGaps || row >= 0)
          x[n] = load_vector<kTogether>(from.x.at(batch, row, head, column + c));
      }
      HW_UNROLL
      for (int n = 0; n < kBatch; ++n) {
        const int i = (first + n * kThreads) / kGroups, c = first % kGroups * kTogether;
        if (i >= kRows) continue;
        HW_UNROLL
        for (int e = 0; e < kTogether; e += kVector<A>) {
          Vec<A, kVector<A>> wide;
          HW_UNROLL
          for (int v = 0; v < kVector<A>; ++v) {
            wide.v[v] = static_cast<A>(x[n].v[e + v]);
            if constexpr (kVote) some |= wide.v[v] != A(0);
          }
          store_vector(buffer + i * kStride<A> + c + e, wide);
        }
      }
    }
    return some;
  }
  HW_UNROLL_BY(1)
  for (int index = dev::thread_index(); index < kRows * kSide<A>; index += kThreads) {
    const int i = index / kSide<A>, c = index % kSide<A>;
    A wide = 0;
    if (i < count && c < width && (!kGaps || row_of(i) >= 0))
      wide = static_cast<A>(*from.x.at(batch, row_of(i), head, column + c));
    buffer[i * kStride<A> + c] = wide;
    if constexpr (kVote) some |= wide != A(0);
  }
  return some;
}

// ---- Products -----------------------------------------------------------------------------------

template <class A, int kOwn>
HW_DEVICE HW_INLINE void clear(A (&x)[kOwn][kVector<A>]) {
  HW_UNROLL
  for (int i = 0; i < kOwn * kVector<A>; ++i) x[i / kVector<A>][i % kVector<A>] = A(0);
}

template <class A, int kOwn>
HW_DEVICE HW_INLINE void add_dot(A (&acc)[kOwn][kVector<A>], const A* own, const A* other,
                                 int columns) {
  constexpr int kV = kVector<A>;
  own += own_lane() * kStride<A>;
  other += other_lane() * kStride<A>;
  HW_UNROLL_BY(1)
  for (int a = 0; a < columns; a += kV) {
    Vec<A, kV> y[kV];
    HW_UNROLL
    for (int u = 0; u < kV; ++u) y[u] = load_vector<kV>(other + u * kLanes * kStride<A> + a);
    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      const auto x = load_vector<kV>(own + r * kLanes * kStride<A> + a);
      HW_UNROLL
      for (int u = 0; u < kV; ++u) {
        HW_UNROLL
        for (int i = 0; i < kV; ++i) acc[r][u] += x.v[i] * y[u].v[i];
      }
    }
  }
}

// Rows of x from `others` on are multiplied by weights that are zero, up to a whole vector. Columns
// that x lacks are zeros.
template <class A, int kOwn>
HW_DEVICE HW_INLINE void add_weighted(A (&acc)[kOwn][kVector<A>], const A* weights, const A* x,
                                      int others) {
  constexpr int kV = kVector<A>;
  weights += own_lane() * kStride<A>;
  x += other_lane() * kV;
  HW_UNROLL_BY(1)
  for (int j = 0; j < others; j += kV) {
    Vec<A, kV> row[kV];
    HW_UNROLL
    for (int i = 0; i < kV; ++i) row[i] = load_vector<kV>(x + (j + i) * kStride<A>);
    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      const auto w = load_vector<kV>(weights + r * kLanes * kStride<A> + j);
      HW_UNROLL
      for (int i = 0; i < kV; ++i) {
        HW_UNROLL
        for (int c = 0; c < kV; ++c) acc[r][c] += w.v[i] * row[i].v[c];
      }
    }
  }
}

// ---- Rows of a thread ---------------------------------------------------------------------------

// Register arrays [rows of a thread] that take turns: the row at work is always row 0.
template <class A, int N>
HW_DEVICE HW_INLINE void turn(A (&x)[N]) {
  const A first = x[0];
  HW_UNROLL
  for (int i = 0; i + 1 < N; ++i) x[i] = x[i + 1];
  x[N - 1] = first;
}
template <class A, int N, int M>
HW_DEVICE HW_INLINE void turn(A (&x)[N][M]) {
  HW_UNROLL
  for (int u = 0; u < M; ++u) {
    const A first = x[0][u];
    HW_UNROLL
    for (int i = 0; i + 1 < N; ++i) x[i][u] = x[i + 1][u];
    x[N - 1][u] = first;
  }
}

// visit(r) for the kOwn rows of a thread, whose elements of `arrays` are then at index 0. A loop
// that is not unrolled: what happens to a score is a hundred instructions, and registers are
// scarce.
template <int kOwn, class Visit, class... Arrays>
HW_DEVICE HW_INLINE void each_row(const Visit& visit, Arrays&... arrays) {
  HW_UNROLL_BY(1)
  for (int r = 0; r < kOwn; ++r) {
    visit(r);
    (turn(arrays), ...);
  }
}

}  // namespace hw::softmax::simt
