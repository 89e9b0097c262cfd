// SPDX-License-Identifier: Apache-2.0
// The running state of a warp: sums over keys, kept in accumulators of mma.
//
//   S   [slots, columns]  sum_j phi(b_j) x_j     fp32; 64 columns (of v, do) of up to 3 blocks
//   n   [slots]           sum_j phi(b_j) e_j     fp32; e_j = 1, or dz_j; of the same blocks
//
// Four warps share the slots of 64 columns, so that features of a key are made once for them: warp
// w of the four has blocks w and w + 4, products of two columns whose distance is the number of the
// block, and of the two special blocks warps 0 and 1 have one each.
//
// Two orientations, because what is summed next must lie along k of an mma operand:
//   ByColumn S^T: s[k][i][h][.] = rows: columns 16 i .. 16 i + 15; columns: slots 8 h .. 8 h + 7 of
//            the warp's block k. Two neighbours are slots: S is B of  Phi(a) S
//   BySlot   S:   s[k][i][j][.] = rows: slots of the block; columns: columns 16 i + 8 j .. + 7.
//            Two neighbours are columns: S^T is B of  U S^T
// In memory states are [F, Dv] in the order of linear_attention.h. A state over queries is there
// multiplied by the coefficients c of its features, which these kernels apply when they read: it is
// divided by c on its way in and multiplied on its way out.
#pragma once

#include "ops/linear_attention/linear_attention_sm80_tile.cuh"

namespace hw::linear_attention::sm80 {

// c of the features of a block: squares, products of two columns, linear ones.
struct Coefficients {
  float square, product, linear;

  // Half h of a block; h = 1 of block 8 is the constant.
  HW_DEVICE HW_INLINE float at(int block, int h) const {
    if (block == kLinear) return linear;
    if (block == kProducts) return h == 0 ? product : 1.0f;
    return block == 0 ? square : product;
  }
};

HW_HOST_DEVICE inline Coefficients coefficients(float scale) {
  return {0.5f * scale * scale, scale * scale, scale};
}

// What a state is multiplied by on its way from and to memory.
HW_DEVICE HW_INLINE Coefficients factors_in(float scale, bool over_queries) {
  if (!over_queries) return {1.0f, 1.0f, 1.0f};
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  return {2.0f * inverse * inverse, inverse * inverse, inverse};
}
HW_DEVICE HW_INLINE Coefficients factors_out(float scale, bool over_queries) {
  return over_queries ? coefficients(scale) : Coefficients{1.0f, 1.0f, 1.0f};
}

// The slot that holds a copy of the constant: loaded like it, not stored.
inline constexpr int kCopySlot = 16 * kProducts + 9;

// Position of a slot among the features, -1 for none.
HW_DEVICE HW_INLINE int slot_feature(int d, int slot) {
  const int block = slot / 16, c = slot % 16;
  if (block == kLinear) return c < d ? 1 + c : -1;
  if (block == kProducts && c >= 8) return c <= 9 ? 0 : -1;
  const int other = (c + block) % 16;
  const int a = min_of(c, other), b = max_of(c, other);
  return b < d ? quadratic_feature(d, a, b) : -1;
}

// The same of all slots, in shared memory: a thread needs it of 96 elements.
struct SlotFeatures {
  int16_t at[kSlots];

  // Whole block of kThreads; a barrier before it is read.
  template <int kThreads>
  HW_DEVICE HW_INLINE void fill(int d) {
    for (int i = dev::thread_index(); i < kSlots; i += kThreads)
      at[i] = static_cast<int16_t>(slot_feature(d, i));
  }
};

// Where states of one direction live: [slot or sequence, H, F, Dv] and [.., H, F].
struct StateRefs {
  Ref<float, 4> kv;
  Ref<float, 3> z;
};

template <class Element>
struct State {
  static constexpr int kOwn = (kBlocks + kSharers - 1) / kSharers;  // blocks of a warp
  static constexpr int kGroups = kShared / 16;                      // of 16 columns
  using P = Pairs<Element>;

  float s[kOwn][kGroups][2][4];
  float n[kOwn][4];  // rows: slots; columns 0, 1: upper and lower half of e

  // The warp's number among the four, its first column in the tile, and its blocks.
  HW_DEVICE static HW_INLINE int member() { return dev::warp() % kSharers; }
  HW_DEVICE static HW_INLINE int column() { return dev::warp() / kSharers * kShared; }
  HW_DEVICE static HW_INLINE int block(int k) { return member() + kSharers * k; }
  HW_DEVICE static HW_INLINE bool has(int k) { return block(k) < kBlocks; }

