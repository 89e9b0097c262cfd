// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores, forward: loop R, rows with a running softmax,
//
//   w_i = sum_j e^(s_ij - M_i) v_j / l_i      M_i = max_j s_ij     l_i = sum_j e^(s_ij - M_i)
//
// A block owns kRows queries of one head, each of its warps 16 kStrips of them, and walks tiles of
// kKeys keys: those that some of its queries sees, cut by its span. Per tile and warp
//
//   c [rows, keys]   = q k^T        both from shared memory
//   p [rows, keys]   in the registers of c, and there it is the A operand of
//   w [rows, Dv]    += p v
//
// k and v have two stages: while one is multiplied, cp.async fills the other; one barrier per tile.
// Warps whose own queries see nothing of a tile skip it; masks are applied on edge tiles only.
//
// Source: where queries and keys come from; Kind: what a score is; Cut: the tiles of a block.
#pragma once

#include "softmax/sm80/epilogue.cuh"

namespace hw::softmax::sm80 {

template <class Element, int kDim, ScoreKind Kind, KeySource Source, class Cut>
struct ForwardKernel {
  using Tiles = typename Cut::template Forward<kDim>;
  using WorkItem = typename Source::WorkItem;
  static constexpr bool kPlain = Kind::kPlain, kGathers = Source::kGathers;
  static constexpr int kWarps = Tiles::kWarps, kThreads = kWarps * dev::kWarp;
  static constexpr int kStrips = Tiles::kStrips, kRows = Tiles::kRows;
  static constexpr int kKeys = Tiles::keys(kPlain);
  static constexpr int kMinBlocks = Tiles::blocks(kPlain);
  using Scores = Fragment<kStrips, kKeys / 8>;
  using Score = ScoreTile<Element, Kind, false, kStrips, kKeys / 8, Source>;
  using Values = Fragment<kStrips, kDim / 8>;

  using RowList = SlotList<Source, false>;
  using KeyList = SlotList<Source, true>;

  struct Params {
    Source source;
    Kind kind;
    ForwardParams f;
    ScoreInputs<Element> in;
    Input<Element> v;
    Output<Element> o, w;
    Units units;
    Plan plan;
    Partials partials;
  };

  struct KeyNumbers {
    float of[3][kKeys];  // bias, gain, mass
  };
  struct Stage {
    Tile<Element, kKeys, kDim> k, v;
    If<!kPlain, KeyNumbers> numbers;
  };
  struct Smem {
    Tile<Element, kRows, kDim> q;
    Stage stage[2];
    If<!kPlain, float[kRows]> tau;
    WorkItem item;
    int64_t first;  // row slot of the block
    If<kGathers, GatheredTiles<kRows, kKeys>> tokens;
  };
  static_assert(sizeof(Smem) <= kSharedLimit, "shared memory of every architecture from sm_80 on");

  // What exponents of rows are relative to, to base 2: unit max, rounded once for all scores of a
  // row, so that an exponent is one multiply-add. What was rounded off is made good at the end.
  struct References {
    static constexpr float kLarge = 1 << 24;  // beyond it, more than a bit would be rounded off

    // Kept, where there are registers for it.
    If<!kGathers, float[kStrips][2]> kept = {};
    bool large = false;  // that of any row of the warp: there the difference comes first

    HW_DEVICE HW_INLINE static bool is_large(float reference) {
      return hw::abs_of(reference) > kLarge;
    }
    HW_DEVICE HW_INLINE static float made(float max, float unit) {
      const float reference = max * unit;
      return is_large(reference) ? 0.0f : reference;
    }
    // unit max less the reference
    HW_DEVICE HW_INLINE static float rest(float max, float unit) {
      const float reference = max * unit;
      return is_large(reference) ? 0.0f : fmaf(max, unit, -reference);
    }
  };
  using Stream = UnitStream<kKeys, kDim / 8, kThreads, Element>;

