// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: what a block works on, and scores in fragments.
//
// A fragment of products c lies one of two ways:
//   queries as rows  rows are queries, columns keys   (forward, d_q, d_bias)
//   keys as rows     rows are keys, columns queries   (d_k and d_v, columns)
// so that what is multiplied next finds p or ds as its A operand in the registers where it is made.
// All steps go through ScoreTile, which knows query and key of every element; the formulas are
// those of softmax/score.h, with fast functions by the type Fast.
//
// "plain" kernels have softmax or softmax1 and nothing but scale > 0 and masks: c goes straight
// into the exponent, p = exp2(unit (c - base)), with unit = scale log2 e. In the others s is kept,
// and the unit is log2 e.
#pragma once

#include <limits>

#include "softmax/score.h"
#include "softmax/sm80/layout.h"
#include "softmax/sm80/lists.cuh"
#include "softmax/sm80/sight.h"

#include "core/gpu/streams.cuh"
#include "core/gpu/tile.cuh"

namespace hw::softmax::sm80 {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A float whose elementary functions are the device's fast ones: 2 ulp, tanh to 2e-7 absolutely.
struct Fast {
  float v;
  HW_DEVICE HW_INLINE Fast(float x) : v(x) {}
  HW_DEVICE HW_INLINE explicit operator float() const { return v; }
  HW_DEVICE HW_INLINE friend Fast operator+(Fast a, Fast b) { return a.v + b.v; }
  HW_DEVICE HW_INLINE friend Fast operator-(Fast a, Fast b) { return a.v - b.v; }
  HW_DEVICE HW_INLINE friend Fast operator*(Fast a, Fast b) { return a.v * b.v; }
};
HW_DEVICE HW_INLINE Fast tanh_of(Fast x) {
  return 1.0f - 2.0f * dev::rcp_fast(1.0f + dev::exp2_fast(2.0f * kLog2e * x.v));
}
HW_DEVICE HW_INLINE Fast sigmoid_of(Fast x) {
  return dev::rcp_fast(1.0f + dev::exp2_fast(-kLog2e * x.v));
}
HW_DEVICE HW_INLINE Fast abs_of(Fast x) { return hw::abs_of(x.v); }
HW_DEVICE HW_INLINE Fast sign_of(Fast x) { return hw::sign_of(x.v); }
HW_DEVICE HW_INLINE Fast positive_of(Fast x) { return hw::positive_of(x.v); }
HW_DEVICE HW_INLINE Fast step_of(Fast x) { return hw::step_of(x.v); }

// ---- Work items ---------------------------------------------------------------------------------

HW_DEVICE HW_INLINE WorkItem work_item(const ScoreParams& p, int64_t n, int head) {
  const Sequence at = sequence(p, n);
  return {at, mask_of(p, at), head, head / p.group()};
}

// Where rows and keys come from: here those of a sequence, in their order (others: sm80/lists.cuh).
struct DenseSource {
  static constexpr bool kListed = false;
  using WorkItem = sm80::WorkItem;
  template <int kDim>
  using ForwardTiles = sm80::ForwardTiles<kDim>;
  using LoopTiles = sm80::LoopTiles;

