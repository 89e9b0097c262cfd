// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores, backward. Every output has one owner that adds in a fixed order:
//
//   QueryGradKernel   a block: queries of a head, walks keys (loop R2)       d_q, d_tau, own d_b
//   KeyGradKernel     a block: keys, walks the queries of the heads          d_k, d_v, d_beta,
//                     that share them (loop C)                               d_gamma
//   PairedKeyGradKernel  the same of plain scores up to width 128: of two      d_k, d_v
//                     warps with the same keys one sums d_v, the other d_k
//   BiasGradKernel    a block: a tile of a bias that is broadcast, walks     d_b
//                     all that share it
//
// Scores and <d_w, v> are computed by either of the first two: 7 products where one pass with float
// atomics, or with a fixed order of blocks, has 5. d_q and d_k of dims over 128 fill the registers:
// there the two halves of KeyGradKernel are blocks of their own.
#pragma once

#include "softmax/sm80/loop.cuh"

#include "core/gpu/packed.cuh"

namespace hw::softmax::sm80 {

template <class Element, ScoreKind Kind, KeySource Source>
struct GradientParams {
  Source source;
  Kind kind;
  BackwardParams b;
  LoopInputs<Element> inputs;
  Output<Element> d_q, d_k, d_v;
  // [B, results, Hq, D | Dv], of which the caller makes d_q, of d_k and d_v, which then are not
  // written; keys have results for each query head there. Of sources that gather.
  Output<float> d_q_sums, d_k_sums, d_v_sums;
  bool shared_bias;       // d_bias has a kernel of its own
  int64_t blocks;         // of own slots, per head of a sequence
  int64_t sequences = 0;  // that the kernel of a shared bias walks

  HW_DEVICE HW_INLINE bool sums_queries() const { return Source::kGathers && d_q_sums.ref; }
  HW_DEVICE HW_INLINE bool sums_keys() const { return Source::kGathers && d_k_sums.ref; }
  // Heads that have results of keys, and the query heads of each.
  HW_DEVICE HW_INLINE int owners() const { return sums_keys() ? b.query_heads() : b.key_heads(); }
  HW_DEVICE HW_INLINE int heads_of_owner() const { return sums_keys() ? 1 : b.group(); }
};

// Gradients of one tile: p in place of c = <q, k>, ds in place of dp = <d_w, v>, and y.
template <class Score, class Scores>
HW_DEVICE HW_INLINE void differentiate(const Score& score, float unit, Scores& c, Scores& dp,
                                       Scores& y) {
  score.shape_products(c);
  y = c;
  score.add_terms(c);
  score.hide(c);
  score.differentiate(c, dp, unit);
}

template <class Element, int kDim, ScoreKind Kind, KeySource Source, class Cut>
struct QueryGradKernel {
  using L = Loop<Element, kDim, Kind, false, true, Source, Cut>;
  using Scores = typename L::Scores;
  using Params = GradientParams<Element, Kind, Source>;
  using Smem = typename L::Smem;
  static constexpr bool kPlain = Kind::kPlain;
  static constexpr int kThreads = L::kThreads;
  static constexpr int kBlocks = L::kStrips == 2 ? 2 : kDim <= 64 ? 3 : kDim <= 128 ? 2 : 1;
  static constexpr int kMinBlocks = kBlocks * 128 / kThreads;