  struct Block {
    const Params& p;
    Smem& smem;
    const WorkItem& item;  // in shared memory: registers are short
    const int64_t& first;  // likewise
    int warp_row;          // of this warp, in the block
    RowSums<float> sums[kStrips]
                       [2];  // rows g, g + 8 of each strip; over this lane's columns, but max
    Values w;                // before the division
    If<kPlain, References> references;
    If<!kGathers, VisibleTiles> visible;
    If<!kGathers, Stream> keys, values;
    If<!kGathers && !kPlain, NumberStream<3, kKeys, 1, kKeys, kThreads>> numbers;

    HW_DEVICE HW_INLINE Block(const Params& params, Smem& s)
        : p(params), smem(s), item(s.item), first(s.first) {
      warp_row = dev::warp() * kStrips * 16;
      Scores::each_row([&](int strip, int half) { sums[strip][half].clear(); });
      const int64_t group = dev::block_index_x() / p.plan.blocks_of_head, heads = p.f.query_heads();
      if (dev::thread_index() == 0) {
        smem.item = p.source.work_item(p.f, group / heads, static_cast<int>(group % heads));
        // The last rows see most keys: they come first.
        smem.first =
            (p.plan.blocks_of_head - 1 - dev::block_index_x() % p.plan.blocks_of_head) * kRows;
      }
      dev::sync_block();
      if constexpr (kGathers) {
        const RowList list(p.source, item);
        TokenPrefetch<kThreads, kRows, RowList>(list, static_cast<int>(first))
            .fill(smem.tokens.own);
        dev::sync_block();
      }
    }

    HW_DEVICE HW_INLINE Range rows() const {
      return {first, min_of<int64_t>(first + kRows, p.source.rows(item))};
    }

    // Of the block's first row, in Partials.
    HW_DEVICE HW_INLINE int64_t index() const {
      return dev::block_index_x() / p.plan.blocks_of_head * p.f.max_q + first;
    }

    // Tiles [begin, end) of the block's span.
    HW_DEVICE HW_INLINE Range tiles() const {
      Range keys = seen_keys();
      const int64_t from = dev::block_index_y() * p.plan.span;
      keys = {max_of(keys.begin, from), min_of(keys.end, from + p.plan.span)};
      if (keys.empty()) return {0, 0};
      return {keys.begin / kKeys, ceil_div<int64_t>(keys.end, kKeys)};
    }

    // Slots that the block's rows may see. Gathered rows may be none: then there is nothing to
    // write but zeros of their results.
    HW_DEVICE HW_INLINE Range seen_keys() const {
      if constexpr (!kGathers)
        return item.mask.keys_of(rows());
      else {
        const Extent extent = smem.tokens.own.extent();
        if (extent.none()) return {0, 0};
        if (p.source.keys_in_order()) return item.mask.keys_of(extent.range());
        return {0, p.source.keys(item)};
      }
    }

    // Whether nobody can see what the loop would find. Same for all warps.
    HW_DEVICE HW_INLINE bool dead() const {
      const ForwardParams& f = p.f;
      if (!f.skip_dead) return false;
      const int64_t b = item.at.batch;
      if (f.identity_mix && f.identity_mix.template as<const float>()(b, item.head) == 1.0f)
        return true;
      if (!f.head_gate) return false;
      const Ref<const float, 3> g = f.head_gate.template as<const float>();
      bool some = false;
      for (int64_t i = first + dev::lane(); i < rows().end; i += dev::kWarp) {
        const int64_t position = result_of(static_cast<int>(i - first)).position;
        some |= position >= 0 && g(b, item.at.q_begin + position, item.head) != 0.0f;
      }
      return !dev::any(some);
    }

    // What the loads of the rows, of a tile's keys go by.
    HW_DEVICE HW_INLINE auto own_rows() const {
      if constexpr (kGathers)
        return Slots{smem.tokens.own.at, static_cast<int>(first)};
      else
        return int64_t{first};
    }
    HW_DEVICE HW_INLINE auto keys_of(int tile) const {
      if constexpr (kGathers)
        return Slots{smem.tokens.other[tile % 3].at, tile * kKeys};
      else
        return static_cast<int64_t>(tile) * kKeys;
    }

