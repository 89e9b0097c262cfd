// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: the loop of all passes that know the row statistics.
//
// A block owns 64 queries and walks over tiles of the keys they see (loop R2), or owns 64 keys and
// walks over tiles of the queries that see them (loop C, kKeysDown). Each side has a first tensor,
// q or k, whose products are the scores, and may have a second one, d_w or x of the queries, v of
// the keys. Each of 4 warps holds 16 own rows and, of a tile, in registers
//
//   s, p      [own 16, other]   of first own times first other
//   dp, ds    [own 16, other]   of second own times second other
//
// which are then the A operands of products with the other side's tiles. The other side has two
// stages, filled by cp.async in turn.
#pragma once

#include "ops/attention/attention_sm80_layout.cuh"
#include "ops/attention/attention_sm80_score.cuh"

namespace hw::attention::sm80 {

// Inputs of a loop besides q and k. `extra`: one more number per query, D - d_L or a weight.
template <class Element>
struct LoopInputs {
  ScoreInputs<Element> in;
  Input<Element> of_queries, of_keys;  // second tensors, [B, S, heads, width]; may be absent
  Ref<const void, 3> statistic;        // [B, Hq, Sq] or absent
  Ref<const void, 3> extra;            // [B, Hq, Sq] or absent
  float unit;                          // exponents are unit x - base, to base 2
};

template <class Element, int kDim, bool kPlain, bool kKeysDown_, bool kOwnSecond_>
struct Loop {
  static constexpr bool kKeysDown = kKeysDown_, kOwnSecond = kOwnSecond_;
  static constexpr int kWarps = 4, kThreads = kWarps * dev::kWarp;
  static constexpr int kOwn = LoopTiles::kOwn, kOther = LoopTiles::others(kDim, kPlain);
  static constexpr int kQueries = kKeysDown ? kOther : kOwn, kKeys = kKeysDown ? kOwn : kOther;
  static_assert(kOwn == 16 * kWarps, "a strip per warp");
  using Pairs = Fragment<1, kOther / 8>;
  using Score = ScoreTile<Element, kPlain, kKeysDown, 1, kOther / 8>;
  using Values = Fragment<1, kDim / 8>;  // [own 16, columns]: what a warp sums up

  struct QueryNumbers {
    float statistic[kQueries], extra[kQueries];
    If<!kPlain, float[kQueries]> tau;
  };
  struct KeyNumbers {
    float bias[kKeys], gain[kKeys];
  };
  using NoKeyNumbers = If<!kPlain, KeyNumbers>;
  using OwnNumbers = std::conditional_t<kKeysDown, NoKeyNumbers, QueryNumbers>;
  using OtherNumbers = std::conditional_t<kKeysDown, QueryNumbers, NoKeyNumbers>;

  struct Stage {
    Tile<Element, kOther, kDim> first, second;
    OtherNumbers numbers;
  };
  struct Smem {
    Tile<Element, kOwn, kDim> first_own;
    If<kOwnSecond, Tile<Element, kOwn, kDim>> second_own;
    Stage stage[2];
    OwnNumbers numbers;
    Place place;
    int64_t first;  // own row of the block, in its sequence
  };
  static_assert(sizeof(Smem) <= kSharedLimit, "shared memory of every architecture from sm_80 on");

  const ScoreParams& p;
  const LoopInputs<Element>& inputs;
  Smem& smem;
  const Place& place;    // in shared memory: registers are short
  const int64_t& first;  // likewise

  HW_DEVICE HW_INLINE Loop(const ScoreParams& params, const LoopInputs<Element>& in, Smem& s)
      : p(params), inputs(in), smem(s), place(s.place), first(s.first) {}

  // Goes to the own rows from `first_row` on of a head of a sequence, once all warps are done with
  // those before.
  HW_DEVICE HW_INLINE void go(int64_t sequence, int head, int64_t first_row) {
    dev::sync_block();
    if (dev::thread_index() == 0) {
      smem.place = place_of(p, sequence, head);
      smem.first = first_row;
    }
    dev::sync_block();
  }

  // Own row of this warp, in the block.
  HW_DEVICE HW_INLINE static int warp_row() { return dev::warp() * 16; }

  HW_DEVICE HW_INLINE Range own() const {
    return {first, min_of(first + kOwn, kKeysDown ? place.mask.keys : place.mask.rows)};
  }

  // What the own rows meet.
  HW_DEVICE HW_INLINE Range others() const {
    const Range meets = kKeysDown ? place.mask.rows_of(own()) : place.mask.keys_of(own());
    return meets.empty() ? Range{0, 0} : meets;
  }

  // visit(stage, score) at every tile of `range` of which the warp sees something.
  template <class Visit>
  HW_DEVICE HW_INLINE void walk(const Range& range, const Visit& visit) {
    if (range.empty()) return;
    prefetch_own();
    walk_stages(
        static_cast<int>(range.begin / kOther),
        static_cast<int>(ceil_div<int64_t>(range.end, kOther)),
        [&](int tile) { prefetch(smem.stage[tile & 1], static_cast<int64_t>(tile) * kOther); },
        [&](int tile) {
          const Stage& stage = smem.stage[tile & 1];
          const Score score{p, inputs.in, place, spot(stage, static_cast<int64_t>(tile) * kOther)};
          if (!score.unseen()) visit(stage, score);
        });
  }

