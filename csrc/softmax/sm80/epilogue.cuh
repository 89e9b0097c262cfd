// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: what becomes of a row's sums, in the forward kernel and, where keys
// are cut into spans, in the kernel that merges their partial results,
//
//   o = g ((1 - u) w + u v)       w = sum_j e^(s_j - M) v_j / l
//
// the row statistic and the read-outs.
#pragma once

#include <cmath>

#include "softmax/online.h"
#include "softmax/sm80/layout.h"
#include "softmax/sm80/score.cuh"

namespace hw::softmax::sm80 {

// Exponents are unit (score - max), to base 2; natural = unit ln 2 (plain: scale, otherwise 1), and
// `inverse` is 1 / natural.
struct Units {
  float unit = kLog2e, natural_ = 1, inverse = 1;

  HW_DEVICE HW_INLINE float exp(float difference) const {
    return dev::exp2_fast(difference * unit);
  }
  HW_DEVICE HW_INLINE float log(float x) const { return std::log2(x) * kLn2; }
  HW_DEVICE HW_INLINE float natural(float score) const { return score * natural_; }
  HW_DEVICE HW_INLINE float kept(float natural) const { return natural * inverse; }
  // As replays see it (ScoreTile::distance).
  HW_DEVICE HW_INLINE float distance(float score, float natural) const {
    return fmaf(-natural, inverse, score) * natural_;
  }
};

// Partial results of the spans.
struct Partials {
  float *values = nullptr, *sums = nullptr;  // [spans, rows, Dv], [spans, rows, kSumsOfRow]; of the
                                             // sums, plain ones have the first two
  int64_t rows = 0, columns = 0;             // rows = [N, Hq, max_q]

  HW_DEVICE HW_INLINE float* values_of(int64_t span, int64_t row) const {
    return values + (span * rows + row) * columns;
  }
  HW_DEVICE HW_INLINE float* sums_of(int64_t span, int64_t row) const {
    return sums + (span * rows + row) * kSumsOfRow;
  }
};

// Writes what becomes of rows. Plain: softmaxes without read-outs; kOwnValues: rows have values of
// their own, which identity_mix takes.
template <class Element, ScoreKind Kind, bool kOwnValues>
struct Finish {
  static constexpr bool kPlain = Kind::kPlain;
  const ForwardParams& f;
  const Output<Element>& o;
  const Output<Element>& w;
  const WorkItem& item;
  Units units;

  // Row statistic and read-outs of a row (one lane of those that have it: writes = true); returns
  // the factor of its values.
  HW_DEVICE HW_INLINE float finalize(const SlotResult& row, const RowSums<float>& r,
                                     bool writes) const {
    if (!Kind::kSoftmax && !is_softmax(f.activation)) return normalize(row, r, writes);
    const RowResult<float> x =
        finalize_softmax(r, extra_logit<float>(f, item.at.batch, item.head), units);
    if (writes) put(f.row, row, x.row), put(f.rest, row, x.rest);
    if constexpr (!kPlain) {
      if (writes) {
        put(f.entropy, row, x.entropy);
        put(f.p_max, row, x.p_max);
        put(f.sq_norm, row, x.sq_norm);
        put(f.mass, row, x.mass);
      }
    }
    return x.factor;
  }

  // x[j][i]: columns first + 8 j + i of w (before gate and mix). Whole warp.
  template <int kTiles>
  HW_DEVICE HW_INLINE void write(const SlotResult& row, int first, float (&x)[kTiles][2]) const {
    const int64_t batch = item.at.batch, number = item.at.q_begin + row.position;
    const bool exists = row.at >= 0;
    if (f.w) store_pairs(row_of(w, row.at), exists, first, w, x);
    if (kOwnValues && f.identity_mix && exists) mix(number, first, x);
    if (f.head_gate && exists) {
      const float g = f.head_gate.template as<const float>()(batch, number, item.head);
      HW_UNROLL
      for (int j = 0; j < kTiles; ++j) x[j][0] *= g, x[j][1] *= g;
    }
    store_pairs(row_of(o, row.at), exists, first, o, x);
  }