    HW_DEVICE HW_INLINE void prefetch_queries() {
      load_tile<kThreads>(smem.q, query_rows(p.in.q, p.source, item, own_rows()));
      if constexpr (!kPlain)
        temperatures<kRows, kThreads>(smem.tau, p.f.row_temperature, p.source, item, own_rows());
    }

    // Gathered: the tile's tokens are there; those of the next one follow.
    HW_DEVICE HW_INLINE void prefetch_gathered(int tile) {
      const KeyList list(p.source, item);
      const TokenPrefetch<kThreads, kKeys, KeyList> next(list, (tile + 1) * kKeys);
      const Extent keys = smem.tokens.other[tile % 3].extent();
      if (may_meet(item.mask, smem.tokens.own.extent(), keys)) prefetch(tile);
      next.fill(smem.tokens.other[(tile + 1) % 3]);
    }

    HW_DEVICE HW_INLINE void prefetch(int tile) {
      Stage& s = smem.stage[tile & 1];
      const auto key = keys_of(tile);
      if constexpr (kGathers) {
        load_tile<kThreads>(s.k, key_rows(p.in.k, p.source, item, key));
        if (p.f.v) load_tile<kThreads>(s.v, key_rows(p.v, p.source, item, key));
        if constexpr (!kPlain) {
          key_numbers<kKeys, kThreads>(s.numbers.of[0], p.f.key_bias, p.source, item, key);
          key_numbers<kKeys, kThreads>(s.numbers.of[1], p.f.key_gain, p.source, item, key);
          key_numbers<kKeys, kThreads>(s.numbers.of[2], p.f.mass_keys, p.source, item, key);
        }
      } else {
        const int count = static_cast<int>(min_of<int64_t>(item.at.k_count - key, kKeys));
        load_next<kThreads>(s.k, keys, p.in.k, count,
                            [&] { return key_rows(p.in.k, p.source, item, key); });
        if (p.f.v)
          load_next<kThreads>(s.v, values, p.v, count,
                              [&] { return key_rows(p.v, p.source, item, key); });
        if constexpr (!kPlain) numbers.load(s.numbers.of[0], count);
      }
    }

    HW_DEVICE HW_INLINE void walk(const Range& tiles) {
      if (tiles.empty()) return;
      prefetch_queries();
      const int begin = static_cast<int>(tiles.begin), end = static_cast<int>(tiles.end);
      if constexpr (kGathers) {
        const KeyList list(p.source, item);
        TokenPrefetch<kThreads, kKeys, KeyList>(list, begin * kKeys)
            .fill(smem.tokens.other[begin % 3]);
        dev::sync_block();
        walk_stages(
            begin, end, [&](int tile) { prefetch_gathered(tile); }, [&](int tile) { step(tile); });
      } else {
        visible = visible_tiles<false, kKeys>(item.mask, first + warp_row, 16 * kStrips);
        keys = Stream(key_rows(p.in.k, p.source, item, keys_of(begin)));
        if (p.f.v) values = Stream(key_rows(p.v, p.source, item, keys_of(begin)));
        if constexpr (!kPlain)
          numbers.start([&](int n) {
            const Ref<const void, 3>& x = n == 0   ? p.f.key_bias
                                          : n == 1 ? p.f.key_gain
                                                   : p.f.mass_keys;
            return key_array(x, item, keys_of(begin));
          });
        walk_stages(begin, end, [&](int tile) { prefetch(tile); }, [&](int tile) { step(tile); });
      }
    }

    HW_DEVICE HW_INLINE void step(int tile) {
      const Stage& stage = smem.stage[tile & 1];
      TileOperands operands;
      operands.row = first + warp_row, operands.key = static_cast<int64_t>(tile) * kKeys;
      if constexpr (kGathers) {
        const Tokens<kKeys>& keys = smem.tokens.other[tile % 3];
        operands.row_token = smem.tokens.own.at + warp_row, operands.key_token = keys.at;
        operands.row_parts = smem.tokens.own.parts + warp_row / 16, operands.key_parts = keys.parts;
      } else {
        operands.seen = visible.sees(tile), operands.whole = visible.whole(tile);
      }
      if constexpr (!kPlain) {
        operands.tau = smem.tau + warp_row;
        operands.key_bias = stage.numbers.of[0];
        operands.key_gain = stage.numbers.of[1];
      }
      const Score score{p.f, p.in, item, p.source, p.kind, operands};
      if (score.unseen()) return;
      Scores s;
      s.clear();
      multiply_rows<Element>(s, smem.q, warp_row, stage.k);
      score.shape_products(s);
      score.add_terms(s);
      score.hide(s);
      const bool some = score.soft() ? exponentiate(s, stage) : activate(s);
      if (some && p.f.v) multiply_columns<Element>(w, pack<Element>(s), stage.v);
    }

