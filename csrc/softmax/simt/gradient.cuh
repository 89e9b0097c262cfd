// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores: from a tile's products to its gradients, for loops R2 and C.
//
//   s, p    from c_ij = <q_i, k_j> and the row statistic
//   ds      p (dp - D + dL), or a'(s) / n (dp - D), from dp_ij = <d_w_i, v_j>
//   dx, dc  ds (1 + gamma sign y) (1 - (y / cap)^2), dx scale tau_i
#pragma once

#include "softmax/simt/loop.cuh"

namespace hw::softmax::simt {

// What both backward kernels and that of a shared bias have in common.
template <class Element, ScoreKind Score, KeySource Source>
struct GradParams {
  BackwardParams b;
  Source source;
  Score score;
  OperandRows<Element> q, k, v, d_w;
  bool d_q_vectors, d_k_vectors, d_v_vectors;
  bool shared_bias;   // d_bias has a kernel of its own
  int64_t sequences;  // that it walks
  // Of sources that gather: d_q, or d_k and d_v, are of the accumulation type, to be added up.
  bool wide_rows, wide_keys;
  bool keys_per_query_head;     // d_k and d_v of each query head; else of key heads
  int key_owners, key_sharers;  // heads of d_k and d_v, query heads of each
  int64_t blocks;               // tiles of a head
  int64_t parts;                // of the columns of d_q, or of d_k and d_v
};

// One pair of row and key.
template <class A>
struct PairGradient {
  A c;       // <q, k>
  A p, ds;   // 0 where row and key do not meet
  A d_gain;  // ds |y|
  A dx, dc;  // dc = dx scale tau
  bool met;
};

// visit(r, u, gradient) over the thread's pairs; row r of c, dp and `sums` is at index 0 meanwhile.
template <class T, class Visit, class... Sums>
HW_DEVICE HW_INLINE void for_gradients(const T& tile, typename T::Micro& c, typename T::Micro& dp,
                                       const Visit& visit, Sums&... sums) {
  using A = typename T::A;
  const auto row = [&](int r) {
    HW_UNROLL
    for (int u = 0; u < T::kOther; ++u) {
      const Scored<A> e = tile.score(r, u, c[0][u]);
      PairGradient<A> g;
      g.c = c[0][u];
      g.p = e.met ? tile.weight(r, u, e.s) : A(0);
      g.ds = e.met && !e.set ? tile.weight_slope(r, u, e.s, g.p) * (dp[0][u] - tile.extra(r, u))
                             : A(0);
      g.d_gain = g.ds * tile.gain_row(r, u) * abs_of(e.y);
      g.dx = g.ds * tile.slope(e.y, e.gain);
      g.dc = g.dx * tile.factor(r, u);
      g.met = e.met;
      visit(r, u, g);
    }
  };
  each_row<T::kOwnSide / kLanes>(row, c, dp, sums...);
}

}  // namespace hw::softmax::simt
