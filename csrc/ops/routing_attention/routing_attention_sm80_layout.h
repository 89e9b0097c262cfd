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
  static constexpr int kKeys = kOwn == kNarrow ? (kDim <= 64 ? 32 : 16) : (kDim <= 64 ? 64 : 32);
  static constexpr int strips(bool) { return kOwn == kWide ? 2 : 1; }
  static constexpr int warps(bool) { return kRows / (16 * strips(true)); }
  static constexpr int blocks(bool plain) {
    return kOwn == kNarrow ? 16 : kOwn == kWide ? 2 : plain && kDim <= 64 ? 4 : 3;
  }
};

template <int kSlots>
struct LoopTiles : softmax::sm80::LoopTiles {};
template <>
struct LoopTiles<kNarrow> {
  static constexpr int kOwn = kNarrow;
  static constexpr int others(int dim, bool) { return dim <= 64 ? 32 : 16; }
};

}  // namespace hw::routing_attention::sm80
