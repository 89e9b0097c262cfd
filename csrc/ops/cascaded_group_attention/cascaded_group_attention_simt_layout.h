// SPDX-License-Identifier: Apache-2.0
// Cascaded group attention without tensor cores: what a block keeps of its window, and where; from
// shapes only, and no device code.
//
// It lies in shared memory if a block may have that much, otherwise in the workspace, of which each
// of as many blocks as the device is busy with has a part; these take windows in turn.
#pragma once

#include <cstdint>

#include "ops/cascaded_group_attention/cascaded_group_attention.h"

#include "core/dtype.h"
#include "core/host/cuda_device.h"
#include "core/host/workspace.h"

namespace hw::cascaded_group_attention::simt {

inline constexpr int kThreads = 256, kWarps = kThreads / 32;
inline constexpr int kBlocksAtOnce = 4;  // of a multiprocessor

// Offsets, counted in accumulators.
struct Layout {
  int64_t f = 0;       // [N, d]
  int64_t qkv = 0;     // [N, F]
  int64_t q = 0;       // [N, K]     convolved, scaled
  int64_t relu = 0;    // [N, C]
  int64_t scores = 0;  // [warps, N] of a query each
  int64_t size = 0;
};

inline Layout make_layout(const ForwardParams& p) {
  Layout l;
  const auto take = [&](int64_t count) {
    const int64_t at = l.size;
    l.size += round_up<int64_t>(count, 4);
    return at;
  };
  l.f = take(p.tokens() * p.group());
  l.qkv = take(p.tokens() * p.projected());
  l.q = take(p.tokens() * p.key_dim());
  l.relu = take(p.tokens() * p.channels());
  l.scores = take(kWarps * p.tokens());
  return l;
}

struct Plan {
  Layout layout;
  int64_t bytes;   // of a block
  bool in_shared;  // memory
  int64_t blocks;
};

inline Plan make_plan(const ForwardParams& p, const Call& call) {
  Plan plan{.layout = make_layout(p), .bytes = 0, .in_shared = false, .blocks = p.windows()};
  plan.bytes = plan.layout.size * max_of<int64_t>(dtype_size(call.element), sizeof(float));
  plan.in_shared = plan.bytes <= cuda_device(call.tensors[0].device_index).shared_bytes_per_block;
  const int64_t at_once = int64_t{kBlocksAtOnce} * max_of(call.context.multiprocessors, 1);
  if (!plan.in_shared) plan.blocks = min_of(plan.blocks, at_once);
  return plan;
}

inline int64_t workspace_bytes(const ForwardParams& p, const Call& call) {
  const Plan plan = make_plan(p, call);
  Arena arena;
  if (!plan.in_shared) arena.take<char>(plan.blocks * plan.bytes);
  return arena.bytes();
}

}  // namespace hw::cascaded_group_attention::simt
