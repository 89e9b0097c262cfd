// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: the loop of all passes that know the row statistics.
//
// A block owns kOwn queries and walks over tiles of the keys they see (loop R2), or owns kOwn keys
// and walks over tiles of the queries that see them (loop C, kKeysAsRows). Each side has a first
// tensor, q or k, whose products are the scores, and may have a second one, d_w or x of the
// queries, v of the keys. Each warp holds 16 kStrips own rows and, of a tile, in registers
//
//   s, p      [16 kStrips, kOther]   of first own times first other
//   dp, ds    [16 kStrips, kOther]   of second own times second other
//
// which are then the A operands of products with the other side's tiles. The other side has two
// stages, filled by cp.async in turn.
#pragma once

#include "softmax/sm80/layout.h"
#include "softmax/sm80/score.cuh"

namespace hw::softmax::sm80 {

// Inputs of a loop besides q and k. `extra`: one more number per query, D - d_L or a weight.
template <class Element>
struct LoopInputs {
  ScoreInputs<Element> in;
  Input<Element> of_queries, of_keys;  // second tensors, [B, S, heads, width]; may be absent
  Ref<const void, 3> statistic, rest;  // [B, Hq, Sq] or absent
  Ref<const void, 3> extra;            // [B, Hq, Sq] or absent
  float unit;                          // exponents are unit (x - base) - rest, to base 2
};

// Cut: the third axis, tiles of a block (Cut::Loop, as LoopTiles of sm80/layout.h).
template <class Element, int kDim, ScoreKind Kind_, bool kKeysAsRows_, bool kOwnSecond_,
          KeySource Source_, class Cut>
struct Loop {
  using Tiles = typename Cut::Loop;
  using Source = Source_;
  using Kind = Kind_;
  using WorkItem = typename Source::WorkItem;
  static constexpr bool kKeysAsRows = kKeysAsRows_, kOwnSecond = kOwnSecond_;
  static constexpr bool kPlain = Kind::kPlain, kGathers = Source::kGathers;
  // Warps of a team, which have the same rows: see PairedKeyGradKernel.
  static constexpr bool kTeams =
      kKeysAsRows && kOwnSecond && !kGathers && Tiles::has_teams(kDim, kPlain);
  static constexpr int kTeam = kTeams ? 2 : 1;
  static constexpr int strips() {
    if constexpr (kTeam == 2)
      return Tiles::strips_of_teams(kDim);
    else
      return kOwnSecond && !kKeysAsRows ? Tiles::strips_of_queries(kDim, kPlain) : 1;
  }
  static constexpr int others_of_tile() {
    if constexpr (kTeam == 2)
      return Tiles::kOthersOfTeams;
    else
      return Tiles::others(kDim, kPlain);
  }
  static constexpr int kStrips = strips();
  static constexpr int kWarps = Tiles::kWarps, kThreads = kWarps * dev::kWarp;
  static constexpr int kOwn = 16 * kStrips * kWarps / kTeam, kOther = others_of_tile();
  static constexpr int kQueries = kKeysAsRows ? kOther : kOwn, kKeys = kKeysAsRows ? kOwn : kOther;
  using Scores = Fragment<kStrips, kOther / 8>;
  using Score = ScoreTile<Element, Kind, kKeysAsRows, kStrips, kOther / 8, Source>;
  using Values = Fragment<kStrips, kDim / 8>;  // [own 16 kStrips, columns]: what a warp sums up

  using OwnList = SlotList<Source, kKeysAsRows>;
  using OtherList = SlotList<Source, !kKeysAsRows>;

  struct QueryNumbers {
    Vec<float, 4> of[kQueries];  // statistic, its rest, extra, nothing
    If<!kPlain, float[kQueries]> tau;
  };
  struct KeyNumbers {
    float of[2][kKeys];  // bias, gain
  };
  using NoKeyNumbers = If<!kPlain, KeyNumbers>;
  using OwnNumbers = std::conditional_t<kKeysAsRows, NoKeyNumbers, QueryNumbers>;
  using OtherNumbers = std::conditional_t<kKeysAsRows, QueryNumbers, NoKeyNumbers>;

