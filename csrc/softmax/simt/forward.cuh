// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores, forward: loop R, rows with a running softmax.
//
//   RowsKernel    a block: 64 rows (16 where there are few) of a head, all its keys or a span of
//                 them, up to two slices of the value columns
//   MergeKernel   partial results of spans, in their order; a warp per row
//
// Where blocks alone would leave the device idle, as in decoding, the keys are cut into spans.
// Tiles that the mask empties are not visited; where all weights of a tile are zero v is not read.
// Traffic of a block: q once (again per tile if D has several slices), k and v once.
#pragma once

#include "softmax/simt/rows.cuh"

#include "core/host/workspace.h"

namespace hw::softmax::simt {

template <class Element, ScoreKind Score, KeySource Source>
struct RowsParams {
  ForwardParams f;
  Source source;
  Score score;
  ForwardPlan plan;
  OperandRows<Element> q, k, v;
  bool o_vectors, w_vectors;
  Accum<Element>* partials;  // [row blocks, spans, plan.partial_size()]
};

// What one block works on. Blocks of a head lie together, the last one, which sees most keys,
// first.
struct RowBlock {
  int64_t index, span, sequence, first;  // first: row
  int head, part;
};

HW_DEVICE HW_INLINE RowBlock row_block(const ForwardParams& f, const ForwardPlan& plan,
                                       int64_t index, int64_t span) {
  const int64_t group = index / plan.blocks_of_head, heads = f.query_heads();
  return {index,
          span,
          group / plan.parts / heads,
          (plan.blocks_of_head - 1 - index % plan.blocks_of_head) * plan.rows,
          static_cast<int>(group / plan.parts % heads),
          static_cast<int>(group % plan.parts)};
}

template <class Element, ScoreKind Score, KeySource Source>
HW_DEVICE HW_INLINE Accum<Element>* partial_of(const RowsParams<Element, Score, Source>& p,
                                               int64_t block, int64_t span) {
  return p.partials + (block * p.plan.spans + span) * p.plan.partial_size();
}

template <class Element, ScoreKind Score, KeySource Source, int kOwn>
class ForwardBlock {
 public:
  using A = Accum<Element>;
  using Params = RowsParams<Element, Score, Source>;
  static constexpr int kV = kVector<A>;

  HW_DEVICE HW_INLINE ForwardBlock(const Params& params, const RowBlock& t)
      : p(params),
        f(params.f),
        block(t),
        tile(f, params.source, params.score, t.sequence, t.first, nullptr, nullptr, nullptr,
             &f.mass_keys),
        soft(Score::kSoftmax || is_softmax(f.activation)) {}