 private:
  // (1 - u) w + u v, kTogether pairs at a time, which then take their turn at the front: all at
  // once need more registers than there are.
  template <int kTiles>
  HW_DEVICE HW_INLINE void mix(int64_t token, int first, float (&x)[kTiles][2]) const {
    const float u = f.identity_mix.template as<const float>()(item.at.batch, item.head);
    const Ref<const Element, 4> v = f.v.template as<const Element>();
    const Element* own = v.at(item.at.batch, token, item.key_head, first);
    const int end = static_cast<int>(f.value_dim()) - first;
    const int64_t step = v.stride[3];
    constexpr int kTogether = min_of(kTiles, 4);
    HW_UNROLL_BY(1)
    for (int at = 0; at < 8 * kTiles; at += 8 * kTogether) {
      float mixed[kTogether][2];
      HW_UNROLL
      for (int n = 0; n < 2 * kTogether; ++n) {
        const int j = n / 2, i = n % 2, column = at + 8 * j + i;
        const float value = column < end ? static_cast<float>(own[column * step]) : 0.0f;
        mixed[j][i] = (1.0f - u) * x[j][i] + u * value;
      }
      HW_UNROLL
      for (int n = 0; n < 2 * (kTiles - kTogether); ++n)
        x[n / 2][n % 2] = x[n / 2 + kTogether][n % 2];
      HW_UNROLL
      for (int n = 0; n < 2 * kTogether; ++n)
        x[kTiles - kTogether + n / 2][n % 2] = mixed[n / 2][n % 2];
    }
  }

  HW_DEVICE HW_INLINE Ref<Element, 1> row_of(const Output<Element>& to, int64_t result) const {
    const Ref<Element, 4>& r = to.ref;
    return {r.at(item.at.batch, max_of<int64_t>(result, 0), item.head), {r.size[3]}, {r.stride[3]}};
  }

  HW_DEVICE HW_INLINE float normalize(const SlotResult& row, const RowSums<float>& r,
                                      bool writes) const {
    const float n = f.normalizer == Normalizer::sum ? r.sum
                    : f.normalizer == Normalizer::length
                        ? static_cast<float>(item.mask.visible_keys(row.position).count())
                        : 1.0f;
    if (writes && f.normalizer == Normalizer::sum) put(f.row, row, n), put(f.rest, row, 0.0f);
    return n != 0.0f ? 1.0f / n : 0.0f;
  }

  HW_DEVICE HW_INLINE void put(const Ref<void, 3>& to, const SlotResult& row, float value) const {
    if (to) to.template as<float>()(item.at.batch, item.head, row.at) = value;
  }
};

// Merges the spans of a row, in their order. A warp per row.
template <class Element, ScoreKind Kind, KeySource Source>
struct MergeKernel {
  static constexpr int kWarps = 4, kThreads = kWarps * dev::kWarp;
  static constexpr bool kPlain = Kind::kPlain, kGathers = Source::kGathers;
  struct Params {
    Source source;
    ForwardParams f;
    Output<Element> o, w;
    Partials partials;
    int64_t spans;
    Units units;
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t index = static_cast<int64_t>(dev::block_index_x()) * kWarps + dev::warp();
    if (index >= p.partials.rows) return;
    const int64_t slot = index % p.f.max_q, heads = p.f.query_heads();
    const int head = static_cast<int>(index / p.f.max_q % heads);
    const auto item = p.source.work_item(p.f, index / p.f.max_q / heads, head);
    if (slot >= p.source.rows(item)) return;
    const SlotResult row = slot_result<false>(p.source, item, slot, token_of(p.source, item, slot));
    if (row.at < 0) return;
    RowSums<float> whole;
    whole.clear();
    for (int64_t span = 0; span < p.spans; ++span)
      whole.max = dev::larger(whole.max, p.partials.sums_of(span, index)[0]);
    const float top = whole.max;
    for (int64_t span = 0; span < p.spans; ++span) {
      RowSums<float> part = sums(p, span, index);
      part.move_to(top, p.units);
      whole.add(part);
    }
    const Finish<Element, Kind, !kGathers> finish{p.f, p.o, p.w, item, p.units};
    const float factor = finish.finalize(row, whole, dev::lane() == 0);
    const int columns = static_cast<int>(p.partials.columns);
    for (int column = 2 * dev::lane(); column < columns; column += 2 * dev::kWarp) {
      float x[1][2] = {};
      for (int64_t span = 0; span < p.spans; ++span) {
        const float* value = p.partials.values_of(span, index) + column;
        RowSums<float> part{p.partials.sums_of(span, index)[0], 0, 0, 0, 0};
        const float share = part.move_to(top, p.units);
        x[0][0] += share * value[0];
        x[0][1] += share * value[1];  // behind an odd last column a number that is not stored
      }
      x[0][0] *= factor, x[0][1] *= factor;
      finish.write(row, column, x);
    }
  }

  HW_DEVICE static HW_INLINE int token_of(const Source& source,
                                          const typename Source::WorkItem& item, int64_t slot) {
    if constexpr (!kGathers) return 0;
    const int n = static_cast<int>(slot);
    return static_cast<int>(source.row_token(item, n, source.row_entry(item, n)));
  }

  HW_DEVICE static HW_INLINE RowSums<float> sums(const Params& p, int64_t span, int64_t index) {
    const float* s = p.partials.sums_of(span, index);
    if constexpr (kPlain) return {s[0], s[1], 0, 0, 0};
    return {s[0], s[1], s[2], s[3], s[4]};
  }
};

}  // namespace hw::softmax::sm80