  HW_DEVICE static void main(const Params& p) {
    const BackwardParams& b = p.b;
    const int64_t group = dev::block_index_x() / p.blocks, heads = b.query_heads();
    L loop(b, p.inputs, p.source, p.kind, *dev::shared<Smem>());
    // The last rows see most keys: they come first.
    loop.go(group / heads, static_cast<int>(group % heads),
            (p.blocks - 1 - dev::block_index_x() % p.blocks) * L::kOwn);
    if (loop.own().empty()) return;

    typename L::Values d_q;
    d_q.clear();
    const Range keys = loop.others();
    loop.walk(keys, [&](const auto& stage, const auto& score) {
      Scores c, dp, y;
      loop.products(c, stage);
      loop.second_products(dp, stage);
      differentiate(score, p.inputs.unit, c, dp, y);
      if (!kPlain && b.d_bias && !p.shared_bias) store_bias(b, loop, score, dp);
      if (score.is_nonlinear()) score.chain(dp, y);
      multiply_columns<Element>(d_q, pack<Element>(dp), stage.first);
    });
    // Rows that meet no keys were not loaded: nothing of them may be read.
    const bool loaded = !keys.empty();
    if (!kPlain && b.d_row_temperature) store_temperatures(b, loop, d_q, loaded);
    const auto factor = [&](int half) {
      if constexpr (!kPlain)
        if (b.row_temperature && loaded)
          return p.inputs.in.scale *
                 loop.smem.numbers.tau[loop.warp_row() + L::Scores::row(0, 2 * half)];
      return p.inputs.in.scale;
    };
    if (p.sums_queries()) return loop.store(p.d_q_sums, loop.item.head, d_q, factor);
    loop.store(p.d_q, loop.item.head, d_q, factor);
  }

 private:
  // d_bias is zeros where it was not visited.
  template <class Score>
  HW_DEVICE HW_INLINE static void store_bias(const BackwardParams& b, const L& loop,
                                             const Score& score, const Scores& ds) {
    const Ref<float, 4> to = b.d_bias.template as<float>();
    if constexpr (Source::kGathers) {
      float* origin = to.at(loop.item.at.batch, loop.item.head);
      Scores::each([&](int s, int j, int i) {
        const auto q = score.row_position(Scores::row(s, i));
        const auto k = score.key_position(Scores::column(j, i));
        if (q >= 0 && k >= 0) origin[q * to.stride[2] + k * to.stride[3]] = ds.at[s][j][i];
      });
      return;
    }
    const int64_t row = score.operands.row, key = score.operands.key;
    float* origin = to.at(loop.item.at.batch, loop.item.head, row, key);
    const int64_t rows = loop.item.mask.rows - row, keys = loop.item.mask.keys - key;
    Scores::each([&](int s, int j, int i) {
      const int q = Scores::row(s, i), k = Scores::column(j, i);
      if (q < rows && k < keys) origin[q * to.stride[2] + k * to.stride[3]] = ds.at[s][j][i];
    });
  }

  // d_tau_i = scale <sum_j dx_ij k_j, q_i>
  HW_DEVICE HW_INLINE static void store_temperatures(const BackwardParams& b, const L& loop,
                                                     const typename L::Values& d_q, bool loaded) {
    HW_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
      HW_UNROLL
      for (int j = 0; j < L::Values::kTiles; ++j) {
        if (!loaded) continue;
        const dev::Two q = dev::unpack<Element>(loop.smem.first_own.pair(
            loop.warp_row() + L::Values::row(0, 2 * half), L::Values::column(j, 0)));
        sum += d_q.at[0][j][2 * half] * q.lo + d_q.at[0][j][2 * half + 1] * q.hi;
      }
      sum = dev::warp_sum<4>(sum) * static_cast<float>(b.scale);
      const int64_t at = loop.own_result(half).at;
      if (dev::lane() % 4 == 0 && at >= 0)
        b.d_row_temperature.template as<float>()(loop.item.at.batch, at, loop.item.head) = sum;
    }
  }
};

// Walks the queries of every head that shares the block's keys, one head after the other, with
// visit(stage, score); finish() after each. False: there are no such keys, and nothing was done.
template <class L, class Params, class Visit, class Finish>
HW_DEVICE HW_INLINE bool walk_heads(L& loop, const Params& p, const Visit& visit,
                                    const Finish& finish) {
  // Of 32 bits, as blocks of a launch are: registers are short.
  const int blocks = static_cast<int>(p.blocks), heads = p.owners();
  const int block = dev::block_index_x(), group = block / blocks;
  loop.start(group / heads, static_cast<int64_t>(block % blocks) * L::kOwn, group % heads);
  dev::sync_block();
  const int& owner = loop.smem.owner;
  HW_UNROLL_BY(1)
  for (int head = owner * p.heads_of_owner(); head < (owner + 1) * p.heads_of_owner();
       head = loop.item.head + 1) {
    loop.take(head);
    if (loop.own().empty()) return false;
    loop.walk(loop.others(), visit);
    finish();
  }
  return true;
}