  // The first products of a tile: c = <q, k>.
  HW_DEVICE HW_INLINE void products(Pairs& c, const Stage& stage) const {
    c.clear();
    multiply_rows<Element>(c, smem.first_own, warp_row(), stage.first);
  }
  // The second: dp = <d_w, v>.
  HW_DEVICE HW_INLINE void second_products(Pairs& dp, const Stage& stage) const {
    dp.clear();
    multiply_rows<Element>(dp, smem.second_own, warp_row(), stage.second);
  }

  // Own row of the lane in either half of its strip, counted in the sequence.
  HW_DEVICE HW_INLINE int64_t own_row(int half) const {
    return first + warp_row() + Values::row(0, 2 * half);
  }

  // Row `at` of the own side's tensor [B, S, heads, columns].
  template <class T>
  HW_DEVICE HW_INLINE Ref<T, 1> row_of(const Ref<T, 4>& x, int64_t at, int head) const {
    const int64_t token = (kKeysDown ? place.at.k_begin : place.at.q_begin) + at;
    return {x.at(place.at.batch, token, head), {x.size[3]}, {x.stride[3]}};
  }

  // Writes factor(half) times the sums of the own rows that exist.
  template <class Factor>
  HW_DEVICE HW_INLINE void store(const Output<Element>& to, int head, const Values& sums,
                                 const Factor& factor) const {
    HW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t at = own_row(half);
      if (at >= own().end) continue;
      const Ref<Element, 1> row = row_of(to.ref, at, head);
      const float times = factor(half);
      HW_UNROLL
      for (int j = 0; j < Values::kTiles; ++j)
        if (const int column = Values::column(j, 0); column < row.size[0])
          store_pair(row, column, to.paired, sums.at[0][j][2 * half] * times,
                     sums.at[0][j][2 * half + 1] * times);
    }
  }

  // Adds up the lanes' shares of the own keys' sums, [B, Hq, Sk] where wanted.
  HW_DEVICE HW_INLINE void store_sums(const Ref<void, 3>& to, const float (&share)[2]) const {
    static_assert(kKeysDown, "sums of keys");
    if (!to) return;
    HW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = dev::warp_sum<4>(share[half]);
      store_of_key(to, half, sum);
    }
  }
  HW_DEVICE HW_INLINE void store_of_key(const Ref<void, 3>& to, int half, float value) const {
    const int64_t at = own_row(half);
    if (dev::lane() % 4 == 0 && at < own().end)
      to.template as<float>()(place.at.batch, place.head, place.at.k_begin + at) = value;
  }

 private:
  HW_DEVICE HW_INLINE void prefetch_own() {
    if constexpr (kKeysDown) {
      load_tile<kThreads>(smem.first_own, key_rows(inputs.in.k, place, first));
      if constexpr (kOwnSecond)
        load_tile<kThreads>(smem.second_own, key_rows(inputs.of_keys, place, first));
      load_key_numbers(smem.numbers, first);
    } else {
      load_tile<kThreads>(smem.first_own, query_rows(inputs.in.q, place, first));
      if constexpr (kOwnSecond)
        load_tile<kThreads>(smem.second_own, query_rows(inputs.of_queries, place, first));
      load_query_numbers(smem.numbers, first);
    }
  }

  HW_DEVICE HW_INLINE void prefetch(Stage& stage, int64_t at) {
    const Input<Element>& second = kKeysDown ? inputs.of_queries : inputs.of_keys;
    if constexpr (kKeysDown) {
      load_tile<kThreads>(stage.first, query_rows(inputs.in.q, place, at));
      if (second.ref) load_tile<kThreads>(stage.second, query_rows(second, place, at));
      load_query_numbers(stage.numbers, at);
    } else {
      load_tile<kThreads>(stage.first, key_rows(inputs.in.k, place, at));
      if (second.ref) load_tile<kThreads>(stage.second, key_rows(second, place, at));
      load_key_numbers(stage.numbers, at);
    }
  }

  HW_DEVICE HW_INLINE void load_query_numbers(QueryNumbers& to, int64_t at) const {
    query_numbers<kQueries, kThreads>(to.statistic, inputs.statistic, place, at);
    query_numbers<kQueries, kThreads>(to.extra, inputs.extra, place, at);
    if constexpr (!kPlain) temperatures<kQueries, kThreads>(to.tau, p.row_temperature, place, at);
  }
  HW_DEVICE HW_INLINE void load_key_numbers(NoKeyNumbers& to, int64_t at) const {
    if constexpr (!kPlain) {
      key_numbers<kKeys, kThreads>(to.bias, p.key_bias, place, at);
      key_numbers<kKeys, kThreads>(to.gain, p.key_gain, place, at);
    }
  }

  // The warp's pairs of a tile.
  HW_DEVICE HW_INLINE Spot spot(const Stage& stage, int64_t other) const {
    const int64_t mine = first + warp_row();
    Spot at{kKeysDown ? other : mine, kKeysDown ? mine : other};
    if constexpr (kKeysDown) {
      point_to(at, stage.numbers, 0, smem.numbers, warp_row());
    } else {
      point_to(at, smem.numbers, warp_row(), stage.numbers, 0);
    }
    return at;
  }
  HW_DEVICE HW_INLINE static void point_to(Spot& at, const QueryNumbers& queries, int query,
                                           const NoKeyNumbers& keys, int key) {
    at.statistic = queries.statistic + query;
    at.extra = queries.extra + query;
    if constexpr (!kPlain) {
      at.tau = queries.tau + query;
      at.key_bias = keys.bias + key;
      at.key_gain = keys.gain + key;
    }
  }
};

}  // namespace hw::attention::sm80