  struct Stage {
    Tile<Element, kOther, kDim> first, second;
    OtherNumbers numbers;
  };
  struct Smem {
    Tile<Element, kOwn, kDim> first_own;
    If<kOwnSecond, Tile<Element, kOwn, kDim>> second_own;
    Stage stage[2];
    OwnNumbers numbers;
    WorkItem item;
    int64_t first;  // own slot of the block
    int64_t sequence;
    int owner;  // of keys
    If<!kGathers, VisibleTiles[kWarps]> visible;
    If<kGathers, GatheredTiles<kOwn, kOther>> tokens;
  };
  static_assert(sizeof(Smem) <= kSharedLimit, "shared memory of every architecture from sm_80 on");

  const ScoreParams& p;
  const LoopInputs<Element>& inputs;
  const Source& source;
  const Kind& kind;
  Smem& smem;
  const WorkItem& item;  // in shared memory: registers are short
  const int64_t& first;  // likewise
  If<!kGathers, UnitStream<kOther, kDim / 8, kThreads, Element>> first_units, second_units;
  If<!kGathers && kKeysAsRows, NumberStream<3, kQueries, 4, 1, kThreads>> query_stream;
  If<!kGathers && !kKeysAsRows && !kPlain, NumberStream<2, kKeys, 1, kKeys, kThreads>> key_stream;

  HW_DEVICE HW_INLINE Loop(const ScoreParams& params, const LoopInputs<Element>& in,
                           const Source& from, const Kind& score_kind, Smem& s)
      : p(params),
        inputs(in),
        source(from),
        kind(score_kind),
        smem(s),
        item(s.item),
        first(s.first) {}

  // Goes to the own rows from `first_row` on of a head of a sequence, once all warps are done with
  // those before.
  HW_DEVICE HW_INLINE void go(int64_t sequence, int head, int64_t first_row) {
    dev::sync_block();
    start(sequence, first_row);
    take(head);
  }

  // The same in two steps, for one head after the other of the same rows: what is in shared memory
  // takes no registers meanwhile.
  HW_DEVICE HW_INLINE void start(int64_t sequence, int64_t first_row, int owner = 0) {
    if (dev::thread_index() != 0) return;
    smem.sequence = sequence, smem.first = first_row, smem.owner = owner;
  }
  HW_DEVICE HW_INLINE void take(int head) {
    dev::sync_block();
    if (dev::thread_index() == 0) smem.item = source.work_item(p, smem.sequence, head);
    dev::sync_block();
    if constexpr (kGathers) {
      const OwnList list(source, item);
      TokenPrefetch<kThreads, kOwn, OwnList>(list, static_cast<int>(first)).fill(smem.tokens.own);
      dev::sync_block();
    }
  }

  // Own row of this warp, in the block.
  HW_DEVICE HW_INLINE static int warp_row() { return dev::warp() / kTeam * 16 * kStrips; }

  HW_DEVICE HW_INLINE Range own() const {
    const int64_t slots = kKeysAsRows ? source.keys(item) : source.rows(item);
    return {first, min_of(first + kOwn, slots)};
  }

  // Slots that the own ones may meet.
  HW_DEVICE HW_INLINE Range others() const {
    if constexpr (kGathers) return gathered_others();
    const Range meets = kKeysAsRows ? item.mask.rows_of(own()) : item.mask.keys_of(own());
    return meets.empty() ? Range{0, 0} : meets;
  }

  HW_DEVICE HW_INLINE Range gathered_others() const {
    const Extent extent = smem.tokens.own.extent();
    if (extent.none()) return {0, 0};
    if (kKeysAsRows || !source.keys_in_order()) return {0, OtherList(source, item).slots};
    const Range keys = item.mask.keys_of(extent.range());
    return keys.empty() ? Range{0, 0} : keys;
  }

