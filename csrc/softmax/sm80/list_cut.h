// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: the cut of work on short lists of slots, of regions, clusters or
// windows. No device code here.
#pragma once

#include "softmax/sm80/layout.h"

namespace hw::softmax::sm80 {

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
struct ListForwardTiles {
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
struct ListLoopTiles {
  static constexpr int kOwn = kOwn_, kWarps = kOwn / 16;
  static constexpr int others(int dim, bool plain) {
    if (kOwn == kNarrow) return dim <= 64 ? 32 : 16;
    return LoopTiles::others(dim, plain);
  }
  static constexpr bool has_teams(int, bool) { return false; }
  static constexpr int strips_of_queries(int, bool) { return 1; }
};

// The cut of blocks of kOwn slots.
template <int kOwn>
struct ListCut {
  template <int kDim>
  using Forward = ListForwardTiles<kOwn, kDim>;
  using Loop = ListLoopTiles<kOwn>;
};

// Slots of a block of the forward pass of lists of up to p.max_q slots.
inline int rows_of_list_block(const ForwardParams& p) {
  if (!is_plain(p)) return kMedium;
  return p.max_q <= kNarrow ? kNarrow : p.max_q <= kMedium ? kMedium : kWide;
}

}  // namespace hw::softmax::sm80