  HW_DEVICE HW_INLINE void clear() {
    HW_UNROLL
    for (int k = 0; k < kOwn; ++k) {
      HW_UNROLL
      for (int i = 0; i < 8 * kGroups; ++i) s[k][i / 8][i / 4 % 2][i % 4] = 0.0f;
      for (int i = 0; i < 4; ++i) n[k][i] = 0.0f;
    }
  }

  // Visits every element of S once: f(value, slot, column of the warp, coefficient).
  template <bool kByColumn, class F>
  HW_DEVICE HW_INLINE void visit(const Coefficients& c, F&& f) {
    const int g = dev::lane() / 4, t = dev::lane() % 4;
    HW_UNROLL
    for (int k = 0; k < kOwn; ++k) {
      if (!has(k)) continue;
      HW_UNROLL
      for (int e = 0; e < 8 * kGroups; ++e) {
        const int group = e / 8, h = e / 4 % 2, i = e % 4;
        const int row = g + (i & 2) * 4, at = 8 * h + 2 * t + (i & 1);  // of the 16 x 16 tile
        const int half = kByColumn ? h : i / 2;
        f(s[k][group][h][i], 16 * block(k) + (kByColumn ? at : row),
          16 * group + (kByColumn ? row : at), c.at(block(k), half));
      }
    }
  }

  // Loads the state of (index, head), times `c`; `first`: first column of the tile.
  template <bool kByColumn>
  HW_DEVICE HW_INLINE void load(const StateRefs& refs, int64_t index, int head, int64_t first,
                                const SlotFeatures& features, const Coefficients& c) {
    clear();
    first += column();
    if (refs.kv) {
      const Ref<float, 2> kv = refs.kv.slice(index).slice(head);
      visit<kByColumn>(c, [&](float& value, int slot, int column, float coefficient) {
        const int feature = features.at[slot];
        if (feature < 0 || first + column >= kv.size[1]) return;
        value = kv(feature, first + column) * coefficient;
      });
    }
    if (refs.z) {
      const Ref<float, 1> z = refs.z.slice(index).slice(head);
      visit_sums(c, [&](float& value, float&, int slot, float coefficient) {
        const int feature = features.at[slot];
        if (feature >= 0) value = z(feature) * coefficient;
      });
    }
  }

  // Stores it, times `c`; n where the tile is the first of those that share the state.
  template <bool kByColumn>
  HW_DEVICE HW_INLINE void store(const StateRefs& refs, int64_t index, int head, int64_t first,
                                 const SlotFeatures& features, const Coefficients& c) {
    first += column();
    if (refs.kv) {
      const Ref<float, 2> kv = refs.kv.slice(index).slice(head);
      visit<kByColumn>(c, [&](float& value, int slot, int column, float coefficient) {
        const int feature = slot == kCopySlot ? -1 : features.at[slot];
        if (feature >= 0 && first + column < kv.size[1])
          kv(feature, first + column) = value * coefficient;
      });
    }
    if (first != 0 || !refs.z) return;
    const Ref<float, 1> z = refs.z.slice(index).slice(head);
    visit_sums(c, [&](float& value, float& rest, int slot, float coefficient) {
      const int feature = slot == kCopySlot ? -1 : features.at[slot];
      if (feature >= 0 && dev::lane() % 4 == 0) z(feature) = (value + rest) * coefficient;
    });
  }

  // Visits the sums of the warp's blocks: f(upper, lower, slot, coefficient). Columns 0 and 1, the
  // two parts of n, are in the lanes with t = 0; what the others hold is of no account.
  template <class F>
  HW_DEVICE HW_INLINE void visit_sums(const Coefficients& c, F&& f) {
    HW_UNROLL
    for (int k = 0; k < kOwn; ++k) {
      if (!has(k)) continue;
      HW_UNROLL
      for (int h = 0; h < 2; ++h) {
        f(n[k][2 * h], n[k][2 * h + 1], 16 * block(k) + 8 * h + dev::lane() / 4, c.at(block(k), h));
      }
    }
  }