  // visit(stage, score) at every tile of `range` of which the warp sees something.
  template <class Visit>
  HW_DEVICE HW_INLINE void walk(const Range& range, const Visit& visit) {
    if (range.empty()) return;
    prefetch_own();
    const int begin = static_cast<int>(range.begin / kOther);
    const int end = static_cast<int>(ceil_div<int64_t>(range.end, kOther));
    if constexpr (!kGathers) start_streams(begin);
    if constexpr (kGathers) {
      const OtherList list(source, item);
      TokenPrefetch<kThreads, kOther, OtherList>(list, begin * kOther)
          .fill(smem.tokens.other[begin % 3]);
      dev::sync_block();
    }
    walk_stages(
        begin, end, [&](int tile) { prefetch_tile(tile); },
        [&](int tile) {
          const Stage& stage = smem.stage[tile & 1];
          const Score score{p, inputs.in, item, source, kind, operands(stage, tile)};
          if (!score.unseen()) visit(stage, score);
        });
  }

  // The first products of a tile: c = <q, k>.
  HW_DEVICE HW_INLINE void products(Scores& c, const Stage& stage) const {
    c.clear();
    multiply_rows<Element>(c, smem.first_own, warp_row(), stage.first);
  }
  // The second: dp = <d_w, v>. Own tiles share an address: registers are short.
  HW_DEVICE HW_INLINE void second_products(Scores& dp, const Stage& stage) const {
    dp.clear();
    const auto own = MatrixLoads<Tile<Element, kOwn, kDim>>::left(smem.first_own, warp_row());
    const auto other = MatrixLoads<Tile<Element, kOther, kDim>>::right(stage.second, 0);
    multiply_rows<Element>(dp, own.moved(smem.first_own, smem.second_own), other);
  }

  // Own slot of the lane in either half of a strip.
  HW_DEVICE HW_INLINE int64_t own_row(int half, int strip = 0) const {
    return first + warp_row() + Values::row(strip, 2 * half);
  }

  HW_DEVICE HW_INLINE SlotResult own_result(int half, int strip = 0) const {
    const int64_t slot = own_row(half, strip);
    if (slot >= own().end) return SlotResult::none();
    int token = 0;
    if constexpr (kGathers) token = smem.tokens.own.at[slot - first];
    return slot_result<kKeysAsRows>(source, item, slot, token);
  }

  // Row `at` of the own side's results [B, S, heads, columns].
  template <class T>
  HW_DEVICE HW_INLINE Ref<T, 1> row_of(const Ref<T, 4>& x, int64_t at, int head) const {
    return {x.at(item.at.batch, at, head), {x.size[3]}, {x.stride[3]}};
  }

  // Writes factor(half) times the sums of the own rows that exist.
  template <class T, class Factor>
  HW_DEVICE HW_INLINE void store(const Output<T>& to, int head, const Values& sums,
                                 const Factor& factor) const {
    HW_UNROLL
    for (int n = 0; n < 2 * kStrips; ++n) {
      const int strip = n / 2, half = n % 2;
      const int64_t at = own_result(half, strip).at;
      float x[Values::kTiles][2];
      sums.copy_row(x, strip, half, factor(half));
      store_pairs(row_of(to.ref, max_of<int64_t>(at, 0), head), at >= 0, Values::column(0, 0), to,
                  x);
    }
  }

  // Adds up the lanes' shares of the own keys' sums, [B, Hq, Sk] where wanted.
  HW_DEVICE HW_INLINE void store_sums(const Ref<void, 3>& to, const float (&share)[2]) const {
    static_assert(kKeysAsRows, "sums of keys");
    if (!to) return;
    HW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = dev::warp_sum<4>(share[half]);
      store_of_key(to, half, sum);
    }
  }
  HW_DEVICE HW_INLINE void store_of_key(const Ref<void, 3>& to, int half, float value) const {
    const int64_t position = own_result(half).position;
    if (dev::lane() % 4 == 0 && position >= 0)
      to.template as<float>()(item.at.batch, item.head, item.at.k_begin + position) = value;
  }

 private:
  // What the loads of the own side, of a tile of the other side go by.
  HW_DEVICE HW_INLINE auto own_at() const {
    if constexpr (kGathers)
      return Slots{smem.tokens.own.at, static_cast<int>(first)};
    else
      return int64_t{first};
  }
  HW_DEVICE HW_INLINE auto others_at(int tile) const {
    if constexpr (kGathers)
      return Slots{smem.tokens.other[tile % 3].at, tile * kOther};
    else
      return static_cast<int64_t>(tile) * kOther;
  }

