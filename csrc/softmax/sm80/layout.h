// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: what it takes, how it is cut, and its workspace, from shapes and
// scalars only. No device code here: the host side asks `workspace_bytes`.
#pragma once

#include "softmax/mask.h"
#include "softmax/params.h"

#include "core/host/workspace.h"

namespace hw::softmax::sm80 {

// Whether a call has a PlainScore: scores are scale > 0 times products, masked, and weights a
// softmax. 1 / scale is a float.
inline bool has_plain_scores(const ScoreParams& p) {
  return is_softmax(p.activation) && p.scale > 1e-30 && p.softcap == 0 && !p.bias && !p.key_bias &&
         !p.key_gain && !p.row_temperature;
}

// Whether a forward pass of such scores makes outputs and row statistics, and no read-outs.
inline bool is_plain(const ForwardParams& f) {
  return has_plain_scores(f) && !f.entropy && !f.p_max && !f.sq_norm && !f.mass;
}

// Tiles of the forward kernel of a compiled width. Two strips of 16 rows per warp read a tile of
// keys half as often as one; scores that are not plain leave registers for narrow tiles only.
template <int kDim>
struct ForwardTiles {
  static constexpr int kRows = kDim <= 128 ? 128 : 64;
  static constexpr int keys(bool plain) { return plain && kDim <= 64 ? 64 : 32; }
  static constexpr int kStrips = kDim <= 128 ? 2 : 1, kWarps = kRows / (16 * kStrips);
  static constexpr int blocks(bool) { return kStrips; }
};

// Tiles of the loop of the other passes: own rows of a block, other rows of a tile. Two tensors of
// either side, the other one twice, fit the shared memory of every architecture from sm_80 on; the
// sums of both d_k and d_v beside scores that are not plain need narrow tiles.
struct LoopTiles {
  static constexpr int kWarps = 4;
  static constexpr int others(int dim, bool plain) {
    const int most = dim <= 64 ? 64 : dim <= 128 ? 32 : 16;
    return plain ? most : most < 32 ? 16 : most / 2;
  }
  // Strips of 16 rows of a warp: the more, the less often tiles are read. Registers hold one sum of
  // two strips of 128 columns, or of three of 64 beside what else a warp needs. Of d_k and d_v a
  // warp has one: two warps share their keys.
  static constexpr bool has_teams(int dim, bool plain) { return plain && dim <= 128; }
  static constexpr int strips_of_queries(int dim, bool plain) {
    return plain && dim <= 128 ? 2 : 1;
  }
  static constexpr int strips_of_teams(int dim) { return dim <= 64 ? 3 : 2; }
  static constexpr int kOthersOfTeams = 32;
};

// How work on the slots of a sequence in its order is cut. Other sources may have a cut of their
// own, with the same members.
struct SequenceCut {
  template <int kDim>
  using Forward = ForwardTiles<kDim>;
  using Loop = LoopTiles;
};

inline constexpr int kSharedLimit = 99 * 1024;

// Few blocks of rows (decoding): the keys are cut into spans, whose partial results are merged.
inline constexpr int64_t kFewRowBlocks = 64, kMinSpan = 128;
inline constexpr int64_t kBlocksAtOnce = 2;  // of a multiprocessor

// Blocks run in rounds of as many as the device holds, and the last round may be almost empty. The
// fewest spans that keep nearly as much of the device busy as any number of them; very few blocks
// fill one round almost.
inline int64_t spans_of(int64_t row_blocks, int64_t at_once, int64_t most) {
  constexpr int64_t kSome = 8;
  if (row_blocks * kSome <= at_once) return min_of(at_once / row_blocks, most);
  const auto use = [&](int64_t spans) {
    const int64_t blocks = row_blocks * spans;
    return static_cast<double>(blocks) / static_cast<double>(round_up(blocks, at_once));
  };
  double best = 0;
  for (int64_t n = 1; n <= min_of(most, 2 * kSome); ++n) best = max_of(best, use(n));
  int64_t spans = 1;
  while (use(spans) < 0.85 * best) ++spans;
  return spans;
}

struct Plan {
  int64_t blocks_of_head = 0;   // of rows, per head of a sequence
  int64_t row_blocks = 0;       // of all heads
  int64_t spans = 1, span = 0;  // keys of a span, a multiple of every tile
};

inline Plan plan_of(const ForwardParams& f, int64_t sequences, int rows, int64_t multiprocessors) {
  Plan p;
  const int64_t at_once = kBlocksAtOnce * max_of<int64_t>(multiprocessors, 1);
  p.blocks_of_head = ceil_div<int64_t>(f.max_q, rows);
  p.row_blocks = p.blocks_of_head * f.query_heads() * sequences;
  const bool few = p.row_blocks <= kFewRowBlocks || p.blocks_of_head == 1;
  if (p.row_blocks > 0 && few && p.row_blocks < at_once)
    p.spans = max_of<int64_t>(1, spans_of(p.row_blocks, at_once, ceil_div(f.max_k, kMinSpan)));
  p.span = round_up(ceil_div(max_of<int64_t>(f.max_k, 1), p.spans), kMinSpan);
  p.spans = ceil_div(max_of<int64_t>(f.max_k, 1), p.span);
  return p;
}

inline constexpr int kSumsOfRow = 5;  // members of RowSums

// Partial results, per span: w before its division [rows, Dv], RowSums [rows]; rows = [N, Hq,
// max_q]. Null where there is one span.
struct Workspace {
  int64_t rows = 0, values = 0;  // values: Dv
  float *w = nullptr, *sums = nullptr;
};

inline Workspace lay_out(Arena& arena, const ForwardParams& f, int64_t sequences,
                         const Plan& plan) {
  Workspace at;
  if (plan.spans == 1) return at;
  at.rows = sequences * f.query_heads() * f.max_q;
  at.values = f.value_dim();
  at.w = arena.take<float>(plan.spans * at.rows * at.values);
  at.sums = arena.take<float>(plan.spans * at.rows * kSumsOfRow);
  return at;
}

inline int64_t workspace_bytes(const ForwardParams& f, int64_t multiprocessors) {
  const bool narrow = max_of(f.dim(), f.value_dim()) <= 128;
  const int rows = narrow ? ForwardTiles<128>::kRows : ForwardTiles<256>::kRows;
  Arena arena;
  lay_out(arena, f, f.sequences(), plan_of(f, f.sequences(), rows, multiprocessors));
  return arena.bytes();
}

}  // namespace hw::softmax::sm80
