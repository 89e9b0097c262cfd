// SPDX-License-Identifier: Apache-2.0
// Linear attention without tensor cores: the pieces that all kernels are made of.
//
//   loading      rows of q, k (transposed, pre-mapped, q times scale), rows of v, g = do / z
//   scores       s_ij = <a_i, b_j>                             rows 16 apart, inner rows 8 apart
//   dot          <y_i, x_j>, or <y_i, S_f>                     the same ownership
//   add_outer    acc[i, c] += left_i right_c                   rows 2g, 2g + 1; columns together
//   read_state   acc[i, c] += sum_f c_f m_f(a_i) S[f, c]
//   add_to_state S[f, c] += sum_j c_f m_f(b_j) x[j, c]
//
// With q' times scale the coefficients c of linear_attention.h are 1, but 1/2 for the squares of
// taylor2 on the query side (`kQuery`). Every sum has one order, fixed by the shapes.
#pragma once

#include "ops/linear_attention/linear_attention_simt_layout.h"

#include "core/dtype.h"
#include "core/gpu/device.cuh"
#include "core/gpu/vector.h"
#include "core/math.h"
#include "core/ref.h"

namespace hw::linear_attention::simt {

// The place of the calling thread.
HW_DEVICE HW_INLINE int row_group() { return dev::thread_index() / kLanes; }
HW_DEVICE HW_INLINE int column_lane() { return dev::thread_index() % kLanes; }

// ---- Global memory ------------------------------------------------------------------------------

// put(c, x) for columns c < width of a row, shared among 8 lanes; columns from `available` on, and
// all of them if the row is not `valid`, are zero.
template <class Element, class Put>
HW_DEVICE HW_INLINE void load_row(const Element* row, int64_t stride, bool vectors, bool valid,
                                  int available, int width, const Put& put) {
  using Acc = Accum<Element>;
  constexpr int kVector = 16 / static_cast<int>(sizeof(Element));
  const int end = valid ? min_of(available, width) : 0;
  if (vectors) {
    for (int c = column_lane() * kVector; c < width; c += kLanes * kVector) {
      Vec<Element, kVector> x = {};
      if (c < end) x = load_vector<kVector>(row + c);
      HW_UNROLL
      for (int i = 0; i < kVector; ++i) put(c + i, static_cast<Acc>(x.v[i]));
    }
    return;
  }
  for (int c = column_lane(); c < width; c += kLanes) {
    put(c, c < end ? static_cast<Acc>(row[c * stride]) : Acc(0));
  }
}

// q with do and z, or k with v: what a kernel needs to know of the outer and of the inner rows.
template <class Element>
struct OperandRows {
  using Acc = Accum<Element>;
  Ref<const Element, 4> key;    // [B, S, heads, D]    q or k
  Ref<const Element, 4> value;  // [B, S, heads, Dv]   do or v; absent where not needed
  Ref<const Acc, 3> z;          // [B, S, heads]       queries, normalised: g = do / z
  const Acc* d_z = nullptr;     // [B, S, heads]       queries, normalised, backward
  bool query = false;
  bool key_vectors = false, value_vectors = false;
};

template <class Element>
OperandRows<Element> operand_rows(const Ref<const void, 4>& key, const Ref<const void, 4>& value,
                                  bool query) {
  OperandRows<Element> s;
  s.key = key.as<const Element>();
  s.value = value.as<const Element>();
  s.query = query;
  s.key_vectors = has_vectors(s.key);
  s.value_vectors = has_vectors(s.value);
  return s;
}

// Up to kRows rows of one head from row `first`; rows from `end` on count as zero.
struct TileRows {
  int64_t batch, first, end;
  int head;

