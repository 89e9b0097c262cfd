// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores, backward: the row statistics are given, p is replayed.
//
//   QueryGradKernel   loop R2; a block: 64 rows of a query head      d_q, d_row_temperature, d_bias
//   KeyGradKernel     loop C; a block: 64 keys of a key head, which walks the rows of all query
//                     heads that share it          d_k, d_v, d_key_bias, d_key_gain
//   BiasGradKernel    where the bias is broadcast: a block owns a tile of what was handed over and
//                     walks all that share it
// Every result has one owner: no atomics, one order of additions. Rows with d_w = 0 and D = dL,
// such as those of a closed gate, cost one product.
#pragma once

#include "softmax/simt/gradient.cuh"

#include "core/gpu/launch.h"

namespace hw::softmax::simt {

// Slices first .. of the own rows' gradient, kOwn x kVector columns each, as Stored.
template <class T, class Stored, class A, int kCount, int kOwn>
HW_DEVICE HW_INLINE void store_gradient(const T& tile, const Ref<void, 4>& to, bool vectors,
                                        int first, int head,
                                        const A (&sum)[kCount][kOwn][kVector<A>]) {
  const Ref<Stored, 4> typed = to.as<Stored>();
  const int width = static_cast<int>(to.size[3]);
  HW_UNROLL
  for (int r = 0; r < kOwn; ++r) {
    if (!tile.exists(r)) continue;
    const int64_t at = tile.own_result(r);
    if (at < 0) continue;
    HW_UNROLL
    for (int n = 0; n < kCount; ++n) {
      const int column = (first + n) * kSide<A> + other_lane() * kVector<A>;
      if (column >= width) continue;
      store_columns(typed.at(tile.batch(), at, head, column), typed.stride[3], vectors,
                    width - column, sum[n][r]);
    }
  }
}

// The same of a kernel: as elements, or where they are added up later, as numbers of the
// accumulation type.
template <class Element, bool kWide, class T, class A, int kCount, int kOwn>
HW_DEVICE HW_INLINE void store_gradient_as(bool wide, const T& tile, const Ref<void, 4>& to,
                                           bool vectors, int first, int head,
                                           const A (&sum)[kCount][kOwn][kVector<A>]) {
  if constexpr (kWide && !std::is_same_v<Element, A>)
    if (wide) return store_gradient<T, A>(tile, to, vectors, first, head, sum);
  store_gradient<T, Element>(tile, to, vectors, first, head, sum);
}

template <class Element, ScoreKind Score, KeySource Source>
struct QueryGradKernel {
  using Params = GradParams<Element, Score, Source>;
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads, kOwn = kVector<A>;
  static constexpr int kMinBlocks = 2;
  using RowTile = ScoreTile<Element, Score, Source, kOwn, true>;

  HW_DEVICE static void main(const Params& p) {
    const BackwardParams& b = p.b;
    const int64_t index = dev::block_index_x(), group = index / p.blocks;
    const int64_t heads = b.query_heads();
    const int part = static_cast<int>(group % p.parts), first = part * kSlices;
    const int head = static_cast<int>(group / p.parts % heads);
    RowTile tile(b, p.source, p.score, group / p.parts / heads,
                 (p.blocks - 1 - index % p.blocks) * kSide<A>, &b.row, &b.rest, &b.delta, nullptr);
    if (!tile.start(head)) return;

    A d_q[kSlices][kOwn][kOwn], d_tau[kOwn] = {};
    HW_UNROLL
    for (int n = 0; n < kSlices; ++n) clear(d_q[n]);
    const bool writes_bias = b.d_bias && !p.shared_bias && part == 0;
    tile.walk(tile.reach(), [&] {
      typename RowTile::Micro c, dp;
      if (!tile.template multiply<false, true>(dp, p.d_w, p.v)) return;
      tile.template multiply<false, false>(c, p.q, p.k);
      for_gradients(
          tile, c, dp,
          [&](int r, int u, const PairGradient<A>& g) {
            d_tau[0] += g.dx * g.c;
            if (writes_bias && tile.has_bias(r, u)) *bias_element(b, tile, r, u) = g.ds;
            dp[0][u] = g.dc;
          },
          d_tau);
      tile.put_weights(dp);
      tile.template apply<true>(d_q, p.k, first);
    });

    store_gradient_as<Element, Source::kGathers>(p.wide_rows, tile, b.d_q, p.d_q_vectors, first,
                                                 head, d_q);
    if (!b.d_row_temperature || part != 0) return;
    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      const A sum = static_cast<A>(b.scale) * dev::warp_sum<kLanes>(d_tau[r]);
      if (other_lane() != 0 || !tile.exists(r)) continue;
      b.d_row_temperature.template as<A>()(tile.batch(), tile.own_result(r), head) = sum;
    }
  }

