// SPDX-License-Identifier: Apache-2.0
// What the loops of linear attention on tensor cores share: the roles of the tensors, the walk of a
// block through the chunks of its segment, and the stream of tiles that it brings.
//
// A loop computes a row for every token i of tensor a from the tokens j of tensor b that it sees:
//
//   over keys       a = q, b = k, x = v:    j <= i         y per query head
//   over queries    a = k, b = q, x = do:   i <= j         y per key head, summed over its G heads;
//                   x_j counts as g_j = factor_j do_j, factor = 1 / z
// The second is the first with the tokens of a segment numbered from its end: chunks are loaded
// with negative row strides, and nothing else changes.
#pragma once

#include "ops/linear_attention/linear_attention_sm80_layout.h"
#include "ops/linear_attention/linear_attention_sm80_state.cuh"

namespace hw::linear_attention::sm80 {

// What locate() and sequence() need.
struct Tokens {
  Ref<const int64_t, 1> cu_seqlens;
  int64_t count = 0;
  HW_HOST_DEVICE int64_t tokens() const { return count; }
};

template <class Element>
struct LoopParams {
  Plan plan;
  Tokens tokens;
  Input<Element> a, b, x, u;          // u, of gradients only: do or v, per token i
  Ref<Element, 4> y;                  // out
  bool y_paired = false;              // y may be stored in words of two elements
  Ref<float, 3> z;                    // [B, S, Hq] out, or absent
  Ref<const float, 3> factor, delta;  // [B, S, Hq] 1 / z and -<do, o>, or absent: 1 and 0
  Ref<float, 4> sum;        // gradients of more than one slice: what the slices before gave
  int first = 0;            // gradients: first column of the slice
  StateRefs before, after;  // state ahead of the segment; behind it (out); or absent
  bool by_slot = false;     // indexed by slot instead of by sequence
  int group = 1;            // query heads per key head
  bool causal = false, normalize = false;
  float scale = 1, eps = 0;

  HW_HOST_DEVICE int dim() const { return static_cast<int>(a.ref.size[3]); }
};

// One step of a block: a chunk of b with one of the heads of b that meet the block's rows.
struct Item {
  int chunk = 0, turn = 0;  // turn: of the heads
  int stage = 0;            // of the two stages of tiles
};

// The chunks that a block visits. The rows of a are those of the item's chunk, whose earlier ones
// the state stands for; in the direct schedule they are chunk `own` for all items, and there is no
// state.
struct ChunkRange {
  Segment segment;
  int64_t begin = 0, end = 0;  // tokens that chunks are counted in: segment, direct: sequence
  int chunks = 0;              // of b
  bool direct = false;
  int own = 0;
  int head = 0;                     // of a and y
  int state_head = 0;               // key head
  int first_b_head = 0, heads = 1;  // heads of b that meet `head`
  int64_t first = 0;                // token of row i of chunk c: first + (c kTile + i) step
  int step = 1;