  // Adds `count` keys: b their rows, `values` x, e = 1. kQueries: x_j counts as factor_j x_j, and
  // e = delta[token] factor[token]. The factor is given to the features of S, which are fewer.
  template <bool kByColumn, bool kQueries, int kDim>
  HW_DEVICE HW_INLINE void add(const Turned<Element>& b, const Wide<Element, kDim>& values,
                               const float* factor, const float* delta, int count) {
    const int strips = ceil_div(count, kRows);
    HW_UNROLL_BY(1)
    for (int strip = 0; strip < strips; ++strip) {
      Pair<Element> x[kGroups][4], own[4], counted[4], e[2];
      uint32_t word[4];
      HW_UNROLL
      for (int i = 0; i < 4 * kGroups; ++i) {
        if (i % 4 == 0 && kByColumn) values_by_tokens(word, values, strip, column() + 4 * i);
        if (i % 4 == 0 && !kByColumn) tokens_of_values(word, values, strip, column() + 4 * i);
        x[i / 4][i % 4] = P::exact(word[i % 4]);
      }
      load_extra<kQueries>(e, strip * kRows, count, factor, delta);
      columns_by_tokens(word, b, strip, 0);
      for (int i = 0; i < 4; ++i) own[i] = P::exact(word[i]);
      weigh<kQueries>(counted, own, factor, strip);
      HW_UNROLL
      for (int k = 0; k < kOwn - 1; ++k) {
        Pair<Element> phi[4], once[4];
        columns_by_tokens(word, b, strip, block(k));
        for (int i = 0; i < 4; ++i) phi[i] = P::multiply(counted[i], P::exact(word[i]));
        add_columns<kByColumn>(k, phi, x);
        for (int i = 0; i < 4; ++i)
          once[i] = kQueries ? P::multiply(own[i], P::exact(word[i])) : phi[i];
        P::mma(n[k], once, e);
      }
      if (has(kOwn - 1)) add_special<kByColumn, kQueries>(x, own, counted, e, factor, strip);
    }
  }

  // The special block of the warp.
  template <bool kByColumn, bool kQueries>
  HW_DEVICE HW_INLINE void add_special(const Pair<Element> x[kGroups][4],
                                       const Pair<Element> own[4], const Pair<Element> counted[4],
                                       const Pair<Element> e[2], const float* factor, int strip) {
    constexpr int k = kOwn - 1;
    const float one = dev::lane() / 4 < 2 ? 1.0f : 0.0f;
    Pair<Element> ones[4], phi[4];
    for (int i = 0; i < 4; ++i) ones[i] = P::round(one, one);
    special_by_tokens<Element>(phi, own, own, ones, block(k));
    P::mma(n[k], phi, e);
    if constexpr (kQueries) {
      Pair<Element> weighed[4];
      weigh<kQueries>(weighed, ones, factor, strip);
      special_by_tokens<Element>(phi, own, counted, weighed, block(k));
    }
    add_columns<kByColumn>(k, phi, x);
  }

  // S of the warp's block k.
  template <bool kByColumn>
  HW_DEVICE HW_INLINE void add_columns(int k, const Pair<Element> phi[4],
                                       const Pair<Element> x[kGroups][4]) {
    HW_UNROLL
    for (int i = 0; i < kGroups; ++i) {
      const Pair<Element> low[2] = {phi[0], phi[2]}, high[2] = {phi[1], phi[3]};
      P::mma(s[k][i][0], kByColumn ? x[i] : phi, kByColumn ? low : x[i]);
      P::mma(s[k][i][1], kByColumn ? x[i] : phi, kByColumn ? high : x[i] + 2);
    }
  }

  // x as pairs of tokens of a strip, times factor over queries.
  template <bool kQueries>
  HW_DEVICE static HW_INLINE void weigh(Pair<Element> to[4], const Pair<Element> x[4],
                                        const float* factor, int strip) {
    HW_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[i] = x[i];
      if constexpr (kQueries) {
        const float* f = factor + strip * kRows + 2 * (dev::lane() % 4) + (i & 2) * 4;
        const Two two = P::widen(x[i]);
        to[i] = P::round(two.lo * f[0], two.hi * f[1]);
      }
    }
  }

  // B with e in two parts, columns 0 and 1: (tokens 2t, 2t+1 | + 8; g).
  template <bool kQueries>
  HW_DEVICE static HW_INLINE void load_extra(Pair<Element> e[2], int token, int count,
                                             const float* factor, const float* delta) {
    const int g = dev::lane() / 4;
    token += 2 * (dev::lane() % 4);
    HW_UNROLL
    for (int i = 0; i < 2; ++i, token += 8) {
      if constexpr (kQueries) {
        const float lo = delta[token] * factor[token], hi = delta[token + 1] * factor[token + 1];
        const Pair<Element> upper = P::round(lo, hi);
        const Two two = P::widen(upper);
        const Pair<Element> lower = P::round(lo - two.lo, hi - two.hi);
        e[i] = g == 0 ? upper : g == 1 ? lower : P::zero();
      } else {
        e[i] = P::round(g == 0 && token < count ? 1.0f : 0.0f,
                        g == 0 && token + 1 < count ? 1.0f : 0.0f);
      }
    }
  }
};

}  // namespace hw::linear_attention::sm80
