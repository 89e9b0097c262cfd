// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores: tile sizes, the cut of a call into blocks, workspace. From shapes
// only, and no device code: the host side asks `simt::workspace_bytes`.
//
// All loops work on tiles of 64 rows x 64 keys (fp64: 32 x 32), held as 16 x 16 threads that each
// own 4 x 4 (2 x 2) scores. Dims are walked in slices of as many columns, so that any D and Dv runs
// in three buffers of shared memory: 52 KB, within the 64 KB that sm_75 has.
//
//   own buffer    [side, slice]   rows of what the block computes      q, d_w; columns: k, v
//   other buffer  [side, slice]   rows of what it walks over           k, v; columns: q, d_w
//   weights       [own, other]    p, or dc
//
// A product of two buffers and a product of weights with the other buffer are all there is; both
// read 16 bytes at a time along rows. Accumulators are registers: up to two slices of columns a
// block; wider outputs are cut into parts, whose blocks compute the scores again.
#pragma once

#include <cstdint>

#include "softmax/mask.h"
#include "softmax/params.h"

#include "core/host/workspace.h"

namespace hw::softmax::simt {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kLanes = 16;  // threads along either side of a tile
inline constexpr int kSlices = 2;  // slices of columns that a block accumulates
inline constexpr int kTerms = 8;   // numbers of a row (5) or key (3) that scores need

// What a thread owns along a side, and the elements of a 16-byte access.
template <class A>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(A));
// Rows, keys and columns of a tile.
template <class A>
inline constexpr int kSide = kLanes * kVector<A>;
// Distance of rows in a buffer: rows that follow each other start in different banks.
template <class A>
inline constexpr int kStride = kSide<A> + kVector<A>;

// Shared memory of a block that owns kOwn x 16 rows: what it works on and a vote per warp, the
// buffers, the terms.
inline constexpr int kWorkBytes = 160;
inline constexpr int kBuffersAt = kWorkBytes + kWarps * static_cast<int>(sizeof(int));
template <class A, int kOwn>
inline constexpr int kSharedBytes = kBuffersAt + ((2 * kOwn * kLanes + kSide<A>)*kStride<A> +
                                                  kTerms * kSide<A>)*static_cast<int>(sizeof(A));

// The same of a source that gathers: the tokens of a tile, and a vote per warp, besides.
template <class A, int kOwn>
inline constexpr int kGatherBytes =
    kSharedBytes<A, kOwn> + (kOwn * kLanes + kSide<A> + kWarps) * static_cast<int>(sizeof(int32_t));

// Slices of `width` columns; one also where there is no column.
template <class A>
HW_HOST_DEVICE constexpr int slices_of(int64_t width) {
  return static_cast<int>(max_of<int64_t>(ceil_div<int64_t>(width, kSide<A>), 1));
}

// ---- Forward: blocks, and spans of keys that are merged afterwards ------------------------------

inline constexpr int kFewRows = kLanes;      // up to here a block has 16 rows: decoding
inline constexpr int64_t kSpanTiles = 1;     // shortest span of keys, in tiles
inline constexpr int64_t kBlocksWanted = 2;  // per multiprocessor; fewer: cut the keys
inline constexpr int kRowSums = 5;           // of a row of a partial result

struct ForwardPlan {
  bool few = false;            // blocks of 16 rows
  int64_t rows = 0;            // of a block
  int64_t blocks_of_head = 0;  // of a sequence
  int64_t parts = 1;           // of the value columns
  int64_t spans = 1;           // of the keys
  int64_t span = 0;            // keys of one
  int64_t row_blocks = 0;      // of all: sequences x heads x parts x blocks_of_head
  int64_t columns = 0;         // of a partial result

  // A partial result: [rows][kRowSums], then [rows][columns].
  HW_HOST_DEVICE int64_t partial_size() const { return rows * (kRowSums + columns); }
  int64_t workspace() const { return spans > 1 ? row_blocks * spans * partial_size() : 0; }
};

template <class A>
ForwardPlan forward_plan(int64_t sequences, int64_t heads, int64_t max_q, int64_t max_k,
                         int64_t value_dim, int64_t multiprocessors) {
  ForwardPlan p;
  p.few = max_q <= kFewRows;
  p.rows = p.few ? kFewRows : kSide<A>;
  p.blocks_of_head = ceil_div(max_q, p.rows);
  const int slices = slices_of<A>(value_dim);
  p.parts = ceil_div(slices, kSlices);
  p.columns = value_dim > 0 ? static_cast<int64_t>(min_of(slices, kSlices)) * kSide<A> : 0;
  p.row_blocks = sequences * heads * p.parts * p.blocks_of_head;
  const int64_t wanted = kBlocksWanted * max_of<int64_t>(multiprocessors, 1);
  if (p.row_blocks > 0 && p.row_blocks < wanted) {
    const int64_t most = max_k / (kSpanTiles * kSide<A>);
    p.spans = max_of<int64_t>(min_of(ceil_div(wanted, p.row_blocks), most), 1);
  }
  p.span = round_up(ceil_div(max_of<int64_t>(max_k, 1), p.spans), int64_t{kSide<A>});
  p.spans = ceil_div(max_of<int64_t>(max_k, 1), p.span);
  return p;
}

template <class A>
ForwardPlan forward_plan(const ForwardParams& f, const Call& call) {
  return forward_plan<A>(f.sequences(), f.query_heads(), f.max_q, f.max_k, f.value_dim(),
                         call.context.multiprocessors);
}

// Bytes of workspace of a forward call; the other functions need none.
inline int64_t workspace_bytes(const ForwardParams& f, const Call& call) {
  Arena arena;
  if (call.element == DType::f64)
    arena.take<double>(forward_plan<double>(f, call).workspace());
  else
    arena.take<float>(forward_plan<float>(f, call).workspace());
  return arena.bytes();
}

}  // namespace hw::softmax::simt