  HW_DEVICE HW_INLINE bool has(Item item) const { return item.chunk < chunks; }
  HW_DEVICE HW_INLINE Item next(Item item) const {
    const bool wrap = item.turn == heads - 1;
    return {item.chunk + (wrap ? 1 : 0), wrap ? 0 : item.turn + 1, 1 - item.stage};
  }
  HW_DEVICE HW_INLINE int b_head(Item item) const { return first_b_head + item.turn; }
  HW_DEVICE HW_INLINE int row_chunk(Item item) const { return direct ? own : item.chunk; }
  HW_DEVICE HW_INLINE bool first_of_rows(Item item) const {
    return item.turn == 0 && (!direct || item.chunk == 0);
  }
  HW_DEVICE HW_INLINE bool last_of_rows(Item item) const {
    return item.turn == heads - 1 && (!direct || item.chunk == chunks - 1);
  }
  // Keys of the item are those of its own rows, of which each row sees itself and the ones before.
  HW_DEVICE HW_INLINE bool diagonal(Item item) const { return item.chunk == row_chunk(item); }
  HW_DEVICE HW_INLINE int64_t token(int chunk, int row) const {
    return first + (static_cast<int64_t>(chunk) * kTile + row) * step;
  }
  HW_DEVICE HW_INLINE int count(int chunk) const {
    const int64_t rest = end - begin - static_cast<int64_t>(chunk) * kTile;
    return static_cast<int>(min_of<int64_t>(rest, kTile));
  }
};

// Where the state ahead of a segment is: at its sequence, at its slot, or, if not causal, at the
// first slot of its sequence, where the prefix pass leaves the total.
template <class Element>
HW_DEVICE HW_INLINE int64_t state_index(const LoopParams<Element>& p, const Segment& s,
                                        int64_t slot) {
  if (!p.by_slot) return s.sequence;
  return p.causal ? slot : slot - s.index;
}

// The walk of this block into shared memory; false if its slot is empty. `group`: heads of a per
// head of b, over queries the reverse. Whole block. It stays in shared memory and is read again for
// every chunk: the compiler would keep it, and the addresses it leads to, in registers that the
// state needs.
template <bool kQueries, class Element>
HW_DEVICE HW_INLINE bool find_chunks(ChunkRange& shared, const LoopParams<Element>& p, int group) {
  if (dev::thread_index() == 0) {
    const Segment s = locate(p.plan, p.tokens, dev::block_index_x());
    const int head = dev::block_index_y();
    ChunkRange w;
    w.segment = s;
    w.direct = p.plan.schedule == Schedule::direct;
    w.begin = w.direct ? s.sequence_begin : s.begin;
    w.end = w.direct ? s.sequence_end : s.end;
    w.own = static_cast<int>(s.index);
    w.chunks = w.direct && p.causal ? w.own + 1
                                    : static_cast<int>(ceil_div<int64_t>(w.end - w.begin, kTile));
    w.head = head;
    w.state_head = kQueries ? head : head / group;
    w.first_b_head = kQueries ? head * group : head / group;
    w.heads = kQueries ? group : 1;
    w.first = kQueries ? w.end - 1 : w.begin;
    w.step = kQueries ? -1 : 1;
    shared = w;
  }
  dev::sync_block();
  return shared.segment.used;
}

// Rows of a chunk: `columns` columns from `column` on.
template <class Element>
HW_DEVICE HW_INLINE Rows<Element> chunk_rows(const Input<Element>& x, const ChunkRange& w,
                                             int chunk, int head, int64_t column) {
  Rows<Element> rows;
  rows.origin = x.ref.at(w.segment.batch, w.token(chunk, 0), head, column);
  rows.row = x.ref.stride[1] * w.step;
  rows.column = x.ref.stride[3];
  rows.count = w.count(chunk);
  rows.columns = static_cast<int>(min_of<int64_t>(x.ref.size[3] - column, 1 << 20));
  rows.aligned = x.aligned;
  rows.whole = x.whole && column % 8 == 0;
  return rows;
}

// 1 / z and -<do, o> of the queries of a chunk; 0 beyond its end.
template <class Element>
HW_DEVICE HW_INLINE void load_scalars(float* factor, float* delta, const LoopParams<Element>& p,
                                      const ChunkRange& w, int chunk, int head) {
  const int i = dev::thread_index();
  if (i >= kTile) return;
  const bool valid = i < w.count(chunk);
  const int64_t token = w.token(chunk, i);
  factor[i] = valid ? (p.factor ? p.factor(w.segment.batch, token, head) : 1.0f) : 0.0f;
  delta[i] = valid && p.delta ? p.delta(w.segment.batch, token, head) : 0.0f;
}

// ---- The stream of chunks -----------------------------------------------------------------------

enum class Loop { totals, apply, gradient };

struct Scalars {
  float factor[kTile], delta[kTile];
};

template <class Element, int kDim, Loop kLoop, bool kQueries>
struct Stage {
  Narrow<Element> b;
  Wide<Element, kDim> x;
  If<kLoop != Loop::totals, Narrow<Element>> a;
  If<kLoop == Loop::gradient, Wide<Element, kDim>> u;
  If<kQueries || kLoop == Loop::gradient, Scalars> scalars;  // of the side that is the queries
};

// Two stages of tiles, and q and k of the current item transposed. The protocol of an item is
//   await()            the item's stage has landed; everyone is done with the item before
//   prefetch(next)     into the other stage
//   turn(item)         transposes, ends with a barrier
template <class Element, int kDim, Loop kLoop, bool kQueries>
struct ChunkSmem {
  Stage<Element, kDim, kLoop, kQueries> stage[2];
  Turned<Element> b;
  If<kLoop != Loop::totals, Turned<Element>> a;
  ChunkRange walk;
  SlotFeatures features;
};

template <class Element, int kDim, Loop kLoop, bool kQueries>
struct Chunks {
  static constexpr int kWarps = kDim / 16, kThreads = kWarps * dev::kWarp;

