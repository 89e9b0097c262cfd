// SPDX-License-Identifier: Apache-2.0
// The running state of a warp: sums over keys, kept in accumulators of mma.
//
//   S   [slots, columns]  sum_j phi(b_j) x_j     fp32; 16 columns (of v, do) per warp
//   n   [slots]           sum_j phi(b_j) e_j     fp32; e_j = 1, or dz_j; blocks r with r mod kWarps
//                                                = warp belong to a warp
//
// Two orientations, because what is summed next must lie along k of an mma operand:
//   ByColumn S^T: s[r][h][.] = rows: columns of the warp; columns: slots 8 h .. 8 h + 7 of block r.
//            Two neighbours are slots: S is B of  Phi(a) S
//   BySlot   S:   s[r][j][.] = rows: slots of block r; columns: columns 8 j .. 8 j + 7 of the warp.
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

  // Half h of block r; h = 1 of block 8 is the constant.
  template <int kBlock>
  HW_DEVICE HW_INLINE float at(int h) const {
    if constexpr (kBlock == kLinear) return linear;
    if constexpr (kBlock == kProducts) return h == 0 ? product : 1.0f;
    return kBlock == 0 ? square : product;
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

// The same of all slots, in shared memory: a thread needs it of 80 elements.
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
struct StatePlace {
  Ref<float, 4> kv;
  Ref<float, 3> z;
};

template <class Element, int kWarps>
struct State {
  static constexpr int kOwnBlocks = (kBlocks + kWarps - 1) / kWarps;
  using P = Pairs<Element>;

  float s[kBlocks][2][4];
  float n[kOwnBlocks][4];  // rows: slots; columns 0, 1: upper and lower half of e

  HW_DEVICE HW_INLINE void clear() {
    for_each_block([&](auto r) {
      for (int h = 0; h < 2; ++h)
        for (int i = 0; i < 4; ++i) s[r][h][i] = 0.0f;
    });
    HW_UNROLL
    for (int b = 0; b < kOwnBlocks; ++b)
      for (int i = 0; i < 4; ++i) n[b][i] = 0.0f;
  }

  // Visits every element of S once: f(value, slot, column of the warp, coefficient).
  template <bool kByColumn, class F>
  HW_DEVICE HW_INLINE void visit(const Coefficients& c, F&& f) {
    const int g = dev::lane() / 4, t = dev::lane() % 4;
    for_each_block([&](auto block) {
      constexpr int r = block;
      HW_UNROLL
      for (int h = 0; h < 2; ++h) {
        HW_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = g + (i & 2) * 4, column = 2 * t + (i & 1);  // of the 16 x 8 tile
          const int slot = 16 * r + (kByColumn ? 8 * h + column : row);
          const int half = kByColumn ? h : i / 2;
          f(s[r][h][i], slot, kByColumn ? row : 8 * h + column, c.template at<r>(half));
        }
      }
    });
  }

  // Loads the state of (index, head), times `c`; `first`: first column of the warp.
  template <bool kByColumn>
  HW_DEVICE HW_INLINE void load(const StatePlace& place, int64_t index, int head, int64_t first,
                                const SlotFeatures& features, const Coefficients& c) {
    clear();
    if (place.kv) {
      const Ref<float, 2> kv = place.kv.slice(index).slice(head);
      visit<kByColumn>(c, [&](float& value, int slot, int column, float coefficient) {
        const int feature = features.at[slot];
        if (feature < 0 || first + column >= kv.size[1]) return;
        value = kv(feature, first + column) * coefficient;
      });
    }
    if (place.z) {
      const Ref<float, 1> z = place.z.slice(index).slice(head);
      visit_sums(c, [&](float& value, float&, int slot, float coefficient) {
        const int feature = features.at[slot];
        if (feature >= 0) value = z(feature) * coefficient;
      });
    }
  }

  // Stores it, times `c`; n only where `with_n` (one block of those that share the state).
  template <bool kByColumn>
  HW_DEVICE HW_INLINE void store(const StatePlace& place, int64_t index, int head, int64_t first,
                                 const SlotFeatures& features, const Coefficients& c, bool with_n) {
    if (place.kv) {
      const Ref<float, 2> kv = place.kv.slice(index).slice(head);
      visit<kByColumn>(c, [&](float& value, int slot, int column, float coefficient) {
        const int feature = slot == kCopySlot ? -1 : features.at[slot];
        if (feature >= 0 && first + column < kv.size[1])
          kv(feature, first + column) = value * coefficient;
      });
    }
    if (!with_n || !place.z) return;
    const Ref<float, 1> z = place.z.slice(index).slice(head);
    visit_sums(c, [&](float& value, float& rest, int slot, float coefficient) {
      const int feature = slot == kCopySlot ? -1 : features.at[slot];
      if (feature >= 0 && dev::lane() % 4 == 0) z(feature) = (value + rest) * coefficient;
    });
  }

  // Visits the sums of the warp's blocks: f(upper, lower, slot, coefficient). Columns 0 and 1, the
  // two parts of n, are in the lanes with t = 0; what the others hold is of no account.
  template <class F>
  HW_DEVICE HW_INLINE void visit_sums(const Coefficients& c, F&& f) {
    const int g = dev::lane() / 4, warp = dev::warp();
    for_each_block([&](auto block) {
      constexpr int r = block;
      if (r % kWarps != warp) return;
      f(n[r / kWarps][0], n[r / kWarps][1], 16 * r + g, c.template at<r>(0));
      f(n[r / kWarps][2], n[r / kWarps][3], 16 * r + 8 + g, c.template at<r>(1));
    });
  }

  // Adds `count` keys: b their rows, `values` x, e = 1. kQueries: x is multiplied by factor[token]
  // first, and e = delta[token] factor[token].
  template <bool kByColumn, bool kQueries, int kDim>
  HW_DEVICE HW_INLINE void add(const Turned<Element>& b, const Wide<Element, kDim>& values,
                               int column, const float* factor, const float* delta, int count) {
    const int strips = ceil_div(count, kRows);
    HW_UNROLL_BY(1)
    for (int strip = 0; strip < strips; ++strip) {
      Pair<Element> x[4], own[4], e[2];
      load_values<kQueries>(x, values, strip, column, factor);
      load_extra<kQueries>(e, strip * kRows, count, factor, delta);
      uint32_t word[4];
      columns_by_tokens(word, b, strip, 0);
      for (int i = 0; i < 4; ++i) own[i] = P::exact(word[i]);
      for_each_block([&](auto block) {
        constexpr int r = block;
        Pair<Element> phi[4];
        features_by_tokens<Element, r>(phi, own, b, strip);
        if constexpr (kByColumn) {
          const Pair<Element> low[2] = {phi[0], phi[2]}, high[2] = {phi[1], phi[3]};
          P::mma(s[r][0], x, low);
          P::mma(s[r][1], x, high);
        } else {
          const Pair<Element> low[2] = {x[0], x[2]}, high[2] = {x[1], x[3]};
          P::mma(s[r][0], phi, low);
          P::mma(s[r][1], phi, high);
        }
        if (r % kWarps == dev::warp()) P::mma(n[r / kWarps], phi, e);
      });
    }
  }

  // x of a strip as pairs: (column g, tokens 2t, 2t+1 | + 8), times factor.
  template <bool kQueries, int kDim>
  HW_DEVICE static HW_INLINE void load_values(Pair<Element> x[4], const Wide<Element, kDim>& values,
                                              int strip, int column, const float* factor) {
    uint32_t word[4];
    values_by_tokens(word, values, strip, column);
    const int token = strip * kRows + 2 * (dev::lane() % 4);
    HW_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = P::exact(word[i]);
      if constexpr (kQueries) {
        const float* f = factor + token + (i & 2) * 4;
        const Two two = P::widen(x[i]);
        x[i] = P::round(two.lo * f[0], two.hi * f[1]);
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