    // e^(s - M) in place of s; sums and w move to the new maximum.
    HW_DEVICE HW_INLINE bool exponentiate(Scores& s, const Stage& stage) {
      if constexpr (kPlain) {
        exponentiate_plain(s);
      } else {
        Maxima top;
        if (find_maxima(s, 0.0f, top))
          Scores::each_row([&](int strip, int half) {
            w.scale_row(strip, half, sums[strip][half].move_to(top.of[strip][half], p.units));
          });
        Scores::each_row([&](int strip, int half) {
          exponentials(s.at[strip], half, sums[strip][half], stage);
        });
      }
      return true;
    }

    // What sums and w of a row are relative to. Of plain scores it moves to the maximum only when
    // that has grown by more than kSlack, to base 2: until then weights exceed 1, by at most
    // 2^kSlack, which all types hold, and nothing has to be rescaled. p_max needs the maximum.
    static constexpr float kSlack = 8;
    struct Maxima {
      float of[kStrips][2];
    };
    // The next ones, given s; false if those of the warp's rows stay where they are.
    HW_DEVICE HW_INLINE bool find_maxima(const Scores& s, float slack, Maxima& top) const {
      bool moves = false;
      Scores::each_row([&](int strip, int half) {
        const float before = sums[strip][half].max;
        const float found = s.row_max(strip, half, -kInfinity);
        const bool grown = (found - before) * p.units.unit > slack;
        top.of[strip][half] = grown ? found : before;
        moves |= grown;
      });
      return dev::any(moves);
    }

    HW_DEVICE HW_INLINE void exponentiate_plain(Scores& s) {
      Maxima top;
      if (find_maxima(s, kSlack, top)) move_to(top);
      if (references.large) subtract_large(s);
      Scores::each_row([&](int strip, int half) {
        RowSums<float>& r = sums[strip][half];
        const float reference = reference_of(strip, half);
        HW_UNROLL
        for (int n = 0; n < 2 * Scores::kTiles; ++n) {
          float& x = s.at[strip][n / 2][2 * half + n % 2];
          x = dev::exp2_fast(fmaf(x, p.units.unit, -reference));
          r.sum += x;
        }
      });
    }

    HW_DEVICE HW_INLINE float reference_of(int strip, int half) const {
      if constexpr (kGathers)
        return References::made(sums[strip][half].max, p.units.unit);
      else
        return references.kept[strip][half];
    }

    HW_DEVICE HW_INLINE void move_to(const Maxima& top) {
      bool large = false;
      Scores::each_row([&](int strip, int half) {
        RowSums<float>& r = sums[strip][half];
        const float to = top.of[strip][half], reference = to * p.units.unit, before = r.max;
        float factor = r.move_to(to, p.units);
        if (before != -kInfinity && before != to) {
          const float more = References::rest(to, p.units.unit);
          const float shift = dev::exp2_fast(more - References::rest(before, p.units.unit));
          factor *= shift, r.sum *= shift;
        }
        w.scale_row(strip, half, factor);
        if constexpr (!kGathers) references.kept[strip][half] = References::made(to, p.units.unit);
        large |= References::is_large(reference) && to != -kInfinity;
      });
      references.large = dev::any(large);
    }

    // Of rows whose references are too large to be rounded; theirs are 0 instead.
    HW_DEVICE HW_INLINE void subtract_large(Scores& s) const {
      Scores::each([&](int strip, int j, int i) {
        const float max = sums[strip][i / 2].max;
        if (References::is_large(max * p.units.unit) && max != -kInfinity) s.at[strip][j][i] -= max;
      });
    }

