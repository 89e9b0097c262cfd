// SPDX-License-Identifier: Apache-2.0
// What the CPU loops of linear attention do with one chunk of rows of one head.
//
// A chunk has n <= capacity rows. `ChunkOperands` is such a chunk of the query or of the key side,
// widened to the accumulation type A and laid out twice, because the products want both:
//   query side   x = pre(q)   value = g = do / z   extra = dz = -<do, o> / z
//   key side     x = pre(k)   value = v            extra = 1
// In every pass one side reads (a: rows of the output) and the other is summed over (b).
//
// Rows are vectors: arrays [features or dims, ld] have the n rows along the lanes, columns n .. ld
// are zero or finite, and sums over rows stop at n.
#pragma once

#include "ops/linear_attention/linear_attention.h"

#include "core/cpu/matmul.h"
#include "core/cpu/parallel.h"
#include "core/cpu/transpose.h"

namespace hw::linear_attention {
namespace {

// Sizes of a problem that all chunk work shares; "p" sizes are padded to whole vectors.
template <class A>
struct FeatureSizes {
  FeatureMap map;
  int d, dp, dv, dvp, features;
  int capacity;  // rows of a chunk
  int ld;        // distance of rows-along-lanes arrays; not a power of two when large
  A scale;

  FeatureSizes(FeatureMap map, int d, int dv, int capacity, double scale)
      : map(map),
        d(d),
        dp(round_up(d, kLanes<A>)),
        dv(dv),
        dvp(round_up(dv, kLanes<A>)),
        features(num_features(map, d)),
        capacity(capacity),
        ld(round_up(capacity, kLanes<A>) + (capacity > 64 ? kLanes<A> : 0)),
        scale(static_cast<A>(scale)) {}
};

// The factors c of the features; on the key side all are 1.
template <class A>
struct Coefficients {
  A linear, square, cross;
};

template <class A>
Coefficients<A> query_coefficients(const FeatureSizes<A>& s) {
  return {s.scale, s.scale * s.scale / 2, s.scale * s.scale};
}
template <class A>
Coefficients<A> key_coefficients(const FeatureSizes<A>&) {
  return {1, 1, 1};
}

template <class A>
struct ChunkOperands {
  A* xt;      // [D, ld]         pre-mapped q or k, rows along lanes
  A* x;       // [capacity, Dp]
  A* value;   // [capacity, Dvp]
  A* valuet;  // [Dv, ld]
  A* extra;   // [ld], zero beyond n
  Coefficients<A> c;

