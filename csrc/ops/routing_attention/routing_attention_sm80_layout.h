// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on tensor cores: how it is cut. No device code here.
#pragma once

#include "ops/routing_attention/routing_attention_simt_layout.h"
#include "softmax/sm80/layout.h"

namespace hw::routing_attention::sm80 {

// A block owns kOwn slots of a list, a strip or two of 16 for each warp:
//
//   kNarrow     a warp of its own, where all lists are this short (small regions of an image):
//               little shared memory, so that many lists load side by side
//   kMedium     of the shorter lists, warps without tokens only help to load
//   kWide       two strips read a tile of keys half as often as one: forward, plain scores
//
// Few blocks leave a device idle: then keys are cut into spans, as those of attention are.
//
// Blocks that fit into a multiprocessor of sm_80 by registers and shared memory, plain scores:
//
//   width           32    64   128
//   narrow          14     8     7   forward, of a warp        13, 7, 6   gradients
//   medium           4     3     3   forward, of 4 warps        3, 3, 2   d_q    2, 2, 2   d_k, d_v
//   wide             2     2     2   forward, of 4 warps, two strips each
inline constexpr int kNarrow = 16, kMedium = 64, kWide = 128;

template <int kOwn, int kDim>
struct ForwardTiles {
  static constexpr int kRows = kOwn;
  static constexpr int keys(bool) {
    return kOwn == kNarrow ? (kDim <= 64 ? 32 : 16) : (kDim <= 64 ? 64 : 32);
  }
  static constexpr int kStrips = kOwn == kWide ? 2 : 1, kWarps = kRows / (16 * kStrips);
  static constexpr int blocks(bool plain) {
    return kOwn == kNarrow ? 16 : kOwn == kWide ? 2 : plain && kDim <= 32 ? 4 : 3;
  }
};

template <int kOwn_>
struct LoopTiles {
  static constexpr int kOwn = kOwn_, kWarps = kOwn / 16;
  static constexpr int others(int dim, bool plain) {
    if (kOwn == kNarrow) return dim <= 64 ? 32 : 16;
    return softmax::sm80::LoopTiles::others(dim, plain);
  }
  static constexpr bool has_teams(int, bool) { return false; }
  static constexpr int strips_of_queries(int, bool) { return 1; }
};

// The cut of blocks of kOwn slots.
template <int kOwn>
struct ListCut {
  template <int kDim>
  using Forward = ForwardTiles<kOwn, kDim>;
  using Loop = LoopTiles<kOwn>;
};

using softmax::sm80::is_plain;  // gates do not change scores: mixtures of heads are plain too

// Slots of a block of the forward pass.
inline int rows_of_block(const ForwardParams& p) {
  if (!is_plain(p)) return kMedium;
  return p.max_q <= kNarrow ? kNarrow : p.max_q <= kMedium ? kMedium : kWide;
}

// Bytes of workspace of a forward call: behind what both CUDA backends have, partial results of the
// spans of keys.
inline int64_t workspace_bytes(const ForwardParams& p, int64_t multiprocessors) {
  const int64_t sequences = p.batch() * p.groups();
  Arena arena;
  static_cast<void>(forward_workspace(arena, shape_of(p)));
  softmax::sm80::lay_out(arena, p, sequences,
                         softmax::sm80::plan_of(p, sequences, rows_of_block(p), multiprocessors));
  return arena.bytes();
}

}  // namespace hw::routing_attention::sm80
