// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores: columns of the map given the row statistics (loop C), and the
// weights of single pairs.
//
//   ColumnsKernel   a block: 64 keys of a query head, the rows that see them     y, sum, max
//   ProbsKernel     a warp: up to 32 pairs of one row of the output, D multiplications each
#pragma once

#include "softmax/simt/loop.cuh"

#include "core/gpu/launch.h"

namespace hw::softmax::simt {

template <class Element, ScoreKind Score, KeySource Source>
struct ColumnsKernelParams {
  ColumnsParams c;
  Source source;
  Score score;
  OperandRows<Element> q, k, x;
  bool y_vectors;
  int64_t blocks, parts;  // tiles of keys; of the columns of x
};

template <class Element, ScoreKind Score, KeySource Source>
struct ColumnsKernel {
  using Params = ColumnsKernelParams<Element, Score, Source>;
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads, kOwn = kVector<A>;
  static constexpr int kMinBlocks = 2;
  using KeyTile = ScoreTile<Element, Score, Source, kOwn, false>;

  HW_DEVICE static void main(const Params& p) {
    const ColumnsParams& f = p.c;
    const int64_t index = dev::block_index_x(), group = index / p.blocks, heads = f.query_heads();
    const int part = static_cast<int>(group % p.parts), first = part * kSlices;
    const int head = static_cast<int>(group / p.parts % heads);
    KeyTile tile(f, p.source, p.score, group / p.parts / heads, index % p.blocks * kSide<A>, &f.row,
                 &f.rest, &f.row_weight, nullptr);
    if (!tile.start(head)) return;

    A y[kSlices][kOwn][kOwn], sum[kOwn] = {}, top[kOwn] = {};
    HW_UNROLL
    for (int n = 0; n < kSlices; ++n) clear(y[n]);
    tile.walk(tile.reach(), [&] {
      typename KeyTile::Micro c;
      tile.template multiply<true, false>(c, p.k, p.q);
      const auto weigh = [&](int r) {
        HW_UNROLL
        for (int u = 0; u < kOwn; ++u) {
          const Scored<A> e = tile.score(r, u, c[0][u]);
          const A weight = e.met ? tile.weight(r, u, e.s) : A(0);
          sum[0] += f.row_weight ? weight * tile.extra(r, u) : weight;
          if (weight > top[0] || weight != weight) top[0] = weight;  // NaN is kept
          c[0][u] = weight;
        }
      };
      each_row<kOwn>(weigh, c, sum, top);
      if (!p.x.x) return;
      tile.put_weights(c);
      tile.template apply<false>(y, p.x, first);
    });

    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      const A total = dev::warp_sum<kLanes>(sum[r]), largest = max_of_lanes(top[r]);
      if (!tile.exists(r)) continue;
      const int64_t b = tile.batch(), key = tile.number_of_own(tile.own_in_tile(r));
      if (part == 0 && other_lane() == 0) {
        if (f.sum) f.sum.template as<A>()(b, head, key) = total;
        if (f.max) f.max.template as<A>()(b, head, key) = largest;
      }
      HW_UNROLL
      for (int n = 0; n < kSlices; ++n) {
        const int column = (first + n) * kSide<A> + other_lane() * kOwn;
        if (!p.x.x || column >= p.x.width()) continue;
        const Ref<Element, 4> to = f.y.template as<Element>();
        store_columns(to.at(b, key, head, column), to.stride[3], p.y_vectors, p.x.width() - column,
                      y[n][r]);
      }
    }
  }

 private:
  HW_DEVICE HW_INLINE static A max_of_lanes(A x) {
    HW_UNROLL
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      const A other = dev::shuffle_xor(x, mask);
      if (other > x || other != other) x = other;
    }
    return x;
  }
};

template <class Element>
void columns(const ColumnsParams& c, const Call& call) {
  using A = Accum<Element>;
  ColumnsKernelParams<Element, FullScore, DenseSource> p{};
  p.c = c;
  p.q = operand_rows<Element>(p.c.q);
  p.k = operand_rows<Element>(p.c.k);
  p.x = operand_rows<Element>(p.c.x);
  p.y_vectors = p.c.y && has_vectors(p.c.y.template as<Element>());
  p.blocks = ceil_div<int64_t>(p.c.max_k, kSide<A>);
  p.parts = ceil_div(slices_of<A>(p.c.x ? p.x.width() : 0), kSlices);
  const Grid grid{p.c.sequences() * p.c.query_heads() * p.parts * p.blocks, 1, 1};
  launch<ColumnsKernel<Element, FullScore, DenseSource>>(grid, kBytes<A, DenseSource, kVector<A>>,
                                                         call.context, p);
}