// kKeyGrads: d_k and the sums of keys, kValueGrads: d_v; at least one of them.
template <class Element, int kDim, ScoreKind Kind, bool kKeyGrads, bool kValueGrads,
          KeySource Source, class Cut>
struct KeyGradKernel {
  using L = Loop<Element, kDim, Kind, true, kKeyGrads, Source, Cut>;
  using Scores = typename L::Scores;
  using Values = typename L::Values;
  using Params = GradientParams<Element, Kind, Source>;
  using Smem = typename L::Smem;
  static constexpr bool kPlain = Kind::kPlain;
  static constexpr int kThreads = L::kThreads;
  static constexpr int kMinBlocks = (kDim <= 128 ? 2 : 1) * 128 / kThreads;
  static_assert(L::kTeam == 1, "a warp has its keys for itself");

  // What a warp sums up over its keys.
  struct Sums {
    If<kKeyGrads, Values> d_k;
    If<kValueGrads, Values> d_v;
    float d_bias[2], d_gain[2];  // this lane's share of keys g and g + 8, of a query head

    HW_DEVICE HW_INLINE void clear() {
      if constexpr (kKeyGrads) d_k.clear();
      if constexpr (kValueGrads) d_v.clear();
      clear_of_head();
    }
    HW_DEVICE HW_INLINE void clear_of_head() {
      HW_UNROLL
      for (int half = 0; half < 2; ++half) d_bias[half] = d_gain[half] = 0.0f;
    }
  };

  HW_DEVICE static void main(const Params& p) {
    const BackwardParams& b = p.b;
    L loop(b, p.inputs, p.source, p.kind, *dev::shared<Smem>());
    Sums sums;
    sums.clear();
    const bool walked = walk_heads(
        loop, p, [&](const auto& stage, const auto& score) { step(p, loop, stage, score, sums); },
        [&] {
          if constexpr (!kKeyGrads || kPlain) return;
          loop.store_sums(b.d_key_bias, sums.d_bias);
          loop.store_sums(b.d_key_gain, sums.d_gain);
          sums.clear_of_head();
        });
    if (!walked) return;
    const int& owner = loop.smem.owner;
    const auto scale = [&](int) { return p.inputs.in.scale; };
    const auto one = [](int) { return 1.0f; };
    if constexpr (kKeyGrads) {
      if (p.sums_keys())
        loop.store(p.d_k_sums, owner, sums.d_k, scale);
      else
        loop.store(p.d_k, owner, sums.d_k, scale);
    }
    if constexpr (kValueGrads) {
      if (!b.d_v) return;
      if (p.sums_keys())
        loop.store(p.d_v_sums, owner, sums.d_v, one);
      else
        loop.store(p.d_v, owner, sums.d_v, one);
    }
  }

 private:
  template <class Stage, class Score>
  HW_DEVICE HW_INLINE static void step(const Params& p, const L& loop, const Stage& stage,
                                       const Score& score, Sums& sums) {
    const BackwardParams& b = p.b;
    Scores c;
    loop.products(c, stage);
    if constexpr (!kKeyGrads) {
      score.shape_products(c);
      score.add_terms(c);
      score.hide(c);
      score.weigh(c, p.inputs.unit);
      multiply_columns<Element>(sums.d_v, pack<Element>(c), stage.second);
    } else {
      Scores dp, y;
      loop.second_products(dp, stage);
      differentiate(score, p.inputs.unit, c, dp, y);
      if constexpr (kValueGrads)
        if (b.d_v) multiply_columns<Element>(sums.d_v, pack<Element>(c), stage.second);
      if constexpr (!kPlain) {
        if (b.d_key_bias) add(sums.d_bias, dp);
        if (b.d_key_gain) score.add_gain_gradients(sums.d_gain, dp, y);
        if (score.is_nonlinear()) score.chain(dp, y);
        score.apply_temperature(dp);
      }
      multiply_columns<Element>(sums.d_k, pack<Element>(dp), stage.first);
    }
  }

