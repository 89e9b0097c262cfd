// SPDX-License-Identifier: Apache-2.0
// Places in order: of the threads of a block that say yes, how many come before the calling one.
// What a kernel keeps of a row goes to memory in the order of the row, with integers alone.
#pragma once

#include <bit>
#include <cstdint>

#include "core/gpu/device.cuh"

namespace hw::dev {

struct BlockRank {
  int64_t before, all;
};

// Block-wide. `votes` is shared memory, a word per warp; calls that share it may follow each other.
template <int kThreads>
HW_DEVICE HW_INLINE BlockRank block_rank(bool yes, unsigned* votes) {
  static_assert(kThreads % kWarp == 0, "whole warps vote");
  const uint32_t votes_of_warp = ballot(yes);
  sync_block();  // everyone has read the votes of the call before
  if (lane() == 0) votes[warp()] = static_cast<unsigned>(std::popcount(votes_of_warp));
  sync_block();
  BlockRank p{std::popcount(votes_of_warp & ((1u << lane()) - 1u)), 0};
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp()) p.before += votes[w];
    p.all += votes[w];
  }
  return p;
}

}  // namespace hw::dev