// ---- Single pairs -------------------------------------------------------------------------------

template <class Element, ScoreKind Score, KeySource Source>
struct ProbsKernel {
  static_assert(Source::kInOrder && !Score::kSets, "pairs are named by positions; no score is set");
  struct Params {
    ProbsParams f;
    Source source;
    int64_t rows, chunks;  // of the output, per head; of 32 pairs, per row
  };
  using A = Accum<Element>;
  using WorkItem = typename Source::WorkItem;
  static constexpr int kThreads = simt::kThreads;

  HW_DEVICE static void main(const Params& p) {
    const ProbsParams& f = p.f;
    const Source& source = p.source;
    const int64_t index = static_cast<int64_t>(dev::block_index_x()) * kWarps + dev::warp();
    const int64_t line = index / p.chunks, heads = f.query_heads(), n = line / p.rows / heads;
    if (n >= f.sequences()) return;
    const WorkItem w = source.work_item(f, n, static_cast<int>(line / p.rows % heads));
    const int64_t at = line % p.rows, b = w.at.batch, rows = source.rows(w);
    const int64_t i = f.rows ? f.rows(b, at) : at;
    if (!f.rows && i >= rows) return;  // packed: beyond this sequence

    const bool exists = i >= 0 && i < rows;
    const int64_t begin = index % p.chunks * dev::kWarp;
    const int64_t count = f.rows ? source.keys(w) : f.p.size[3];
    for (int64_t n_th = begin; n_th < min_of(begin + dev::kWarp, count); ++n_th) {
      const int64_t j = f.rows      ? n_th
                        : f.offsets ? w.mask.diagonal(i) + f.offsets(n_th)
                                    : f.keys(b, n_th);
      const A x = exists && sees(w.mask, i, j) ? weight(p, w, i, j) : A(0);
      if (dev::lane() != 0) continue;
      if (f.rows)
        f.p.template as<A>()(b, w.head, at, source.key_result(w, n_th, key_of(source, w, n_th))) =
            x;
      else
        f.p.template as<A>()(b, w.head, source.row_result(w, i, row_of(source, w, i)), n_th) = x;
    }
  }

 private:
  HW_DEVICE HW_INLINE static int64_t row_of(const Source& source, const WorkItem& w, int64_t i) {
    return source.row_token(w, i, source.row_entry(w, i));
  }
  HW_DEVICE HW_INLINE static int64_t key_of(const Source& source, const WorkItem& w, int64_t j) {
    return source.key_token(w, j, source.key_entry(w, j));
  }

  HW_DEVICE HW_INLINE static A weight(const Params& p, const WorkItem& w, int64_t i, int64_t j) {
    const ProbsParams& f = p.f;
    const int64_t b = w.at.batch, row = row_of(p.source, w, i), key = key_of(p.source, w, j);
    const A c = product(f, b, row, p.source.key_batch(w), key, w);
    const A s = score_of_pair<Element>(f, ScoreShape<A>(f.softcap), b, w.head, i, w.at.q_begin + i,
                                       w.at.k_begin + j, c);
    const int64_t at = p.source.row_result(w, i, row);
    const A statistic = f.row ? f.row.template as<const A>()(b, w.head, at) : A(1);
    const A rest = f.rest ? f.rest.template as<const A>()(b, w.head, at) : A(0);
    return replay(f, s, replayed(f, w.mask, i, statistic), replayed_rest(statistic, rest));
  }

  HW_DEVICE HW_INLINE static A product(const ProbsParams& f, int64_t b, int64_t row,
                                       int64_t key_batch, int64_t key, const WorkItem& w) {
    const Element* q = f.q.template as<const Element>().at(b, row, w.head);
    const Element* k = f.k.template as<const Element>().at(key_batch, key, w.key_head);
    A sum = 0;
    for (int d = dev::lane(); d < f.dim(); d += dev::kWarp)
      sum += static_cast<A>(q[d * f.q.stride[3]]) * static_cast<A>(k[d * f.k.stride[3]]);
    return dev::warp_sum(sum);
  }
};

template <class Element>
void probs(const ProbsParams& f, const Call& call) {
  using Kernel = ProbsKernel<Element, FullScore, DenseSource>;
  typename Kernel::Params p{};
  p.f = f;
  p.rows = p.f.rows ? p.f.rows.size[1] : p.f.max_q;
  p.chunks = ceil_div<int64_t>(p.f.rows ? p.f.max_k : p.f.p.size[3], dev::kWarp);
  const int64_t warps = p.f.sequences() * p.f.query_heads() * p.rows * p.chunks;
  launch<Kernel>({ceil_div<int64_t>(warps, kWarps), 1, 1}, 0, call.context, p);
}

}  // namespace hw::softmax::simt