  HW_DEVICE HW_INLINE bool valid(int row) const { return first + row < end; }
};

// tile[a][row] = pre(key[row, column + a]) (times scale for q), a < count; tile[ones][row] = 1.
template <class Element, class Acc = Accum<Element>>
HW_DEVICE HW_INLINE void load_keys(Acc* tile, const OperandRows<Element>& side, FeatureMap map,
                                   Acc scale, const TileRows& rows, int column, int count,
                                   int ones) {
  const Acc factor = side.query ? scale : Acc(1);
  // The columns of a row are a loop: unrolled, rows are more code, but not more loads in flight.
  HW_UNROLL_BY(1)
  for (int row = row_group(); row < kRows; row += kGroups) {
    const bool valid = rows.valid(row);
    const Element* from =
        valid ? side.key.at(rows.batch, rows.first + row, rows.head, column) : nullptr;
    load_row(from, side.key.stride[3], side.key_vectors, valid, count, count, [&](int a, Acc x) {
      tile[a * kRowStride<Acc> + row] = valid ? pre_map(map, x) * factor : Acc(0);
    });
    if (column_lane() == 0) tile[ones * kRowStride<Acc> + row] = Acc(1);
  }
}

// tile[row][c] = value[row, column + c] (of queries: divided by z), c < kColumns; and extra[row],
// the companion of z: 1 for keys, dz for queries.
template <int kColumns, class Element, class Acc = Accum<Element>>
HW_DEVICE HW_INLINE void load_values(Acc* tile, Acc* extra, const OperandRows<Element>& side,
                                     const TileRows& rows, int column) {
  const int available = static_cast<int>(side.value.size[3]) - column;
  HW_UNROLL_BY(1)
  for (int row = row_group(); row < kRows; row += kGroups) {
    const bool valid = rows.valid(row);
    const int64_t at = rows.first + row;
    Acc factor = 1, companion = valid && !side.query ? Acc(1) : Acc(0);
    if (valid && side.z) {
      const Acc z = side.z(rows.batch, at, rows.head);
      factor = z == Acc(0) ? Acc(0) : Acc(1) / z;
    }
    if (valid && side.d_z) {
      companion = side.d_z[(rows.batch * side.key.size[1] + at) * side.key.size[2] + rows.head];
    }
    const Element* from = valid ? side.value.at(rows.batch, at, rows.head, column) : nullptr;
    load_row(from, side.value.stride[3], side.value_vectors, valid, available, kColumns,
             [&](int c, Acc x) {
               tile[row * (kColumns + kPad<Acc>)+c] = factor == Acc(0) ? Acc(0) : x * factor;
             });
    if (column_lane() == 0) extra[row] = companion;
  }
}

// ---- Features -----------------------------------------------------------------------------------

// The columns whose product is feature f of a tile; `ones` stands for the constant 1.
HW_HOST_DEVICE inline FeaturePair feature_pair(FeatureMap map, int dim, int ones, int f) {
  const auto pair = [](int a, int b) {
    return FeaturePair{static_cast<uint8_t>(a), static_cast<uint8_t>(b)};
  };
  if (map != FeatureMap::taylor2) return pair(f, ones);
  if (f == 0) return pair(ones, ones);
  if (f <= dim) return pair(f - 1, ones);
  int a = 0, rest = f - 1 - dim;
  for (; rest >= dim - a; ++a) rest -= dim - a;
  return pair(a, a + rest);
}

HW_DEVICE HW_INLINE void make_pairs(FeaturePair* pairs, FeatureMap map, int dim, int count) {
  for (int f = dev::thread_index(); f < count; f += kThreads) {
    pairs[f] = feature_pair(map, dim, dim, f);
  }
}

// c_f, given that q' carries the scale.
template <bool kQuery, class Acc>
HW_DEVICE HW_INLINE Acc coefficient(FeaturePair p, int ones) {
  return kQuery && p.a == p.b && p.a != ones ? Acc(0.5) : Acc(1);
}

// ---- Products -----------------------------------------------------------------------------------

template <class Acc, int kCount>
HW_DEVICE HW_INLINE void clear(Acc (&acc)[2][kCount]) {
  HW_UNROLL
  for (int i = 0; i < 2 * kCount; ++i) acc[i / kCount][i % kCount] = Acc(0);
}

// acc[r][u] += left[r] * right[u]; `right` points at the thread's own columns.
template <int kCount, class Acc>
HW_DEVICE HW_INLINE void add_outer(Acc (&acc)[2][kCount], Acc left0, Acc left1, const Acc* right) {
  const auto x = load_vector<kCount>(right);
  HW_UNROLL
  for (int u = 0; u < kCount; ++u) {
    acc[0][u] += left0 * x.v[u];
    acc[1][u] += left1 * x.v[u];
  }
}

// Inner rows that an outer row meets in a tile: all, those up to it, those from it on.
enum class Mask : int { all = 0, up_to = 1, from = 2 };

HW_DEVICE HW_INLINE bool meets(Mask mask, int outer, int inner) {
  return mask == Mask::all || (mask == Mask::up_to ? inner <= outer : inner >= outer);
}

// acc[r][u] += sum_n weights[n][2g + r] * right(n)[u] over the inner rows n that row 2g + r meets.
// What it does not meet is not read: a NaN in the future stays there.
template <int kCount, class Acc, class Right>
HW_DEVICE HW_INLINE void add_weighted(Acc (&acc)[2][kCount], Mask mask, const Acc* weights,
                                      const Right& right) {
  const int row = 2 * row_group();
  weights += row;
  const int begin = mask == Mask::from ? row + 1 : 0;
  const int end = mask == Mask::up_to ? row + 1 : kRows;
  HW_UNROLL_BY(4)
  for (int n = begin; n < end; ++n) {
    const auto w = load_vector<2>(weights + n * kRowStride<Acc>);
    const auto x = right(n);
    HW_UNROLL
    for (int u = 0; u < kCount; ++u) {
      acc[0][u] += w.v[0] * x.v[u];
      acc[1][u] += w.v[1] * x.v[u];
    }
  }
  if (mask == Mask::up_to) {  // row 2g + 1 meets itself
    const Acc w = weights[(row + 1) * kRowStride<Acc> + 1];
    const auto x = right(row + 1);
    HW_UNROLL
    for (int u = 0; u < kCount; ++u) acc[1][u] += w * x.v[u];
  }
  if (mask == Mask::from) {  // row 2g meets itself
    const Acc w = weights[row * kRowStride<Acc>];
    const auto x = right(row);
    HW_UNROLL
    for (int u = 0; u < kCount; ++u) acc[0][u] += w * x.v[u];
  }
}

// acc[r][u] = sum_a outer[a][g + 16 r] * inner[a][lane + 8 u]
template <class Acc>
HW_DEVICE HW_INLINE void add_scores(Acc (&acc)[2][4], const Acc* outer, const Acc* inner,
                                    int count) {
  outer += row_group();
  inner += column_lane();
  HW_UNROLL_BY(4)
  for (int a = 0; a < count; ++a, outer += kRowStride<Acc>, inner += kRowStride<Acc>) {
    const Acc left0 = outer[0], left1 = outer[kGroups];
    HW_UNROLL
    for (int u = 0; u < 4; ++u) {
      const Acc right = inner[kLanes * u];
      acc[0][u] += left0 * right;
      acc[1][u] += left1 * right;
    }
  }
}

// acc[r][u] += sum_c left[g + 16 r][c] * right_u[c], c < kColumns; right_u is row `lane + 8 u` of
// `right`, at most row `last`.
template <int kColumns, class Acc>
HW_DEVICE HW_INLINE void add_dot(Acc (&acc)[2][4], const Acc* left, const Acc* right,
                                 int64_t right_stride, int last) {
  constexpr int kStep = kPad<Acc>;
  left += row_group() * (kColumns + kPad<Acc>);
  const Acc* rows[4];
  HW_UNROLL
  for (int u = 0; u < 4; ++u) {
    rows[u] = right + min_of(column_lane() + kLanes * u, last) * right_stride;
  }
  HW_UNROLL_BY(2)
  for (int c = 0; c < kColumns; c += kStep) {
    const auto left0 = load_vector<kStep>(left + c);
    const auto left1 = load_vector<kStep>(left + kGroups * (kColumns + kPad<Acc>)+c);
    HW_UNROLL
    for (int u = 0; u < 4; ++u) {
      const auto x = load_vector<kStep>(rows[u] + c);
      HW_UNROLL
      for (int i = 0; i < kStep; ++i) {
        acc[0][u] += left0.v[i] * x.v[i];
        acc[1][u] += left1.v[i] * x.v[i];
      }
    }
  }
}

// acc[r][u] += sum_f c_f m_f(outer row 2g + r) * state[f][own columns]. taylor2 walks its triangle
// in the order of the features, so that nothing is looked up.
template <bool kQuery, int kCount, class Acc>
HW_DEVICE HW_INLINE void read_state(Acc (&acc)[2][kCount], FeatureMap map, int dim,
                                    const Acc* outer, const Acc* state, int64_t stride) {
  const Acc* x = outer + 2 * row_group();
  state += column_lane() * kCount;
  const auto row = [&](int a) { return load_vector<2>(x + a * kRowStride<Acc>); };
  const auto next = [&](Acc left0, Acc left1) {
    add_outer(acc, left0, left1, state);
    state += stride;
  };
  if (map == FeatureMap::taylor2) next(Acc(1), Acc(1));
  HW_UNROLL_BY(4)
  for (int a = 0; a < dim; ++a) {
    const auto xa = row(a);
    next(xa.v[0], xa.v[1]);
  }
  if (map != FeatureMap::taylor2) return;
  for (int a = 0; a < dim; ++a) {
    const auto xa = row(a);
    const Acc square = kQuery ? Acc(0.5) : Acc(1);
    next(square * xa.v[0] * xa.v[0], square * xa.v[1] * xa.v[1]);
    HW_UNROLL_BY(4)
    for (int b = a + 1; b < dim; ++b) {
      const auto xb = row(b);
      next(xa.v[0] * xb.v[0], xa.v[1] * xb.v[1]);
    }
  }
}

// sum[r] += the thread's share (features = lane modulo 8) of sum_f c_f m_f(row 2g + r) z[f].
template <bool kQuery, class Acc>
HW_DEVICE HW_INLINE void read_z(Acc (&sum)[2], const FeaturePair* pairs, int count, int ones,
                                const Acc* outer, const Acc* z) {
  const Acc* x = outer + 2 * row_group();
  for (int f = column_lane(); f < count; f += kLanes) {
    const FeaturePair p = pairs[f];
    const auto xa = load_vector<2>(x + p.a * kRowStride<Acc>);
    const auto xb = load_vector<2>(x + p.b * kRowStride<Acc>);
    const Acc zf = coefficient<kQuery, Acc>(p, ones) * z[f];
    sum[0] += xa.v[0] * xb.v[0] * zf;
    sum[1] += xa.v[1] * xb.v[1] * zf;
  }
}

// state[f][c] += sum_j c_f m_f(inner row j) values[j][c] for the features of one tile, and
// z[f] += sum_j c_f m_f(inner row j) extra[j] if `z` is not null.
template <bool kQuery, int kColumns, class Acc>
HW_DEVICE HW_INLINE void add_to_state(Acc* state, int64_t stride, Acc* z, const FeaturePair* pairs,
                                      int count, int ones, const Acc* inner, const Acc* values,
                                      const Acc* extra) {
  constexpr int kCount = kColumns / kLanes, kBlock = kCount > 1 ? 2 : 4, kStep = 4;
  const int column = column_lane() * kCount;
  for (int first = 0; first < count; first += kBlock * kGroups) {
    Acc acc[kBlock][kCount] = {}, acc_z[kBlock] = {};
    const Acc *a[kBlock], *b[kBlock];
    HW_UNROLL
    for (int n = 0; n < kBlock; ++n) {
      const FeaturePair p = pairs[min_of(first + row_group() + n * kGroups, count - 1)];
      a[n] = inner + p.a * kRowStride<Acc>;
      b[n] = inner + p.b * kRowStride<Acc>;
    }
    HW_UNROLL_BY(2)
    for (int j = 0; j < kRows; j += kStep) {
      Acc x[kStep][kCount];
      HW_UNROLL
      for (int i = 0; i < kStep; ++i) {
        const auto loaded = load_vector<kCount>(values + (j + i) * (kColumns + kPad<Acc>)+column);
        HW_UNROLL
        for (int u = 0; u < kCount; ++u) x[i][u] = loaded.v[u];
      }
      HW_UNROLL
      for (int n = 0; n < kBlock; ++n) {
        HW_UNROLL
        for (int i = 0; i < kStep; i += kPad<Acc>) {
          const auto xa = load_vector<kPad<Acc>>(a[n] + j + i);
          const auto xb = load_vector<kPad<Acc>>(b[n] + j + i);
          HW_UNROLL
          for (int e = 0; e < kPad<Acc>; ++e) {
            const Acc m = xa.v[e] * xb.v[e];
            HW_UNROLL
            for (int u = 0; u < kCount; ++u) acc[n][u] += m * x[i + e][u];
          }
        }
      }
    }
    if (z) {  // each of the 8 lanes takes 4 inner rows
      HW_UNROLL
      for (int n = 0; n < kBlock; ++n) {
        const int j = column_lane() * kStep;
        HW_UNROLL
        for (int i = 0; i < kStep; ++i) acc_z[n] += a[n][j + i] * b[n][j + i] * extra[j + i];
        acc_z[n] = dev::warp_sum<kLanes>(acc_z[n]);
      }
    }
    HW_UNROLL
    for (int n = 0; n < kBlock; ++n) {
      const int f = first + row_group() + n * kGroups;
      if (f >= count) continue;
      const Acc c = coefficient<kQuery, Acc>(pairs[f], ones);
      HW_UNROLL
      for (int u = 0; u < kCount; ++u) state[f * stride + column + u] += c * acc[n][u];
      if (z && column_lane() == 0) z[f] += c * acc_z[n];
    }
  }
}

}  // namespace hw::linear_attention::simt
