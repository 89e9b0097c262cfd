// SPDX-License-Identifier: Apache-2.0
// The cascade of a window on the CPU, all of it in the caches; the mathematics is in
// cascaded_group_attention.h.
//
// Tokens are rows and channels lanes, but for the scores: S^T has a row of each key and a lane of
// each query, so that a softmax adds and compares whole vectors, and o = (S^T)^T v reads them as a
// transposed operand. Queries come in blocks of kBlock, of which scores stay in L1.
#pragma once

#include <cmath>

#include "ops/cascaded_group_attention/cascaded_group_attention_cpu_weights.h"

#include "core/cpu/matmul.h"
#include "core/cpu/simd_math.h"
#include "core/cpu/transpose.h"

namespace hw::cascaded_group_attention {
namespace {

constexpr int kBlock = 64;  // queries

// What is added to a product on its way into C.
template <class A>
struct LaneTerms {
  const A* term;  // [n]

  HW_INLINE Vec<A> operator()(Vec<A> x, int lane) const { return x + load(term + lane); }
  HW_INLINE LaneTerms from(int lane) const { return {term + lane}; }
};

// Of kVectors vectors of queries: s [keys] becomes e^{s + t - max}; inverse the sums' inverses.
template <int kVectors, class A>
HW_INLINE void softmax_strip(A* s, const A* t, int64_t t_ld, int keys, A* inverse) {
  Vec<A> most[kVectors], total[kVectors];
  HW_UNROLL for (int v = 0; v < kVectors; ++v) {
    most[v] = splat(-std::numeric_limits<A>::infinity());
    total[v] = Vec<A>{};
  }
  for (int j = 0; j < keys; ++j) {
    HW_UNROLL for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes<A>;
      most[v] = larger(most[v], load(s + j * kBlock + at) + load(t + j * t_ld + at));
    }
  }
  for (int j = 0; j < keys; ++j) {
    HW_UNROLL for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes<A>;
      const Vec<A> e = exp_of(load(s + j * kBlock + at) + load(t + j * t_ld + at) - most[v]);
      store(s + j * kBlock + at, e);
      total[v] += e;
    }
  }
  HW_UNROLL for (int v = 0; v < kVectors; ++v) store(inverse + v * kLanes<A>, A(1) / total[v]);
}

template <int kVectors = 4, class A>
HW_NOINLINE void softmax(A* s, const A* t, int64_t t_ld, int keys, int queries, A* inverse) {
  constexpr int kWidth = kVectors * kLanes<A>;
  for (; queries >= kWidth; queries -= kWidth, s += kWidth, t += kWidth, inverse += kWidth)
    softmax_strip<kVectors>(s, t, t_ld, keys, inverse);
  if constexpr (kVectors > 1)
    if (queries > 0) softmax<kVectors / 2>(s, t, t_ld, keys, queries, inverse);
}

template <class T>
class Window {
 public:
  using A = Accum<T>;
  static constexpr int kLane = kLanes<A>;

  static int64_t bytes(const Shape<A>& n) {
    const auto of = [](int64_t count) { return Scratch::bytes_of<A>(count); };
    const int64_t tokens = n.tokens;
    return of(tokens * n.padded_group) + of(tokens * n.projected) + of(plane_size(n)) +
           of(tokens * n.padded_keys) + of(int64_t{n.padded_keys} * n.padded_tokens) +
           of(tokens * kBlock) + of(int64_t{kBlock} * n.padded_group) + of(kBlock);
  }

  Window(const Shape<A>& sizes, const Weights<T>& weights, Scratch& scratch)
      : n_(sizes), w_(weights), scale_(A(1) / std::sqrt(static_cast<A>(n_.keys))) {
    const int64_t tokens = n_.tokens;
    f_ = scratch.take<A>(tokens * n_.padded_group);
    qkv_ = scratch.take<A>(tokens * n_.projected);
    plane_ = scratch.take<A>(plane_size(n_));
    q_ = scratch.take<A>(tokens * n_.padded_keys);
    q_columns_ = scratch.take<A>(int64_t{n_.padded_keys} * n_.padded_tokens);
    s_ = scratch.take<A>(tokens * kBlock);
    o_ = scratch.take<A>(int64_t{kBlock} * n_.padded_group);
    inverse_ = scratch.take<A>(kBlock);
    std::fill_n(plane_, plane_size(n_), A(0));  // what lies beside the window stays 0
    std::fill_n(q_columns_, int64_t{n_.padded_keys} * n_.padded_tokens, A(0));
  }

  // x: [C] of each token; relu of [o_0 .. o_{H-1}] goes to out, [C] of each token, or null.
  void run(const A* const* x, A* const* out) {
    for (int t = 0; t < n_.tokens; ++t) widen(f_ + int64_t{t} * n_.padded_group, x[t], n_.group);
    for (int head = 0; head < n_.heads; ++head) {
      project(head);
      convolve(head);
      for (int first = 0; first < n_.tokens; first += kBlock) attend(head, first, x, out);
    }
  }

 private:
  static int64_t plane_size(const Shape<A>& n) {
    return int64_t{n.height} * (n.width + 2 * (n.kernel / 2)) * n.padded_keys;
  }