  HW_DEVICE HW_INLINE static void add(float (&share)[2], const Scores& ds) {
    Scores::each([&](int s, int j, int i) { share[i / 2] += ds.at[s][j][i]; });
  }
};

// d_k and d_v of plain scores. Two warps, a team, have the same keys, and more of them than a warp
// that holds both sums could have: an operand is read for more rows. In every tile
//
//   the warp of d_v   p = exp(s - L), handed to the other        d_v += p^T d_w
//   the warp of d_k   dp; given p, ds = p (dp - delta)           d_k += ds^T q
//
// which are the same two products of other operands.
template <class Element, int kDim, ScoreKind Kind, KeySource Source, class Cut>
struct PairedKeyGradKernel {
  using L = Loop<Element, kDim, Kind, true, true, Source, Cut>;
  using Scores = typename L::Scores;
  using Values = typename L::Values;
  using Params = GradientParams<Element, Kind, Source>;
  static constexpr int kThreads = L::kThreads, kMinBlocks = 2;
  static constexpr int kTeamThreads = 2 * dev::kWarp;
  static_assert(L::kTeam == 2 && Kind::kPlain);

  // p of a team's keys and a tile's queries: the four elements that each lane has of 16 x 8.
  using Weights = Vec<float, 4>[Scores::kStrips][Scores::kTiles][dev::kWarp];
  struct Smem {
    typename L::Smem loop;
    Weights weights[kThreads / kTeamThreads];
  };
  static_assert(sizeof(Smem) <= kSharedLimit, "shared memory of every architecture from sm_80 on");

  HW_DEVICE static void main(const Params& p) {
    Smem& smem = *dev::shared<Smem>();
    L loop(p.b, p.inputs, p.source, p.kind, smem.loop);
    const bool values = dev::warp() % 2 == 0;
    Values sums;
    sums.clear();
    const bool walked = walk_heads(
        loop, p,
        [&](const auto& stage, const auto& score) {
          step(p.inputs.unit, smem, stage, score, values, sums);
        },
        [] {});
    if (!walked || (values && !p.b.d_v)) return;
    const float factor = values ? 1.0f : p.inputs.in.scale;
    loop.store(values ? p.d_v : p.d_k, smem.loop.owner, sums, [=](int) { return factor; });
  }

 private:
  template <class Stage, class Score>
  HW_DEVICE HW_INLINE static void step(float unit, Smem& smem, const Stage& stage,
                                       const Score& score, bool values, Values& sums) {
    const int team = dev::warp() / 2;
    Weights& weights = smem.weights[team];
    Scores x;  // p, or ds
    x.clear();
    multiply_rows<Element>(x, values ? smem.loop.first_own : smem.loop.second_own, L::warp_row(),
                           values ? stage.first : stage.second);
    if (values) {
      score.hide(x);
      score.weigh(x, unit);
      hand_over(x, weights);
      dev::sync_group(1 + team, kTeamThreads);
    } else {
      dev::sync_group(1 + team, kTeamThreads);
      score.differentiate_given(
          x, [&](int s, int j) { return load_vector<4>(weights[s][j][dev::lane()].v); });
    }
    multiply_columns<Element>(sums, pack<Element>(x), values ? stage.second : stage.first);
  }

  HW_DEVICE HW_INLINE static void hand_over(const Scores& p, Weights& weights) {
    HW_UNROLL
    for (int s = 0; s < Scores::kStrips; ++s) {
      HW_UNROLL
      for (int j = 0; j < Scores::kTiles; ++j) {
        const float (&of)[4] = p.at[s][j];
        store_vector(weights[s][j][dev::lane()].v, Vec<float, 4>{of[0], of[1], of[2], of[3]});
      }
    }
  }
};