    // One row of a fragment.
    HW_DEVICE HW_INLINE void exponentials(float (&s)[Scores::kTiles][4], int half,
                                          RowSums<float>& r, const Stage& stage) {
      const float shift = r.max == -kInfinity ? 0.0f : r.max;
      HW_UNROLL
      for (int j = 0; j < Scores::kTiles; ++j) {
        HW_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float score = s[j][i], e = dev::exp2_fast((score - shift) * p.units.unit);
          s[j][i] = e;
          r.sum += e;
          if (p.f.entropy) r.tilt += score - shift < -1e4f ? 0.0f : e * (score - shift);
          if (p.f.sq_norm) r.squares += e * e;
          if (p.f.mass) r.mass += e * stage.numbers.of[2][Scores::column(j, i)];
        }
      }
    }

    // a(s) in place of s; false if all of it is zero.
    HW_DEVICE HW_INLINE bool activate(Scores& s) {
      bool some = false;
      Scores::each([&](int strip, int j, int i) {
        const Fast a = activation(p.f.activation, Fast(s.at[strip][j][i]));
        s.at[strip][j][i] = a.v;
        sums[strip][i / 2].sum += a.v;
        some |= a.v != 0.0f;
      });
      return dev::any(some);
    }

    // Outputs of the rows, or their partial results.
    HW_DEVICE HW_INLINE void finish() {
      const Finish<Element, Kind, !kGathers> finish{p.f, p.o, p.w, item, p.units};
      Scores::each_row([&](int strip, int half) {
        const int line = warp_row + Scores::row(strip, 2 * half);
        RowSums<float> r = sums[strip][half];
        r.sum = dev::warp_sum<4>(r.sum);
        float times = 1;  // what w and the sum are relative to unit max
        if constexpr (kPlain) {
          times = dev::exp2_fast(-References::rest(r.max, p.units.unit));
          r.sum *= times;
        } else {
          r.tilt = dev::warp_sum<4>(r.tilt);
          r.squares = dev::warp_sum<4>(r.squares);
          r.mass = dev::warp_sum<4>(r.mass);
        }
        const bool inside = first + line < rows().end;
        if (p.plan.spans > 1) {
          if (inside) keep(strip, half, index() + line, r, times);
          return;
        }
        const SlotResult row = inside ? result_of(line) : SlotResult::none();
        const float factor = row.at < 0 ? 0.0f : finish.finalize(row, r, dev::lane() % 4 == 0);
        if (!p.f.v) return;
        float x[Values::kTiles][2];
        w.copy_row(x, strip, half, factor * times);
        finish.write(row, Values::column(0, 0), x);
      });
    }

    // Of a line of the block that exists.
    HW_DEVICE HW_INLINE SlotResult result_of(int line) const {
      int token = 0;
      if constexpr (kGathers) token = smem.tokens.own.at[line];
      return slot_result<false>(p.source, item, first + line, token);
    }

    HW_DEVICE HW_INLINE void keep(int strip, int half, int64_t row, const RowSums<float>& r,
                                  float times) {
      const int64_t span = dev::block_index_y();
      if (dev::lane() % 4 == 0) {
        float* to = p.partials.sums_of(span, row);
        to[0] = r.max, to[1] = r.sum;
        if constexpr (!kPlain) to[2] = r.tilt, to[3] = r.squares, to[4] = r.mass;
      }
      float* to = p.partials.values_of(span, row);
      HW_UNROLL
      for (int j = 0; j < Values::kTiles; ++j) {
        HW_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i)
          if (const int column = Values::column(j, i); column < p.partials.columns)
            to[column] = w.at[strip][j][i] * times;
      }
    }
  };

  HW_DEVICE static void main(const Params& p) {
    Block block(p, *dev::shared<Smem>());
    if (block.rows().empty()) return;
    block.w.clear();
    if (!block.dead()) block.walk(block.tiles());
    block.finish();
  }
};

}  // namespace hw::softmax::sm80