  static int64_t bytes(const FeatureSizes<A>& s) {
    return Scratch::bytes_of<A>(s.d * s.ld) + Scratch::bytes_of<A>(s.capacity * s.dp) +
           Scratch::bytes_of<A>(s.capacity * s.dvp) + Scratch::bytes_of<A>(s.dv * s.ld) +
           Scratch::bytes_of<A>(s.ld);
  }
  void take(Scratch& scratch, const FeatureSizes<A>& s) {
    xt = scratch.take<A>(s.d * s.ld);
    x = scratch.take<A>(s.capacity * s.dp);
    value = scratch.take<A>(s.capacity * s.dvp);
    valuet = scratch.take<A>(s.dv * s.ld);
    extra = scratch.take<A>(s.ld);
  }
};

// Columns n .. ld of `rows` rows-along-lanes rows become 0.
template <class A>
HW_NOINLINE void clear_tail(A* t, int rows, int n, int ld) {
  if (n == ld) return;
  for (int r = 0; r < rows; ++r)
    for (int i = n; i < ld; ++i) t[r * ld + i] = 0;
}

// Rows [begin, begin + n) of x [S, D] into side.x and side.xt, mapped by pre().
template <class T, class A>
HW_NOINLINE void pack_x(const FeatureSizes<A>& s, Ref<const T, 2> x, int64_t begin, int n,
                        int64_t ahead, ChunkOperands<A>& side) {
  for (int i = 0; i < n; ++i) {
    A* row = side.x + i * s.dp;
    prefetch_row(x, begin + i + ahead);
    widen(row, x.at(begin + i), s.d, x.stride[1]);
    if (s.map == FeatureMap::elu1 || s.map == FeatureMap::relu)
      for (int a = 0; a < s.d; ++a) row[a] = pre_map(s.map, row[a]);
  }
  clear_columns(side.x, s.dp, n, s.d, s.dp);
  transpose(side.x, s.dp, n, s.d, side.xt, s.ld);
  clear_tail(side.xt, s.d, n, s.ld);
}

// Rows of v [S, Dv] into side.value; extra = 1.
template <class T, class A>
HW_NOINLINE void pack_value(const FeatureSizes<A>& s, Ref<const T, 2> v, int64_t begin, int n,
                            int64_t ahead, ChunkOperands<A>& side) {
  for (int i = 0; i < n; ++i) {
    prefetch_row(v, begin + i + ahead);
    widen(side.value + i * s.dvp, v.at(begin + i), s.dv, v.stride[1]);
  }
  clear_columns(side.value, s.dvp, n, s.dv, s.dvp);
  for (int i = 0; i < s.ld; ++i) side.extra[i] = i < n ? A(1) : A(0);
}

// value = g = do / z and extra = dz = -<do, o> / z; without z (not normalised) g = do, dz = 0.
// `row` is a buffer of [Dvp].
template <class T, class A>
HW_NOINLINE void pack_cotangent(const FeatureSizes<A>& s, Ref<const T, 2> d_o, Ref<const T, 2> o,
                                Ref<const A, 1> z, int64_t begin, int n, int64_t ahead, A* row,
                                ChunkOperands<A>& side) {
  for (int i = 0; i < s.ld; ++i) side.extra[i] = 0;
  for (int i = 0; i < n; ++i) {
    A* g = side.value + i * s.dvp;
    prefetch_row(d_o, begin + i + ahead);
    widen(g, d_o.at(begin + i), s.dv, d_o.stride[1]);
    if (!z) continue;
    prefetch_row(o, begin + i + ahead);
    widen(row, o.at(begin + i), s.dv, o.stride[1]);
    const A z_i = z(begin + i);
    const A inverse = z_i != 0 ? 1 / z_i : A(0);
    const A dot = inner_product(g, row, s.dv);
    for (int j = 0; j < s.dv; ++j) g[j] *= inverse;
    side.extra[i] = -dot * inverse;
  }
  clear_columns(side.value, s.dvp, n, s.dv, s.dvp);
}

template <class A>
HW_NOINLINE void pack_value_transposed(const FeatureSizes<A>& s, int n, ChunkOperands<A>& side) {
  transpose(side.value, s.dvp, n, s.dv, side.valuet, s.ld);
  clear_tail(side.valuet, s.dv, n, s.ld);
}

// phi[f, i] = c_f m_f(x_i)        phi [F, ld]
template <class A>
HW_NOINLINE void expand(const FeatureSizes<A>& s, const Coefficients<A>& c, const A* __restrict xt,
                        int n, A* __restrict phi) {
  const int columns = round_up(n, kLanes<A>);
  const bool quadratic = s.map == FeatureMap::taylor2;
  for (int i = 0; i < columns; i += kLanes<A>) {
    A* to = phi + i;
    if (quadratic) {
      store(to, splat(A(1)));
      to += s.ld;
    }
    for (int a = 0; a < s.d; ++a, to += s.ld) store(to, c.linear * load(xt + a * s.ld + i));
    if (!quadratic) continue;
    for (int a = 0; a < s.d; ++a) {
      const Vec<A> x_a = load(xt + a * s.ld + i), cross = c.cross * x_a;
      store(to, c.square * x_a * x_a);
      to += s.ld;
      for (int b = a + 1; b < s.d; ++b, to += s.ld) store(to, cross * load(xt + b * s.ld + i));
    }
  }
}

// The chain through expand: dx[a, i] = sum_f d[f, i] d phi_f / d x_a, d = dphi + z extra
// z [F], extra [ld]       dxt [D, ld]
template <class A>
HW_NOINLINE void contract(const FeatureSizes<A>& s, const Coefficients<A>& c,
                          const A* __restrict xt, int n, const A* __restrict dphi,
                          const A* __restrict z, const A* __restrict extra, A* __restrict dxt) {
  const int columns = round_up(n, kLanes<A>);
  const bool quadratic = s.map == FeatureMap::taylor2;
  for (int i = 0; i < columns; i += kLanes<A>) {
    int f = quadratic ? 1 : 0;
    const Vec<A> of_row = load(extra + i);
    const auto next = [&] {
      const Vec<A> d = fma(splat(z[f]), of_row, load(dphi + f * s.ld + i));
      ++f;
      return d;
    };
    for (int a = 0; a < s.d; ++a) store(dxt + a * s.ld + i, c.linear * next());
    if (!quadratic) continue;
    for (int a = 0; a < s.d; ++a) {
      const Vec<A> x_a = load(xt + a * s.ld + i), cross = c.cross * x_a;
      Vec<A> d_a = load(dxt + a * s.ld + i) + 2 * c.square * x_a * next(), d_cross{};
      for (int b = a + 1; b < s.d; ++b) {
        A* d_b = dxt + b * s.ld + i;
        const Vec<A> d_phi = next();
        d_cross = fma(load(xt + b * s.ld + i), d_phi, d_cross);
        store(d_b, fma(cross, d_phi, load(d_b)));
      }
      d_a = fma(splat(c.cross), d_cross, d_a);
      store(dxt + a * s.ld + i, d_a);
    }
  }
}

// out[f] += sum_{i < n} phi[f, i] extra[i]        out [F], of whole vectors
template <class A>
HW_NOINLINE void add_rows(const FeatureSizes<A>& s, const A* phi, const A* extra, int n, A* out) {
  constexpr int kSide = kLanes<A>;
  const int columns = round_up(n, kSide);
  for (int f = 0; f < s.features; f += kSide) {
    Vec<A> totals[kSide];
    HW_UNROLL for (int r = 0; r < kSide; ++r) {
      totals[r] = Vec<A>{};
      for (int i = 0; i < columns && f + r < s.features; i += kSide)
        totals[r] = fma(load(phi + (f + r) * s.ld + i), load(extra + i), totals[r]);
    }
    store(out + f, load(out + f) + sums<A>(totals));
  }
}

// Which columns of b a row of a sees inside a chunk.
enum class Visible { all, upto, from };  // every b;  b <= a (causal forward);  b >= a (reversed)

struct Range {
  int begin, end;
};

constexpr Range columns_of(Visible visible, int row_begin, int row_end, int n) {
  if (visible == Visible::upto) return {0, row_end};
  if (visible == Visible::from) return {row_begin, n};
  return {0, n};
}

// Zeroes the invisible elements of tile [row_end - row_begin, columns], whose column 0 is column
// `columns.begin` of the chunk.
template <class A>
HW_NOINLINE void mask(Visible visible, int row_begin, int row_end, Range columns, A* tile,
                      int64_t ld) {
  for (int a = row_begin; a < row_end && visible != Visible::all; ++a) {
    A* row = tile + (a - row_begin) * ld;
    const Range hidden =
        visible == Visible::upto ? Range{a + 1, columns.end} : Range{columns.begin, a};
    for (int b = hidden.begin; b < hidden.end; ++b) row[b - columns.begin] = 0;
  }
}

}  // namespace
}  // namespace hw::linear_attention
