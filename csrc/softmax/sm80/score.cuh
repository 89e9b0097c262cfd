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
// Kernels of plain scores (kPlain of a ScoreKind) have a softmax, scale > 0 and masks alone: c goes
// straight into the exponent, p = exp2(unit (c - base)), with unit = scale log2 e. In the others s
// is kept, and the unit is log2 e.
#pragma once

#include <limits>

#include "softmax/key_source.h"
#include "softmax/score.h"
#include "softmax/sm80/gather.cuh"
#include "softmax/sm80/in_order.cuh"
#include "softmax/sm80/layout.h"
#include "softmax/sm80/visible_tiles.h"

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

// Where the results of a slot are on the axis S, and its position; negative: nowhere, none.
struct SlotResult {
  int64_t at, position;

  HW_DEVICE HW_INLINE static SlotResult none() { return {kNoToken, kNoToken}; }
};

// Of a slot of rows, or of keys, that exists; `token`: its own, of sources that gather.
template <bool kKeys, KeySource Source>
HW_DEVICE HW_INLINE SlotResult slot_result(const Source& s, const typename Source::WorkItem& w,
                                           int64_t slot, int token) {
  if constexpr (Source::kGathers) {
    const int n = static_cast<int>(slot);
    if constexpr (kKeys)
      return {s.key_result(w, n, token), token < 0 ? token : s.key_position(w, n, token)};
    else
      return {s.row_result(w, n, token), token < 0 ? token : s.row_position(w, n, token)};
  } else {
    return {kKeys ? s.key_result(w, slot, slot) : s.row_result(w, slot, slot), slot};
  }
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

// First slots of the queries and keys of a fragment, and numbers in shared memory from these on, of
// which those are read that the call has. Of sources that gather, tokens and extents besides.
struct TileOperands {
  // VisibleTiles of the tile; where tokens are gathered, extents tell.
  bool seen = true, whole = false;
  int64_t row = 0, key = 0;
  const float* tau = nullptr;                            // per query
  const float *key_bias = nullptr, *key_gain = nullptr;  // per key
  const Vec<float, 4>* numbers = nullptr;                // per query: L or n, its rest, D - d_L
  const int *row_token = nullptr, *key_token = nullptr;
  const Extent *row_parts = nullptr, *key_parts = nullptr;  // of 16 each
};

template <class Element, ScoreKind Kind, bool kKeysAsRows, int kStrips, int kTiles,
          KeySource Source>
struct ScoreTile {
  using F = Fragment<kStrips, kTiles>;
  static constexpr bool kPlain = Kind::kPlain, kGathers = Source::kGathers;
  static constexpr int kLines = 16 * kStrips, kColumns = 8 * kTiles;
  static constexpr int kQueries = kKeysAsRows ? kColumns : kLines;
  static constexpr int kKeys = kKeysAsRows ? kLines : kColumns;

  const ScoreParams& p;
  const ScoreInputs<Element>& in;
  const typename Source::WorkItem& item;
  const Source& source;
  const Kind& kind;
  TileOperands operands;

  HW_DEVICE static HW_INLINE int query(int s, int j, int i) {
    return kKeysAsRows ? F::column(j, i) : F::row(s, i);
  }
  HW_DEVICE static HW_INLINE int key(int s, int j, int i) {
    return kKeysAsRows ? F::row(s, i) : F::column(j, i);
  }

  // Whether no query of the fragment sees a key of it.
  HW_DEVICE HW_INLINE bool unseen() const {
    if constexpr (kGathers)
      return !may_meet(item.mask, row_extent(), key_extent());
    else
      return !operands.seen;
  }
  HW_DEVICE HW_INLINE bool soft() const { return Kind::kSoftmax || is_softmax(p.activation); }

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
    if constexpr (kGathers) {
      if (p.bias) add_bias_by_position(x);
    } else {
      if (p.bias) add_bias(x);
    }
  }

  // -inf where a query does not see a key.
  HW_DEVICE HW_INLINE void hide(F& x) const {
    if constexpr (kGathers)
      hide_by_position(x);
    else
      hide_in_order(x);
  }
  HW_DEVICE HW_INLINE void hide_in_order(F& x) const {
    if constexpr (Kind::kSets) set_scores(x);
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
    const int64_t seen = item.mask.visible_keys(row_position(q)).count();
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
    if constexpr (Kind::kSets) {
      if (kind.sets()) {
        const SetScores set(*this);
        return differentiate_but(x, dp, unit, set);
      }
    }
    differentiate_but(x, dp, unit, [](int, int, int) { return false; });
  }

  // The same; scores of which constant(strip, j, i) says so have no gradient.
  template <class Constant>
  HW_DEVICE HW_INLINE void differentiate_but(F& x, F& dp, float unit,
                                             const Constant& constant) const {
    each_query([&](const Terms& t, auto&& each) {
      each([&](int s, int j, int i) {
        const float score = x.at[s][j][i], p_ij = weight(score, t, unit);
        const float slope =
            soft() ? p_ij
                   : static_cast<float>(activation_slope(p.activation, Fast(score))) * t.base;
        x.at[s][j][i] = p_ij;
        dp.at[s][j][i] = constant(s, j, i) ? 0.0f : slope * (dp.at[s][j][i] - t.extra);
      });
    });
  }

  // ds in place of dp of a softmax, given p(strip, j) of the lane's four elements of a tile.
  template <class Weights>
  HW_DEVICE HW_INLINE void differentiate_given(F& dp, const Weights& p_of) const {
    static_assert(kPlain && kKeysAsRows && !Kind::kSets, "slopes are weights");
    HW_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const float extra[2] = {terms_of(F::column(j, 0)).extra, terms_of(F::column(j, 1)).extra};
      HW_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        const Vec<float, 4> weights = p_of(s, j);
        HW_UNROLL
        for (int i = 0; i < 4; ++i) dp.at[s][j][i] = weights.v[i] * (dp.at[s][j][i] - extra[i % 2]);
      }
    }
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
    const int64_t row = row_position(q);
    return row >= p.gain_begin && row < p.gain_end;
  }

  // Positions of a query and of a key of the fragment; negative where there is none.
  using Position = std::conditional_t<kGathers, int, int64_t>;
  HW_DEVICE HW_INLINE Position row_position(int q) const {
    if constexpr (kGathers) {
      const int token = operands.row_token[q], slot = static_cast<int>(operands.row) + q;
      return token < 0 ? token : static_cast<int>(source.row_position(item, slot, token));
    } else {
      return operands.row + q;
    }
  }
  HW_DEVICE HW_INLINE Position key_position(int k) const {
    if constexpr (kGathers) {
      const int token = operands.key_token[k], slot = static_cast<int>(operands.key) + k;
      return token < 0 ? token : static_cast<int>(source.key_position(item, slot, token));
    } else {
      return operands.key + k;
    }
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

  // Which scores of the fragment are set: what is asked of a line is found once.
  struct SetScores {
    const ScoreTile& tile;
    Position line[kStrips][2];  // queries as rows: the key whose score is set; else the line's key

    HW_DEVICE HW_INLINE explicit SetScores(const ScoreTile& t) : tile(t) {
      HW_UNROLL
      for (int n = 0; n < 2 * kStrips; ++n)
        line[n / 2][n % 2] = t.set_by(t.line_position(F::row(n / 2, n % 2 * 2)));
    }
    HW_DEVICE HW_INLINE bool operator()(int s, int j, int i) const {
      return tile.is_set(line[s][i / 2], tile.column_position(F::column(j, i)));
    }
  };
  HW_DEVICE HW_INLINE Position set_by(Position line) const {
    if (line < 0) return kNever;
    if constexpr (kKeysAsRows) return line;
    const int64_t key = kind.set_key(item.mask, line);
    return key < 0 ? kNever : static_cast<Position>(key);
  }
  HW_DEVICE HW_INLINE bool is_set(Position line, Position column) const {
    if constexpr (!kKeysAsRows) return column == line;
    return column >= 0 && kind.set_key(item.mask, column) == line;
  }
  // What stands in the place of such a score.
  HW_DEVICE HW_INLINE float set_score() const {
    constexpr float kScore = static_cast<float>(Kind::kSetScore);
    return kPlain ? kScore / in.scale : kScore;
  }
  HW_DEVICE HW_INLINE void set_scores(F& x) const {
    if (!kind.sets()) return;
    const SetScores set(*this);
    F::each([&](int s, int j, int i) {
      if (set(s, j, i)) x.at[s][j][i] = set_score();
    });
  }

  HW_DEVICE HW_INLINE Position line_position(int line) const {
    return kKeysAsRows ? key_position(line) : row_position(line);
  }
  HW_DEVICE HW_INLINE Position column_position(int column) const {
    return kKeysAsRows ? row_position(column) : key_position(column);
  }

  // ---- Gathered

  HW_DEVICE HW_INLINE Extent row_extent() const {
    return merged<kQueries / 16>(operands.row_parts);
  }
  HW_DEVICE HW_INLINE Extent key_extent() const { return merged<kKeys / 16>(operands.key_parts); }

  // A zero key has no bias. What is added where there is no token is hidden.
  HW_DEVICE HW_INLINE void add_bias_by_position(F& x) const {
    const Ref<const Element, 4> b = p.bias.template as<const Element>();
    const Element* from = b.at(item.at.batch, item.head);
    F::each([&](int s, int j, int i) {
      const Position q = row_position(query(s, j, i)), k = key_position(key(s, j, i));
      if (q >= 0 && k >= 0)
        x.at[s][j][i] += static_cast<float>(from[q * b.stride[2] + k * b.stride[3]]);
    });
  }

  // Also sets scores. Every row sees a zero key.
  HW_DEVICE HW_INLINE void hide_by_position(F& x) const {
    if (all_meet(item.mask, row_extent(), key_extent(), kind)) return;
    const int zero_key = kKeysAsRows ? kNever : kZeroKey;  // of no matter where keys have results
    int begin[kStrips][2], end[kStrips][2], set[kStrips][2];  // columns that a line meets
    HW_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      HW_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Met met = met_by(line_position(F::row(s, 2 * half)));
        begin[s][half] = met.begin, end[s][half] = met.end, set[s][half] = met.set;
      }
    }
    F::each([&](int s, int j, int i) {
      const int column = column_position(F::column(j, i));
      const bool seen = column == zero_key || (column >= begin[s][i / 2] && column < end[s][i / 2]);
      if (!seen) x.at[s][j][i] = -kInfinity;
      if constexpr (Kind::kSets)
        if (seen && is_set(set[s][i / 2], column)) x.at[s][j][i] = set_score();
    });
  }

  // Positions of the columns that a line meets; see set_by().
  struct Met {
    int begin, end, set;
  };
  HW_DEVICE HW_INLINE Met met_by(int line) const {
    if (line < 0) return {0, 0, kNever};
    const Range range = kKeysAsRows ? item.mask.seeing_rows(line) : item.mask.visible_keys(line);
    const int begin = static_cast<int>(range.begin), end = static_cast<int>(range.end);
    if constexpr (!Kind::kSets)
      return {begin, end, kNever};
    else
      return {begin, end, kind.sets() ? set_by(line) : kNever};
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