  HW_DEVICE HW_INLINE static WorkItem work_item(const ScoreParams& p, int64_t n, int head) {
    return sm80::work_item(p, n, head);
  }
  // Keys have owners: how many there are in a sequence, and the query heads that each one walks.
  HW_DEVICE HW_INLINE static int key_owners(const ScoreParams& p) { return p.key_heads(); }
  HW_DEVICE HW_INLINE static int heads_of_owner(const ScoreParams& p) { return p.group(); }
};

// Rows of a tensor [B, S, heads, columns]: tokens from `first` of the tensor on, `count` (> 0) of
// them.
template <class Element>
HW_DEVICE HW_INLINE Rows<Element> token_rows(const Input<Element>& x, const Sequence& at, int head,
                                             int64_t first, int64_t count) {
  Rows<Element> rows;
  rows.origin = x.ref.at(at.batch, first, head);
  rows.row = x.ref.stride[1];
  rows.column = x.ref.stride[3];
  rows.count = static_cast<int>(min_of<int64_t>(count, 1 << 20));
  rows.columns = static_cast<int>(x.ref.size[3]);
  rows.aligned = x.aligned;
  rows.whole = x.whole;
  return rows;
}

template <class Element>
HW_DEVICE HW_INLINE Rows<Element> query_rows(const Input<Element>& x, const WorkItem& w,
                                             int64_t row) {
  return token_rows(x, w.at, w.head, w.at.q_begin + row, w.at.q_count - row);
}
template <class Element>
HW_DEVICE HW_INLINE Rows<Element> key_rows(const Input<Element>& x, const WorkItem& w,
                                           int64_t key) {
  return token_rows(x, w.at, w.key_head, w.at.k_begin + key, w.at.k_count - key);
}

// Numbers [B, Hq, S] (acc) of keys from `key` on.
HW_DEVICE HW_INLINE NumberArray key_array(const Ref<const void, 3>& x, const WorkItem& w,
                                          int64_t key) {
  if (!x) return {};
  const Ref<const float, 3> from = x.as<const float>();
  return {from.at(w.at.batch, w.head, w.at.k_begin + key), from.stride[2]};
}

// Starts loading numbers [B, Hq, S] (acc) of kCount keys or queries into `to`; none where absent.
template <int kCount, int kThreads>
HW_DEVICE HW_INLINE void key_numbers(float* to, const Ref<const void, 3>& x, const WorkItem& w,
                                     int64_t key) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers<kCount, kThreads>(to, from.at(w.at.batch, w.head, w.at.k_begin + key),
                                 from.stride[2], w.at.k_count - key);
}
template <int kCount, int kThreads, int kPitch>
HW_DEVICE HW_INLINE void query_numbers(float* to, const Ref<const void, 3>& x, const WorkItem& w,
                                       int64_t row) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers<kCount, kThreads, kPitch>(to, from.at(w.at.batch, w.head, w.at.q_begin + row),
                                         from.stride[2], w.at.q_count - row);
}
// The same of [B, Sq, Hq].
template <int kCount, int kThreads>
HW_DEVICE HW_INLINE void temperatures(float* to, const Ref<const void, 3>& x, const WorkItem& w,
                                      int64_t row) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers<kCount, kThreads>(to, from.at(w.at.batch, w.at.q_begin + row, w.head),
                                 from.stride[1], w.at.q_count - row);
}

// ---- Scores -------------------------------------------------------------------------------------

// What every kernel has of the scores besides ScoreParams.
template <class Element>
struct ScoreInputs {
  Input<Element> q, k;
  ScoreShape<float> shape;
  float scale, inverse_scale;

  explicit ScoreInputs(const ScoreParams& p)
      : q(input_of<Element>(p.q)),
        k(input_of<Element>(p.k)),
        shape(p.softcap),
        scale(static_cast<float>(p.scale)),
        inverse_scale(1.0f / static_cast<float>(p.scale)) {}
};

// First query and key of a fragment, in the sequence, and numbers in shared memory from these on,
// of which those are read that the call has. Listed: tokens and their extents in place of the
// first.
struct TileOperands {
  bool seen = true, whole = false;  // Sight of the tile; where tokens are listed, they tell
  int64_t row = 0, key = 0;
  const float* tau = nullptr;                            // per query
  const float *key_bias = nullptr, *key_gain = nullptr;  // per key
  const Vec<float, 4>* numbers = nullptr;                // per query: L or n, its rest, D - d_L
  const int *row_token = nullptr, *key_token = nullptr;
  const Extent *row_parts = nullptr, *key_parts = nullptr;  // of 16 each
};

template <class Element, bool kPlain, bool kKeysAsRows, int kStrips, int kTiles, class KeySource>
struct ScoreTile {
  using F = Fragment<kStrips, kTiles>;
  static constexpr int kLines = 16 * kStrips, kColumns = 8 * kTiles;
  static constexpr int kQueries = kKeysAsRows ? kColumns : kLines;
  static constexpr int kKeys = kKeysAsRows ? kLines : kColumns;

  const ScoreParams& p;
  const ScoreInputs<Element>& in;
  const typename KeySource::WorkItem& item;
  const KeySource& source;
  TileOperands operands;

  HW_DEVICE static HW_INLINE int query(int s, int j, int i) {
    return kKeysAsRows ? F::column(j, i) : F::row(s, i);
  }
  HW_DEVICE static HW_INLINE int key(int s, int j, int i) {
    return kKeysAsRows ? F::row(s, i) : F::column(j, i);
  }

  // Whether no query of the fragment sees a key of it.
  HW_DEVICE HW_INLINE bool unseen() const {
    if constexpr (KeySource::kListed)
      return !may_meet(item.mask, row_extent(), key_extent(), source.pad_keys());
    else
      return !operands.seen;
  }
  HW_DEVICE HW_INLINE bool soft() const {
    return kPlain || KeySource::kListed || is_softmax(p.activation);
  }