  HW_DEVICE HW_INLINE void run() {
    if (!tile.start(block.head)) return;
    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) sums[r].clear();
    HW_UNROLL
    for (int n = 0; n < kSlices; ++n) clear(values[n]);
    if (!skips_block()) tile.walk(keys(), [this] { step(); });
    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) sums[r].add_lanes();
    if (p.plan.spans > 1) return store_partial();
    finish();
  }

 private:
  HW_DEVICE HW_INLINE Range keys() const {
    const Range seen = tile.reach();
    return {max_of(seen.begin, block.span * p.plan.span),
            min_of(seen.end, (block.span + 1) * p.plan.span)};
  }

  // Nobody can see what the loop would find.
  HW_DEVICE HW_INLINE bool skips_block() {
    if (!f.skip_dead) return false;
    bool alive = false;
    for (int i = dev::thread_index(); i < tile.own().count(); i += kThreads)
      alive |= !is_dead<Element>(f, tile.batch(), tile.head(), tile.number_of_own(i));
    return !tile.vote(alive);
  }

  HW_DEVICE HW_INLINE void step() {
    typename ScoreTile<Element, Score, Source, kOwn, true>::Micro s;
    tile.template multiply<true, false>(s, p.q, p.k);
    bool some = false;
    A factor[kOwn];
    const auto row = [&](int r) {
      HW_UNROLL
      for (int u = 0; u < kV; ++u) s[0][u] = tile.score(r, u, s[0][u]).s;
      factor[0] = soft ? exponentiate(r, s[0]) : activate(s[0]);
      HW_UNROLL
      for (int u = 0; u < kV; ++u) some |= s[0][u] != A(0);
    };
    each_row<kOwn>(row, s, sums, factor);
    if (soft) rescale(factor);
    if (!p.v.x) return;
    tile.put_weights(s);
    if (tile.vote(some)) tile.template apply<false>(values, p.v, block.part * kSlices);
  }

  // p relative to the running maximum, in place of s; returns the factor of what was summed before.
  HW_DEVICE HW_INLINE A exponentiate(int r, A (&s)[kV]) {
    LaneSums<A>& sum = sums[0];
    A top = sum.max;
    HW_UNROLL
    for (int u = 0; u < kV; ++u) top = dev::larger(top, s[u]);
    const A factor = sum.move_to(dev::warp_max<kLanes>(top));
    const A shift = sum.max == -infinity<A>() ? A(0) : sum.max;
    HW_UNROLL
    for (int u = 0; u < kV; ++u) {
      const A d = s[u] - shift, e = exp_of(d);
      sum.sum += e;
      if (f.entropy) sum.tilt += e * (d < A(-1e4) ? A(0) : d);  // 0 for e = 0
      if (f.sq_norm) sum.squares += e * e;
      if (f.mass) sum.mass += e * tile.mass(r, u);
      s[u] = e;
    }
    return factor;
  }

  HW_DEVICE HW_INLINE A activate(A (&s)[kV]) {
    HW_UNROLL
    for (int u = 0; u < kV; ++u) {
      s[u] = activation(f.activation, s[u]);
      sums[0].sum += s[u];
    }
    return A(1);
  }

  HW_DEVICE HW_INLINE void rescale(const A (&factor)[kOwn]) {
    HW_UNROLL
    for (int i = 0; i < kSlices * kOwn * kV; ++i)
      values[i / (kOwn * kV)][i / kV % kOwn][i % kV] *= factor[i / kV % kOwn];
  }

  HW_DEVICE HW_INLINE int column(int n) const {
    return (block.part * kSlices + n) * kSide<A> + other_lane() * kV;
  }

  HW_DEVICE HW_INLINE void store_partial() {
    A* to = partial_of(p, block.index, block.span);
    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      const int64_t row = own_lane() + kLanes * r;
      if (other_lane() == 0) sums[r].store(to + row * kRowSums);
      A* columns = to + p.plan.rows * kRowSums + row * p.plan.columns + other_lane() * kV;
      HW_UNROLL
      for (int n = 0; n < kSlices; ++n) {
        if (n * kSide<A> >= p.plan.columns) continue;
        HW_UNROLL
        for (int c = 0; c < kV; ++c) columns[n * kSide<A> + c] = values[n][r][c];
      }
    }
  }

  HW_DEVICE HW_INLINE void finish() {
    const auto row = [&](int r) {
      if (tile.own_slot(r) >= tile.own().end) return;
      const bool writes = block.part == 0 && other_lane() == 0;
      const RowEpilogue<Element, Source> epilogue(f, p.source, tile.item(), tile.own_slot(r),
                                                  tile.own_token(r));
      if (!epilogue.has_result()) return;
      const A factor = epilogue.finalize(sums[0], writes);
      if (!p.v.x) return;
      HW_UNROLL
      for (int n = 0; n < kSlices; ++n) {
        if (column(n) >= p.v.width()) continue;
        HW_UNROLL
        for (int c = 0; c < kV; ++c) values[n][0][c] *= factor;
        epilogue.template write<kV>(column(n), p.v.width(), values[n][0], p.o_vectors, p.w_vectors);
      }
    };
    static_assert(kSlices == 2);
    each_row<kOwn>(row, sums, values[0], values[1]);
  }

  const Params& p;
  const ForwardParams& f;
  const RowBlock block;
  ScoreTile<Element, Score, Source, kOwn, true> tile;
  const bool soft;
  LaneSums<A> sums[kOwn];       // max: of the row; the others: this lane's share
  A values[kSlices][kOwn][kV];  // w before the division
};