  // Gathered: the tile's tokens are there; those of the next one follow.
  HW_DEVICE HW_INLINE void prefetch_tile(int tile) {
    Stage& stage = smem.stage[tile & 1];
    if constexpr (kGathers) {
      const OtherList list(source, item);
      const TokenPrefetch<kThreads, kOther, OtherList> next(list, (tile + 1) * kOther);
      const Extent own = smem.tokens.own.extent(), other = smem.tokens.other[tile % 3].extent();
      if (may_meet(item.mask, kKeysAsRows ? other : own, kKeysAsRows ? own : other))
        prefetch(stage, others_at(tile));
      next.fill(smem.tokens.other[(tile + 1) % 3]);
    } else {
      prefetch_next(stage, others_at(tile));
    }
  }

  // In order: what of the other side comes next, from `at` on, is a fixed step away from the last.
  HW_DEVICE HW_INLINE const Input<Element>& first_others() const {
    return kKeysAsRows ? inputs.in.q : inputs.in.k;
  }
  HW_DEVICE HW_INLINE const Input<Element>& second_others() const {
    return kKeysAsRows ? inputs.of_queries : inputs.of_keys;
  }
  HW_DEVICE HW_INLINE Rows<Element> other_rows(const Input<Element>& x, int64_t at) const {
    return kKeysAsRows ? query_rows(x, source, item, at) : key_rows(x, source, item, at);
  }

  HW_DEVICE HW_INLINE void start_streams(int tile) {
    if (dev::lane() == 0)
      smem.visible[dev::warp()] =
          visible_tiles<kKeysAsRows, kOther>(item.mask, first + warp_row(), 16 * kStrips);
    const int64_t at = others_at(tile);
    first_units = decltype(first_units)(other_rows(first_others(), at));
    if (second_others().ref) second_units = decltype(second_units)(other_rows(second_others(), at));
    if constexpr (kKeysAsRows) query_stream.start([&](int array) { return array_of(array, at); });
    if constexpr (!kKeysAsRows && !kPlain)
      key_stream.start(
          [&](int n) { return key_array(n == 0 ? p.key_bias : p.key_gain, item, at); });
  }

  HW_DEVICE HW_INLINE void prefetch_next(Stage& stage, int64_t at) {
    const int64_t all = kKeysAsRows ? item.at.q_count : item.at.k_count;
    const int count = static_cast<int>(min_of<int64_t>(all - at, kOther));
    load_next<kThreads>(stage.first, first_units, first_others(), count,
                        [&] { return other_rows(first_others(), at); });
    if (second_others().ref)
      load_next<kThreads>(stage.second, second_units, second_others(), count,
                          [&] { return other_rows(second_others(), at); });
    if constexpr (kKeysAsRows) {
      query_stream.load(stage.numbers.of[0].v, count);
      load_temperatures(stage.numbers, at);
    } else if constexpr (!kPlain) {
      key_stream.load(stage.numbers.of[0], count);
    }
  }

  // Array n of the numbers per query, from a row on.
  HW_DEVICE HW_INLINE NumberArray array_of(int n, int64_t row) const {
    const Ref<const void, 3>& x = n == 0 ? inputs.statistic : n == 1 ? inputs.rest : inputs.extra;
    if (!x) return {};
    const Ref<const float, 3> from = x.template as<const float>();
    return {from.at(item.at.batch, item.head, item.at.q_begin + row), from.stride[2]};
  }

  HW_DEVICE HW_INLINE void prefetch_own() {
    const auto at = own_at();
    if constexpr (kKeysAsRows) {
      load_tile<kThreads>(smem.first_own, key_rows(inputs.in.k, source, item, at));
      if constexpr (kOwnSecond)
        load_tile<kThreads>(smem.second_own, key_rows(inputs.of_keys, source, item, at));
      load_key_numbers(smem.numbers, at);
    } else {
      load_tile<kThreads>(smem.first_own, query_rows(inputs.in.q, source, item, at));
      if constexpr (kOwnSecond)
        load_tile<kThreads>(smem.second_own, query_rows(inputs.of_queries, source, item, at));
      load_query_numbers(smem.numbers, at);
    }
  }