  // y of c in place.
  HW_DEVICE HW_INLINE void shape_products(F& x) const {
    if constexpr (kPlain) return;
    F::each([&](int s, int j, int i) {
      x.at[s][j][i] *= p.row_temperature ? in.scale * operands.tau[query(s, j, i)] : in.scale;
    });
    if (p.softcap > 0)
      F::each([&](int s, int j, int i) {
        x.at[s][j][i] = static_cast<float>(in.shape.capped(Fast(x.at[s][j][i])));
      });
  }

  // s of y in place, without the mask.
  HW_DEVICE HW_INLINE void add_terms(F& x) const {
    if constexpr (kPlain) return;
    if (p.key_gain)
      F::each([&](int s, int j, int i) {
        const float gain = gain_of(s, j, i);
        x.at[s][j][i] = static_cast<float>(in.shape.score(Fast(x.at[s][j][i]), gain, 0.0f));
      });
    if (p.key_bias)
      F::each([&](int s, int j, int i) { x.at[s][j][i] += operands.key_bias[key(s, j, i)]; });
    if constexpr (KeySource::kListed) {
      if (p.bias) add_bias_of_tokens(x);
    } else {
      if (p.bias) add_bias(x);
    }
  }

  // -inf where a query does not see a key.
  HW_DEVICE HW_INLINE void hide(F& x) const {
    if constexpr (KeySource::kListed)
      hide_tokens(x);
    else
      hide_in_order(x);
  }
  HW_DEVICE HW_INLINE void hide_in_order(F& x) const {
    if (operands.whole) return;
    HW_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      HW_UNROLL
      for (int half = 0; half < 4; half += 2) {
        const Range seen = seen_by_line(F::row(s, half));
        const int begin =
            static_cast<int>(max_of<int64_t>(min_of<int64_t>(seen.begin, kColumns), 0));
        const int end = static_cast<int>(max_of<int64_t>(min_of<int64_t>(seen.end, kColumns), 0));
        HW_UNROLL
        for (int j = 0; j < kTiles; ++j) {
          HW_UNROLL
          for (int i = half; i < half + 2; ++i) {
            const int column = F::column(j, i);
            if (column < begin || column >= end) x.at[s][j][i] = -kInfinity;
          }
        }
      }
    }
  }

  // What p of a query is relative to: L (rows without weight: +inf), or 1 / n.
  HW_DEVICE HW_INLINE float base_of(int q, float statistic) const {
    if (soft()) return statistic == -kInfinity ? kInfinity : statistic;
    if (p.normalizer == Normalizer::none) return 1.0f;
    if (p.normalizer == Normalizer::sum)
      return statistic != 0.0f && statistic < kInfinity ? 1.0f / statistic : 0.0f;
    const int64_t seen = item.mask.visible_keys(operands.row + q).count();
    return seen > 0 ? 1.0f / static_cast<float>(seen) : 0.0f;
  }

  // What the lane's elements of a query have in common.
  struct Terms {
    float base, rest, extra;  // see base_of; of L, to base 2; D - d_L
  };

  HW_DEVICE HW_INLINE Terms terms_of(int q) const {
    const Vec<float, 4> of_query = load_vector<4>(operands.numbers[q].v);
    return {base_of(q, of_query.v[0]), of_query.v[1] * kLog2e, of_query.v[2]};
  }

  // f(terms, each), each(g): g(strip, j, i) of every element of the query.
  template <class Visit>
  HW_DEVICE HW_INLINE void each_query(Visit&& f) const {
    if constexpr (kKeysAsRows) {
      HW_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        HW_UNROLL
        for (int i = 0; i < 2; ++i) {
          f(terms_of(F::column(j, i)), [&](auto&& g) {
            HW_UNROLL
            for (int n = 0; n < 2 * kStrips; ++n) g(n / 2, j, i + n % 2 * 2);
          });
        }
      }
    } else {
      HW_UNROLL
      for (int n = 0; n < 2 * kStrips; ++n) {
        const int s = n / 2, half = n % 2 * 2;
        f(terms_of(F::row(s, half)), [&](auto&& g) {
          HW_UNROLL
          for (int m = 0; m < 2 * kTiles; ++m) g(s, m / 2, half + m % 2);
        });
      }
    }
  }

  // From L to s in units of x. The difference comes first: it is exact where both are large.
  HW_DEVICE HW_INLINE float distance(float x, const Terms& t) const {
    if constexpr (kPlain) return fmaf(-t.base, in.inverse_scale, x);
    return x - t.base;
  }

  // e^(s - L)
  HW_DEVICE HW_INLINE float soft_weight(float x, const Terms& t, float unit) const {
    return dev::exp2_fast(fmaf(distance(x, t), unit, -t.rest));
  }

  // p of s (plain: of c) in place.
  HW_DEVICE HW_INLINE void weigh(F& x, float unit) const {
    each_query([&](const Terms& t, auto&& each) {
      each([&](int s, int j, int i) { x.at[s][j][i] = weight(x.at[s][j][i], t, unit); });
    });
  }

  HW_DEVICE HW_INLINE float weight(float x, const Terms& t, float unit) const {
    if (soft()) return soft_weight(x, t, unit);
    return static_cast<float>(activation(p.activation, Fast(x))) * t.base;
  }

  // p in place of s, and ds in place of dp.
  HW_DEVICE HW_INLINE void differentiate(F& x, F& dp, float unit) const {
    if constexpr (KeySource::kListed)
      if (source.mask_self()) return differentiate_but_self(x, dp, unit);
    each_query([&](const Terms& t, auto&& each) {
      each([&](int s, int j, int i) {
        const float score = x.at[s][j][i], p_ij = weight(score, t, unit);
        const float slope =
            soft() ? p_ij
                   : static_cast<float>(activation_slope(p.activation, Fast(score))) * t.base;
        x.at[s][j][i] = p_ij;
        dp.at[s][j][i] = slope * (dp.at[s][j][i] - t.extra);
      });
    });
  }

  // Whether dx differs from ds.
  HW_DEVICE HW_INLINE bool is_nonlinear() const { return !kPlain && (p.softcap > 0 || p.key_gain); }

  // dx of ds in place.
  HW_DEVICE HW_INLINE void chain(F& ds, const F& y) const {
    F::each([&](int s, int j, int i) {
      const float gain = p.key_gain ? gain_of(s, j, i) : 0.0f;
      ds.at[s][j][i] *= static_cast<float>(in.shape.slope(Fast(y.at[s][j][i]), gain));
    });
  }

  // dc / scale of dx in place, where queries have temperatures.
  HW_DEVICE HW_INLINE void apply_temperature(F& dx) const {
    if (kPlain || !p.row_temperature) return;
    F::each([&](int s, int j, int i) { dx.at[s][j][i] *= operands.tau[query(s, j, i)]; });
  }

  // Adds ds |y| of the rows that key_gain is for to the sums of the lane's keys (keys as rows).
  HW_DEVICE HW_INLINE void add_gain_gradients(float (&share)[2], const F& ds, const F& y) const {
    static_assert(kKeysAsRows && kStrips == 1, "sums of keys");
    F::each([&](int s, int j, int i) {
      if (in_gain_rows(query(s, j, i))) share[i / 2] += ds.at[s][j][i] * hw::abs_of(y.at[s][j][i]);
    });
  }

  HW_DEVICE HW_INLINE bool in_gain_rows(int q) const {
    if constexpr (KeySource::kListed)
      return operands.row_token[q] >= p.gain_begin && operands.row_token[q] < p.gain_end;
    return operands.row + q >= p.gain_begin && operands.row + q < p.gain_end;
  }

 private:
  HW_DEVICE HW_INLINE float gain_of(int s, int j, int i) const {
    return in_gain_rows(query(s, j, i)) ? operands.key_gain[key(s, j, i)] : 0.0f;
  }

  // Indices beyond the sequence read its last element; what they give is hidden.
  HW_DEVICE HW_INLINE void add_bias(F& x) const {
    const Ref<const Element, 4> b = p.bias.template as<const Element>();
    const Element* from = b.at(item.at.batch, item.head, operands.row, operands.key);
    const int last_query =
        static_cast<int>(min_of<int64_t>(item.mask.rows - operands.row, 1 << 20)) - 1;
    const int last_key =
        static_cast<int>(min_of<int64_t>(item.mask.keys - operands.key, 1 << 20)) - 1;
    F::each([&](int s, int j, int i) {
      const int q = min_of(query(s, j, i), last_query), k = min_of(key(s, j, i), last_key);
      x.at[s][j][i] += static_cast<float>(from[q * b.stride[2] + k * b.stride[3]]);
    });
  }

  // ---- Listed

  HW_DEVICE HW_INLINE Extent row_extent() const {
    return merged<kQueries / 16>(operands.row_parts);
  }
  HW_DEVICE HW_INLINE Extent key_extent() const { return merged<kKeys / 16>(operands.key_parts); }

  // What stands for the score of a token with itself.
  HW_DEVICE HW_INLINE float self_score() const {
    return kPlain ? KeySource::kSelfScore / in.scale : KeySource::kSelfScore;
  }

  HW_DEVICE HW_INLINE const int* line_tokens() const {
    return kKeysAsRows ? operands.key_token : operands.row_token;
  }
  HW_DEVICE HW_INLINE const int* column_tokens() const {
    return kKeysAsRows ? operands.row_token : operands.key_token;
  }

  // What is added where there is no token is hidden.
  HW_DEVICE HW_INLINE void add_bias_of_tokens(F& x) const {
    const Ref<const Element, 4> b = p.bias.template as<const Element>();
    const Element* from = b.at(item.at.batch, item.head);
    F::each([&](int s, int j, int i) {
      const int q = max_of(operands.row_token[query(s, j, i)], 0);
      const int k = max_of(operands.key_token[key(s, j, i)], 0);
      x.at[s][j][i] += static_cast<float>(from[q * b.stride[2] + k * b.stride[3]]);
    });
  }

  // Also replaces the scores of tokens with themselves. A key without token has the score 0.
  HW_DEVICE HW_INLINE void hide_tokens(F& x) const {
    if (all_meet(item.mask, row_extent(), key_extent(), source.mask_self())) return;
    const int *lines = line_tokens(), *columns = column_tokens();
    const int pad = !kKeysAsRows && source.pad_keys() ? kNoToken : kNever;
    int begin[kStrips][2], end[kStrips][2], self[kStrips][2];  // columns that a line meets
    HW_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      HW_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Met met = met_by(lines[F::row(s, 2 * half)]);
        begin[s][half] = met.begin, end[s][half] = met.end, self[s][half] = met.self;
      }
    }
    const float score = self_score();
    F::each([&](int s, int j, int i) {
      const int token = columns[F::column(j, i)];
      const bool seen = token == pad || (token >= begin[s][i / 2] && token < end[s][i / 2]);
      if (!seen) x.at[s][j][i] = -kInfinity;
      if (seen && token == self[s][i / 2]) x.at[s][j][i] = score;
    });
  }

  // Tokens of the columns that a line with `token` meets, and itself among them.
  struct Met {
    int begin, end, self;
  };
  HW_DEVICE HW_INLINE Met met_by(int token) const {
    if (token < 0) return {0, 0, kNever};
    const Mask& m = item.mask;
    const Range range = kKeysAsRows ? m.seeing_rows(token) : m.visible_keys(token);
    const int gap = static_cast<int>(m.keys - m.rows),
              self = kKeysAsRows ? token - gap : token + gap;
    return {static_cast<int>(range.begin), static_cast<int>(range.end),
            source.mask_self() && self >= 0 ? self : kNever};
  }

  // As differentiate; scores of tokens with themselves are constants.
  HW_DEVICE HW_INLINE void differentiate_but_self(F& x, F& dp, float unit) const {
    const int *lines = line_tokens(), *columns = column_tokens();
    int self[kStrips][2];
    HW_UNROLL
    for (int n = 0; n < 2 * kStrips; ++n)
      self[n / 2][n % 2] = met_by(lines[F::row(n / 2, n % 2 * 2)]).self;
    each_query([&](const Terms& t, auto&& each) {
      each([&](int s, int j, int i) {
        const float weight = soft_weight(x.at[s][j][i], t, unit);
        x.at[s][j][i] = weight;
        const bool constant = columns[F::column(j, i)] == self[s][i / 2];
        dp.at[s][j][i] = constant ? 0.0f : weight * (dp.at[s][j][i] - t.extra);
      });
    });
  }

  // ---- In order

  // The columns that a row of the fragment meets; of one that is not there any.
  HW_DEVICE HW_INLINE Range seen_by_line(int line) const {
    const Mask& m = item.mask;
    if constexpr (kKeysAsRows) {
      const Range rows = m.seeing_rows(operands.key + line);
      return {rows.begin - operands.row, rows.end - operands.row};
    } else {
      const Range keys = m.visible_keys(operands.row + line);
      return {keys.begin - operands.key, keys.end - operands.key};
    }
  }
};

}  // namespace hw::softmax::sm80