// The gradient of a bias that is broadcast over sequences, heads or keys. The block that owns a
// tile of it sums, in order, over what shares it; a bias has rows of its own (without, it is a
// key_bias). Where d_bias has fewer entries than there are sequences, entry e is that of the
// sequences e, e + entries, ..
template <class Element, int kDim, KeySource Source, class Cut>
struct BiasGradKernel {
  static_assert(Source::kInOrder, "sums of a bias are in its order");
  using L = Loop<Element, kDim, FullScore, false, true, Source, Cut>;
  using Scores = typename L::Scores;
  using Params = GradientParams<Element, FullScore, Source>;
  using Smem = typename L::Smem;
  static constexpr int kThreads = L::kThreads;

  // Entries, heads or tiles of keys that have results of their own.
  HW_HOST_DEVICE static int64_t owners(const BackwardParams& b, int d, int64_t edge) {
    return b.d_bias.stride[d] == 0 ? 1 : ceil_div(b.d_bias.size[d], edge);
  }
  static Grid grid(const Params& p) {
    const BackwardParams& b = p.b;
    return {p.blocks * owners(b, 3, L::kOther) * owners(b, 1, 1) * owners(b, 0, 1), 1, 1};
  }

  HW_DEVICE static void main(const Params& p) {
    const BackwardParams& b = p.b;
    int64_t rest = dev::block_index_x();
    const auto take = [&](int64_t count) {
      const int64_t at = rest % count;
      rest /= count;
      return at;
    };
    L loop(b, p.inputs, p.source, p.kind, *dev::shared<Smem>());
    const int64_t first = take(p.blocks) * L::kOwn;
    const int64_t key = take(owners(b, 3, L::kOther)) * L::kOther;
    const int64_t head = take(owners(b, 1, 1)), batch = rest;
    const bool all_keys = b.d_bias.stride[3] == 0;

    Scores sum;
    sum.clear();
    HW_UNROLL_BY(1)
    for (int64_t n = batch; n < p.sequences; n += owners(b, 0, 1)) {
      HW_UNROLL_BY(1)
      for (int64_t h = head; h < b.query_heads(); h += owners(b, 1, 1)) {
        loop.go(n, static_cast<int>(h), first);
        Range keys = loop.others();
        if (!all_keys && (key >= keys.end || key + L::kOther <= keys.begin)) continue;
        if (!all_keys) keys = {key, key + L::kOther};
        loop.walk(keys, [&](const auto& stage, const auto& score) {
          Scores c, dp, y;
          loop.products(c, stage);
          loop.second_products(dp, stage);
          differentiate(score, p.inputs.unit, c, dp, y);
          Scores::each([&](int s, int j, int i) {
            if (exists(score, s, j, i)) sum.at[s][j][i] += dp.at[s][j][i];
          });
        });
      }
    }
    store(b, loop, batch, head, key, all_keys, sum);
  }

 private:
  // A slot without token gives no number to the sums, whatever its row statistic makes of a score.
  template <class Score>
  HW_DEVICE HW_INLINE static bool exists(const Score& score, int s, int j, int i) {
    if constexpr (Source::kGathers)
      return score.row_position(Scores::row(s, i)) >= 0 &&
             score.key_position(Scores::column(j, i)) >= 0;
    else
      return true;
  }
  HW_DEVICE HW_INLINE static void store(const BackwardParams& b, const L& loop, int64_t batch,
                                        int64_t head, int64_t key, bool all_keys,
                                        const Scores& sum) {
    const Ref<float, 4> to = b.d_bias.template as<float>();
    HW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = loop.own_row(half);
      HW_UNROLL
      for (int j = 0; j < Scores::kTiles; ++j) {
        HW_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int64_t at = key + Scores::column(j, i);
          if (!all_keys && row < to.size[2] && at < to.size[3])
            to(batch, head, row, at) = sum.at[0][j][i];
        }
      }
      const float total = sum.row_sum(0, half);
      if (all_keys && row < to.size[2] && dev::lane() % 4 == 0) to(batch, head, row, 0) = total;
    }
  }
};

}  // namespace hw::softmax::sm80