 private:
  // d_bias is zeros where it was not visited.
  HW_DEVICE HW_INLINE static A* bias_element(const BackwardParams& b, const RowTile& tile, int r,
                                             int u) {
    const int64_t i = tile.row_number(r, u), j = tile.key_number(r, u);
    return b.d_bias.template as<A>().at(tile.batch(), tile.head(), i, j);
  }
};

// kCount slices of d_k and of d_v each: one keeps the registers of the usual dims at two blocks per
// multiprocessor, two compute the scores once for dims up to 128.
template <class Element, ScoreKind Score, KeySource Source, int kCount>
struct KeyGradKernel {
  using Params = GradParams<Element, Score, Source>;
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads, kOwn = kVector<A>;
  static constexpr int kMinBlocks = kCount == 1 ? 2 : 1;
  using KeyTile = ScoreTile<Element, Score, Source, kOwn, false>;

  HW_DEVICE static void main(const Params& p) {
    const BackwardParams& b = p.b;
    const int64_t index = dev::block_index_x(), group = index / p.blocks;
    const int part = static_cast<int>(group % p.parts), first = part * kCount;
    const int owner = static_cast<int>(group / p.parts % p.key_owners);
    KeyTile tile(b, p.source, p.score, group / p.parts / p.key_owners, index % p.blocks * kSide<A>,
                 &b.row, &b.rest, &b.delta, nullptr);

    A d_k[kCount][kOwn][kOwn], d_v[kCount][kOwn][kOwn];
    HW_UNROLL
    for (int n = 0; n < kCount; ++n) clear(d_k[n]), clear(d_v[n]);
    for (int h = owner * p.key_sharers; h < (owner + 1) * p.key_sharers; ++h) {
      A d_bias[kOwn] = {}, d_gain[kOwn] = {};
      if (!tile.start(h)) return;
      tile.walk(tile.reach(), [&] {
        typename KeyTile::Micro c, dp;
        if (!tile.template multiply<false, true>(dp, p.v, p.d_w)) return;
        tile.template multiply<false, false>(c, p.k, p.q);
        for_gradients(
            tile, c, dp,
            [&](int, int u, const PairGradient<A>& g) {
              d_bias[0] += g.ds;
              d_gain[0] += g.d_gain;
              c[0][u] = g.p;
              dp[0][u] = g.dc;
            },
            d_bias, d_gain);
        tile.put_weights(dp);
        tile.template apply<true>(d_k, p.q, first);
        if (!b.d_v) return;
        tile.put_weights(c);
        tile.template apply<false>(d_v, p.d_w, first);
      });
      if (part == 0) {
        store_sums(b.d_key_bias, tile, d_bias);
        store_sums(b.d_key_gain, tile, d_gain);
      }
    }
    constexpr bool kWide = Source::kGathers;
    store_gradient_as<Element, kWide>(p.wide_keys, tile, b.d_k, p.d_k_vectors, first, owner, d_k);
    if (b.d_v)
      store_gradient_as<Element, kWide>(p.wide_keys, tile, b.d_v, p.d_v_vectors, first, owner, d_v);
  }

 private:
  // [B, Hq, Sk], if wanted: the lanes' shares of the own keys' sums.
  HW_DEVICE HW_INLINE static void store_sums(const Ref<void, 3>& to, const KeyTile& tile,
                                             const A (&share)[kOwn]) {
    if (!to) return;
    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      const A sum = dev::warp_sum<kLanes>(share[r]);
      if (other_lane() != 0 || !tile.exists(r)) continue;
      const int64_t key = tile.number_of_own(tile.own_in_tile(r));
      to.template as<A>()(tile.batch(), tile.head(), key) = sum;
    }
  }
};