  HW_NOINLINE void project(int head) {
    const Matrix<A> weight = w_.qkv(head);
    multiply<false>(n_.tokens, n_.projected, n_.group,
                    row_major(static_cast<const A*>(f_), n_.padded_group), weight.data, weight.ld,
                    qkv_, n_.projected, LaneTerms<A>{w_.qkv_bias(head)});
  }

  // q over the window, scaled, to q_columns [K, N].
  HW_NOINLINE void convolve(int head) {
    const int line = n_.width + 2 * (n_.kernel / 2), keys = n_.padded_keys;
    for (int y = 0, t = 0; y < n_.height; ++y) {
      A* row = plane_ + (int64_t{y} * line + n_.kernel / 2) * keys;
      for (int x = 0; x < n_.width; ++x, ++t)
        widen(row + x * keys, qkv_ + int64_t{t} * n_.projected, keys);
    }
    for (int c = 0; c < keys; c += kLane)
      for (int y = 0; y < n_.height; ++y) convolve_row(head, y, 0, n_.width, c);
    hw::transpose(q_, n_.padded_keys, n_.tokens, n_.keys, q_columns_, n_.padded_tokens);
  }

  // `count` tokens of a row from x on, kTokens at a time.
  template <int kTokens = 8>
  HW_INLINE void convolve_row(int head, int y, int x, int count, int c) {
    for (; count >= kTokens; count -= kTokens, x += kTokens)
      convolve_tokens<kTokens>(head, y, x, c);
    if constexpr (kTokens > 1)
      if (count > 0) convolve_row<kTokens - 1>(head, y, x, count, c);
  }

  template <int kTokens>
  HW_NOINLINE void convolve_tokens(int head, int y, int x, int c) {
    const int reach = w_.radius(head), middle = n_.kernel / 2, keys = n_.padded_keys;
    const int line = n_.width + 2 * middle;
    Vec<A> sum[kTokens];
    HW_UNROLL for (int i = 0; i < kTokens; ++i) sum[i] = load(w_.conv_bias(head) + c);
    const int last = std::min(reach, n_.height - 1 - y);
    for (int dy = std::max(-reach, -y); dy <= last; ++dy) {
      const A* from = plane_ + (int64_t{y + dy} * line + x + middle - reach) * keys + c;
      const A* tap = w_.tap(head, dy, -reach) + c;
      for (int dx = -reach; dx <= reach; ++dx, from += keys, tap += keys) {
        const Vec<A> weight = load(tap);
        HW_UNROLL for (int i = 0; i < kTokens; ++i) sum[i] =
            fma(weight, load(from + i * keys), sum[i]);
      }
    }
    A* to = q_ + int64_t{y * n_.width + x} * keys + c;
    HW_UNROLL for (int i = 0; i < kTokens; ++i) store(to + i * keys, sum[i] * scale_);
  }

  // o of kBlock queries: to `out`, and with the next group to f.
  HW_NOINLINE void attend(int head, int first, const A* const* x, A* const* out) {
    const int columns = std::min(kBlock, n_.padded_tokens - first);
    const int queries = std::min(kBlock, n_.tokens - first);
    const A* k = qkv_ + n_.padded_keys;
    const A* v = qkv_ + 2 * n_.padded_keys;
    multiply<false>(n_.tokens, columns, n_.keys, row_major(k, n_.projected),
                    static_cast<const A*>(q_columns_) + first, n_.padded_tokens, s_, kBlock);
    softmax(s_, w_.table(head) + first, n_.padded_tokens, n_.tokens, columns, inverse_);
    multiply<false>(queries, n_.padded_group, n_.tokens,
                    transposed(static_cast<const A*>(s_), kBlock), v, n_.projected, o_,
                    n_.padded_group);
    const bool more = head + 1 < n_.heads;
    for (int i = 0; i < queries; ++i) {
      const int t = first + i;
      hand_over(o_ + int64_t{i} * n_.padded_group, inverse_[i],
                out[t] ? out[t] + head * n_.group : nullptr,
                more ? x[t] + (head + 1) * n_.group : nullptr, f_ + int64_t{t} * n_.padded_group);
    }
  }

  // o inverse: its positive part to `out`, with the next group `x` to f.
  HW_INLINE void hand_over(const A* o, A inverse, A* out, const A* x, A* f) const {
    int c = 0;
    for (; c + kLane <= n_.group; c += kLane) {
      const Vec<A> value = load(o + c) * inverse;
      if (out) store(out + c, positive_of(value));
      if (x) store(f + c, value + load(x + c));
    }
    for (; c < n_.group; ++c) {
      const A value = o[c] * inverse;
      if (out) out[c] = value < 0 ? A(0) : value;  // NaN stays
      if (x) f[c] = value + x[c];
    }
  }

  const Shape<A> n_;
  const Weights<T>& w_;
  const A scale_;
  A *f_, *qkv_;    // [N, dp], [N, Fp]
  A *plane_, *q_;  // [height, width and margins, Kp], [N, Kp]
  A* q_columns_;   // [Kp, Np]
  A *s_, *o_;      // [N, kBlock], [kBlock, dp]
  A* inverse_;     // [kBlock]
};

}  // namespace
}  // namespace hw::cascaded_group_attention