  const LoopParams<Element>& p;
  ChunkSmem<Element, kDim, kLoop, kQueries>& smem;
  const ChunkRange& walk;
  int first;  // first column of the block

  HW_DEVICE HW_INLINE auto& stage(Item item) const { return smem.stage[item.stage]; }

  HW_DEVICE HW_INLINE void prefetch(Item item) const {
    if (!walk.has(item)) return;
    auto& s = stage(item);
    const int keys = item.chunk, rows = walk.row_chunk(item), b_head = walk.b_head(item);
    if (needs_keys()) {
      load_rows<kPadded, kThreads>(s.b.at[0], s.b.kPitch, chunk_rows(p.b, walk, keys, b_head, 0));
      load_rows<kDim, kThreads>(s.x.at[0], s.x.kPitch, chunk_rows(p.x, walk, keys, b_head, first));
    }
    if constexpr (kLoop != Loop::totals) {
      if (walk.first_of_rows(item))
        load_rows<kPadded, kThreads>(s.a.at[0], s.a.kPitch,
                                     chunk_rows(p.a, walk, rows, walk.head, 0));
    }
    if constexpr (kLoop == Loop::gradient)  // for every item: a stage keeps it for one only
      load_rows<kDim, kThreads>(s.u.at[0], s.u.kPitch,
                                chunk_rows(p.u, walk, rows, walk.head, first));
    if constexpr (kQueries)
      load_scalars(s.scalars.factor, s.scalars.delta, p, walk, keys, b_head);
    else if constexpr (kLoop == Loop::gradient)
      load_scalars(s.scalars.factor, s.scalars.delta, p, walk, rows, walk.head);
    dev::copy_async_commit();
  }

  // Without a mask, and with a state, rows meet no keys: the state is that of all of them.
  HW_DEVICE HW_INLINE bool needs_keys() const {
    return kLoop == Loop::totals || p.causal || walk.direct;
  }

  HW_DEVICE HW_INLINE void await() const {
    dev::copy_async_wait<0>();
    dev::sync_block();
  }

  HW_DEVICE HW_INLINE void turn(Item item) const {
    const auto& s = stage(item);
    for (int strip = dev::warp(); strip < 2 * kStrips; strip += kWarps) {
      if (strip < kStrips) {
        if (needs_keys()) turn_strip(smem.b, s.b, strip);
      } else if constexpr (kLoop != Loop::totals) {
        if (walk.first_of_rows(item)) turn_strip(smem.a, s.a, strip - kStrips);
      }
    }
    dev::sync_block();
  }

  // Adds the item's keys (queries) to the state.
  template <bool kByColumn, class State>
  HW_DEVICE HW_INLINE void add(State& state, Item item) const {
    const auto& s = stage(item);
    const int count = walk.count(item.chunk);
    const float *factor = nullptr, *delta = nullptr;
    if constexpr (kQueries) factor = s.scalars.factor, delta = s.scalars.delta;
    state.template add<kByColumn, kQueries>(smem.b, s.x, factor, delta, count);
  }
};

}  // namespace hw::linear_attention::sm80