// The gradient of a bias that is broadcast over sequences, heads or keys. What is broadcast is
// summed, in order, by the block that owns the tile. A bias has rows of its own (without, it is a
// key_bias). Where d_bias has fewer entries than there are sequences, entry e is that of the
// sequences e, e + entries, ..
template <class Element, ScoreKind Score, KeySource Source>
struct BiasGradKernel {
  static_assert(Source::kInOrder, "sums of a bias are in its order");
  using Params = GradParams<Element, Score, Source>;
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads, kOwn = kVector<A>;
  using RowTile = ScoreTile<Element, Score, Source, kOwn, true>;

  // Tiles, entries or heads that have results of their own.
  HW_HOST_DEVICE static int64_t owners(const BackwardParams& b, int d, int64_t side) {
    return b.d_bias.stride[d] == 0 ? 1 : ceil_div(b.d_bias.size[d], side);
  }
  HW_HOST_DEVICE static int64_t row_tiles(const BackwardParams& b) {
    return ceil_div<int64_t>(b.d_bias.size[2], kSide<A>);
  }
  static Grid grid(const BackwardParams& b) {
    const int64_t tiles = row_tiles(b) * owners(b, 3, kSide<A>);
    return {tiles * owners(b, 0, 1) * owners(b, 1, 1), 1, 1};
  }

  HW_DEVICE static void main(const Params& p) {
    const BackwardParams& b = p.b;
    int64_t rest = dev::block_index_x();
    const auto take = [&](int64_t count) {
      const int64_t at = rest % count;
      rest /= count;
      return at;
    };
    const int64_t key_tile = take(owners(b, 3, kSide<A>));
    const int64_t first = take(row_tiles(b)) * kSide<A>;
    const int64_t head = take(owners(b, 1, 1)), batch = rest;
    const bool all_keys = b.d_bias.stride[3] == 0;

    typename RowTile::Micro sum;
    clear(sum);
    for (int64_t n = batch; n < p.sequences; n += owners(b, 0, 1))
      for (int64_t h = head; h < b.query_heads(); h += owners(b, 1, 1))
        visit(p, n, static_cast<int>(h), first, key_tile, all_keys, sum);
    store(b, batch, head, first, key_tile * kSide<A>, all_keys, sum);
  }

 private:
  HW_DEVICE HW_INLINE static void visit(const Params& p, int64_t sequence, int head, int64_t first,
                                        int64_t key_tile, bool all_keys,
                                        typename RowTile::Micro& sum) {
    RowTile tile(p.b, p.source, p.score, sequence, first, &p.b.row, &p.b.rest, &p.b.delta, nullptr);
    if (!tile.start(head)) return;
    Range keys = tile.reach();
    if (!all_keys) {  // the whole tile: keys stay where their sums are
      const int64_t begin = key_tile * kSide<A>,
                    end = min_of(begin + kSide<A>, tile.item().at.k_count);
      keys = begin < keys.end && keys.begin < end ? Range{begin, end} : Range{0, 0};
    }
    tile.walk(keys, [&] {
      typename RowTile::Micro c, dp;
      if (!tile.template multiply<false, true>(dp, p.d_w, p.v)) return;
      tile.template multiply<false, false>(c, p.q, p.k);
      for_gradients(
          tile, c, dp, [&](int, int u, const PairGradient<A>& g) { sum[0][u] += g.ds; }, sum);
    });
  }