template <class Element, ScoreKind Score, KeySource Source, int kOwn>
struct RowsKernel {
  using Params = RowsParams<Element, Score, Source>;
  static constexpr int kThreads = simt::kThreads;
  static constexpr int kMinBlocks = kOwn == 1 ? 3 : 2;
  HW_DEVICE static void main(const Params& p) {
    const int64_t index = dev::block_index_x();
    const RowBlock block = row_block(p.f, p.plan, index / p.plan.spans, index % p.plan.spans);
    ForwardBlock<Element, Score, Source, kOwn>(p, block).run();
  }
};

template <class Element, ScoreKind Score, KeySource Source>
struct MergeKernel {
  using Params = RowsParams<Element, Score, Source>;
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;

  HW_DEVICE static void main(const Params& p) {
    const int64_t index = static_cast<int64_t>(dev::block_index_x()) * kWarps + dev::warp();
    const RowBlock block = row_block(p.f, p.plan, index / p.plan.rows, 0);
    const int64_t row = index % p.plan.rows, slot = block.first + row;
    const typename Source::WorkItem w = p.source.work_item(p.f, block.sequence, block.head);
    if (slot >= p.source.rows(w)) return;
    const RowEpilogue<Element, Source> epilogue(
        p.f, p.source, w, slot, p.source.row_token(w, slot, p.source.row_entry(w, slot)));
    if (!epilogue.has_result()) return;

    LaneSums<A> whole;
    whole.clear();
    for (int64_t span = 0; span < p.plan.spans; ++span)
      whole.merge(LaneSums<A>::loaded(partial_of(p, block.index, span) + row * kRowSums));
    const A top = whole.max;
    const A factor = epilogue.finalize(whole, block.part == 0 && dev::lane() == 0);
    if (!p.v.x) return;

    const int first = block.part * kSlices * kSide<A>;
    const int columns = min_of(p.v.width() - first, static_cast<int>(p.plan.columns));
    for (int c = dev::lane(); c < columns; c += dev::kWarp) {
      A sum[1] = {A(0)};
      for (int64_t span = 0; span < p.plan.spans; ++span) {
        const A* part = partial_of(p, block.index, span);
        RowSums<A> of_span{part[row * kRowSums], A(0), A(0), A(0), A(0)};
        const A share = is_softmax(p.f.activation) ? of_span.move_to(top) : A(1);
        sum[0] += share * part[p.plan.rows * kRowSums + row * p.plan.columns + c];
      }
      sum[0] *= factor;
      epilogue.template write<1>(first + c, p.v.width(), sum, false, false);
    }
  }
};

template <class Element, ScoreKind Score, KeySource Source>
void run_rows(const RowsParams<Element, Score, Source>& p, const Context& context) {
  using A = Accum<Element>;
  constexpr int kMany = kVector<A>;
  const Grid grid{p.plan.row_blocks * p.plan.spans, 1, 1};
  if (p.plan.few)
    launch<RowsKernel<Element, Score, Source, 1>>(grid, kBytes<A, Source, 1>, context, p);
  else
    launch<RowsKernel<Element, Score, Source, kMany>>(grid, kBytes<A, Source, kMany>, context, p);
  if (p.plan.spans == 1) return;
  static_assert(kFewRows % kWarps == 0 && kSide<A> % kWarps == 0, "whole blocks of warps");
  const int64_t blocks = p.plan.row_blocks * (p.plan.rows / kWarps);
  launch<MergeKernel<Element, Score, Source>>({blocks, 1, 1}, 0, context, p);
}

// What the kernels need of the tensors of p.f.
template <class Element, ScoreKind Score, KeySource Source>
void describe_tensors(RowsParams<Element, Score, Source>& p) {
  p.q = operand_rows<Element>(p.f.q);
  p.k = operand_rows<Element>(p.f.k);
  p.v = operand_rows<Element>(p.f.v);
  p.o_vectors = p.f.o && has_vectors(p.f.o.template as<Element>());
  p.w_vectors = p.f.w && has_vectors(p.f.w.template as<Element>());
}

template <class Element>
void forward(const ForwardParams& f, const Call& call) {
  using A = Accum<Element>;
  RowsParams<Element, FullScore, DenseSource> p{};
  p.f = f;
  p.plan = forward_plan<A>(f, call);
  describe_tensors(p);
  p.partials = Arena(call.workspace, "attention.forward").take<A>(p.plan.workspace());
  run_rows(p, call.context);
}

}  // namespace hw::softmax::simt