  template <class At>
  HW_DEVICE HW_INLINE void prefetch(Stage& stage, const At& at) {
    const Input<Element>& second = kKeysAsRows ? inputs.of_queries : inputs.of_keys;
    if constexpr (kKeysAsRows) {
      load_tile<kThreads>(stage.first, query_rows(inputs.in.q, source, item, at));
      if (second.ref) load_tile<kThreads>(stage.second, query_rows(second, source, item, at));
      load_query_numbers(stage.numbers, at);
    } else {
      load_tile<kThreads>(stage.first, key_rows(inputs.in.k, source, item, at));
      if (second.ref) load_tile<kThreads>(stage.second, key_rows(second, source, item, at));
      load_key_numbers(stage.numbers, at);
    }
  }

  template <class At>
  HW_DEVICE HW_INLINE void load_query_numbers(QueryNumbers& to, const At& at) const {
    query_numbers<kQueries, kThreads, 4>(&to.of[0].v[0], inputs.statistic, source, item, at);
    if (inputs.rest)
      query_numbers<kQueries, kThreads, 4>(&to.of[0].v[1], inputs.rest, source, item, at);
    else
      for (int i = dev::thread_index(); i < kQueries; i += kThreads) to.of[i].v[1] = 0.0f;
    query_numbers<kQueries, kThreads, 4>(&to.of[0].v[2], inputs.extra, source, item, at);
    load_temperatures(to, at);
  }
  template <class At>
  HW_DEVICE HW_INLINE void load_temperatures(QueryNumbers& to, const At& at) const {
    if constexpr (!kPlain)
      temperatures<kQueries, kThreads>(to.tau, p.row_temperature, source, item, at);
  }
  template <class At>
  HW_DEVICE HW_INLINE void load_key_numbers(NoKeyNumbers& to, const At& at) const {
    if constexpr (!kPlain) {
      key_numbers<kKeys, kThreads>(to.of[0], p.key_bias, source, item, at);
      key_numbers<kKeys, kThreads>(to.of[1], p.key_gain, source, item, at);
    }
  }

  // What the scores of the warp's rows and a tile go by.
  HW_DEVICE HW_INLINE TileOperands operands(const Stage& stage, int tile) const {
    TileOperands at;
    const int64_t mine = first + warp_row(), others = static_cast<int64_t>(tile) * kOther;
    at.row = kKeysAsRows ? others : mine, at.key = kKeysAsRows ? mine : others;
    if constexpr (kGathers) {
      const Tokens<kOther>& other = smem.tokens.other[tile % 3];
      const int* own = smem.tokens.own.at + warp_row();
      const Extent* part = smem.tokens.own.parts + warp_row() / 16;
      at.row_token = kKeysAsRows ? other.at : own, at.key_token = kKeysAsRows ? own : other.at;
      at.row_parts = kKeysAsRows ? other.parts : part;
      at.key_parts = kKeysAsRows ? part : other.parts;
    } else {
      const VisibleTiles visible = smem.visible[dev::warp()];
      at.seen = visible.sees(tile), at.whole = visible.whole(tile);
    }
    if constexpr (kKeysAsRows) {
      point_to(at, stage.numbers, 0, smem.numbers, warp_row());
    } else {
      point_to(at, smem.numbers, warp_row(), stage.numbers, 0);
    }
    return at;
  }
  HW_DEVICE HW_INLINE void point_to(TileOperands& at, const QueryNumbers& queries, int query,
                                    const NoKeyNumbers& keys, int key) const {
    at.numbers = queries.of + query;
    if constexpr (!kPlain) {
      at.tau = queries.tau + query;
      at.key_bias = keys.of[0] + key;
      at.key_gain = keys.of[1] + key;
    }
  }
};

}  // namespace hw::softmax::sm80