  // Sums over lanes where keys are broadcast.
  HW_DEVICE HW_INLINE static void store(const BackwardParams& b, int64_t batch, int64_t head,
                                        int64_t first_row, int64_t first_key, bool all_keys,
                                        typename RowTile::Micro& sum) {
    const Ref<A, 4> to = b.d_bias.template as<A>();
    const int64_t rows = to.size[2], keys = all_keys ? 1 : to.size[3];
    if (all_keys) {
      HW_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        HW_UNROLL
        for (int u = 1; u < kOwn; ++u) sum[r][0] += sum[r][u];
        sum[r][0] = dev::warp_sum<kLanes>(sum[r][0]);
      }
    }
    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      HW_UNROLL
      for (int u = 0; u < kOwn; ++u) {
        const int64_t i = first_row + own_lane() + kLanes * r;
        const int64_t j = first_key + other_lane() + kLanes * u;
        if (i < rows && j < keys) to(batch, head, i, j) = sum[r][u];
      }
    }
  }
};

// The kernels of `sequences`, whose longest has max_q rows and max_k keys.
template <class Element, ScoreKind Score, KeySource Source>
void run_query_grad(GradParams<Element, Score, Source> p, int64_t sequences,
                    const Context& context) {
  using A = Accum<Element>;
  p.blocks = ceil_div<int64_t>(p.b.max_q, kSide<A>);
  p.parts = ceil_div(slices_of<A>(p.b.dim()), kSlices);
  const int64_t blocks = sequences * p.b.query_heads() * p.parts * p.blocks;
  launch<QueryGradKernel<Element, Score, Source>>({blocks, 1, 1}, kBytes<A, Source, kVector<A>>,
                                                  context, p);
}

template <class Element, ScoreKind Score, KeySource Source>
void run_key_grad(GradParams<Element, Score, Source> p, int64_t sequences, const Context& context) {
  using A = Accum<Element>;
  const int bytes = kBytes<A, Source, kVector<A>>;
  const int most = max_of(slices_of<A>(p.b.dim()), p.b.d_v ? slices_of<A>(p.b.value_dim()) : 1);
  p.blocks = ceil_div<int64_t>(p.b.max_k, kSide<A>);
  p.parts = ceil_div(most, kSlices);
  p.key_owners = p.keys_per_query_head ? p.b.query_heads() : p.b.key_heads();
  p.key_sharers = p.keys_per_query_head ? 1 : p.b.group();
  const Grid grid{sequences * p.key_owners * p.parts * p.blocks, 1, 1};
  if (most == 1)
    launch<KeyGradKernel<Element, Score, Source, 1>>(grid, bytes, context, p);
  else
    launch<KeyGradKernel<Element, Score, Source, kSlices>>(grid, bytes, context, p);
}

template <class Element, ScoreKind Score, KeySource Source>
void run_bias_grad(GradParams<Element, Score, Source> p, int64_t sequences,
                   const Context& context) {
  using A = Accum<Element>;
  p.sequences = sequences;
  using Kernel = BiasGradKernel<Element, Score, Source>;
  launch<Kernel>(Kernel::grid(p.b), kBytes<A, Source, kVector<A>>, context, p);
}

// What the kernels need of the tensors of p.b.
template <class Element, ScoreKind Score, KeySource Source>
void describe_tensors(GradParams<Element, Score, Source>& p) {
  p.q = operand_rows<Element>(p.b.q);
  p.k = operand_rows<Element>(p.b.k);
  p.v = operand_rows<Element>(p.b.v);
  p.d_w = operand_rows<Element>(p.b.d_w);
  const auto vectors = [](const Ref<void, 4>& x, bool wide) {
    if (wide) return x && has_vectors(x.template as<Accum<Element>>());
    return x && has_vectors(x.template as<Element>());
  };
  p.d_q_vectors = vectors(p.b.d_q, p.wide_rows);
  p.d_k_vectors = vectors(p.b.d_k, p.wide_keys);
  p.d_v_vectors = vectors(p.b.d_v, p.wide_keys);
  p.shared_bias = adds_up_bias(p.b);
}

template <class Element>
void backward(const BackwardParams& b, const Call& call) {
  GradParams<Element, FullScore, DenseSource> p{};
  p.b = b;
  describe_tensors(p);
  run_query_grad(p, p.b.sequences(), call.context);
  run_key_grad(p, p.b.sequences(), call.context);
  if (p.shared_bias) run_bias_grad(p, b.batch(), call.context);
}

}  // namespace hw::softmax::simt
