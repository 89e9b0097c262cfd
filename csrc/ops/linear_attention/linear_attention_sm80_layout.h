// SPDX-License-Identifier: Apache-2.0
// Linear attention on tensor cores: what it takes, how it is cut, and its workspace, from shapes,
// scalars and the device only. No device code here: the host side asks `sm80::why_not`, `dim` and
// `workspace_bytes`.
#pragma once

#include <cmath>
#include <string>

#include "ops/linear_attention/linear_attention_plan.h"

#include "core/host/cuda_device.h"
#include "core/host/workspace.h"

namespace hw::linear_attention::sm80 {

inline constexpr int kMaxDim = 16;         // columns of q and k
inline constexpr int kMaxValueTile = 128;  // columns of v in a block
inline constexpr int kLeastTile = 64;

// Shared memory of a block: every device from sm_80 on has the first, sm_80 and sm_90 the second,
// which the gradients of the largest tile need.
inline constexpr int kSharedLimit = 99 * 1024, kWideSharedLimit = 160 * 1024;

// The largest value tile that a pass has on the device of the call.
inline int max_tile(bool gradients, const Call& call) {
  if (!gradients) return kMaxValueTile;
  const int bytes = cuda_device(call.tensors[0].device_index).shared_bytes_per_block;
  return bytes < kWideSharedLimit ? kLeastTile : kMaxValueTile;
}

// The value tile wanted: dv columns; of more than the largest tile, slices of it.
inline int dim(const ForwardParams& p, bool gradients, const Call& call) {
  return min_of(p.value_dim(), max_tile(gradients, call));
}

// The tile of the instance that a call runs with.
inline int tile_of(const ForwardParams& p, bool gradients, const Call& call) {
  return dim(p, gradients, call) <= kLeastTile ? kLeastTile : kMaxValueTile;
}

// Why a call cannot run here; empty if it can.
inline std::string why_not(const ForwardParams& p) {
  if (p.map != FeatureMap::taylor2)
    return "the tensor-core kernels have feature_map='taylor2' only";
  if (p.dim() > kMaxDim) return concat("D = ", p.dim(), " is above ", kMaxDim);
  return {};
}
inline std::string why_not_backward(const BackwardParams& p) {
  // States over queries are kept without their coefficients: see _sm80_state.cuh.
  const double scale = std::abs(p.scale);
  if (!(scale >= 1e-6 && scale <= 1e6) && (scale != 0 || p.d_kv1))
    return concat("|scale| = ", scale, " is not in 1e-6 .. 1e6 in the backward pass");
  return why_not(p);
}

// Tokens up to which tiles alone are always faster than states: a chunk meets an earlier one in 64
// mma per warp, a state costs it 160. Beyond, up to direct_limit(), the direct schedule pays where
// it is what fills the device.
inline constexpr int64_t kAlwaysDirect = 256;

inline Plan plan_of(CallSizes s, int tile) {
  const int64_t slices = max_of(ceil_div(s.value_dim, tile), 1);
  const int64_t side_by_side = tile == kLeastTile ? 2 : 1;  // kMinBlocks of the kernels
  const bool full = s.sequences * s.key_heads * slices >= side_by_side * s.multiprocessors;
  s.any_state |= s.tokens > kAlwaysDirect && full;
  return make_plan(s, slices, kChunk, side_by_side);
}

// Parts of the workspace; forward has only `slots`.
struct Workspace {
  StateLayout states;
  float* slots = nullptr;   // states over keys; then, backward, over queries
  float* factor = nullptr;  // [B, S, Hq] 1 / z_i, 0 where z_i is
  float* delta = nullptr;   // [B, S, Hq] -<do_i, o_i>
  float* sum = nullptr;     // [B, S, Hq, kMaxDim] dq, then dk, while slices of v are added up
};

inline Workspace lay_out(Arena& arena, bool gradients, const CallSizes& s, const Plan& plan,
                         int tile) {
  Workspace w;
  w.states = state_layout(s, plan);
  const int64_t queries = gradients ? s.batch * s.tokens * s.query_heads : 0;
  const int64_t rows = s.normalize ? queries : 0;
  w.slots = arena.take<float>(plan.has_totals() ? w.states.size() : 0);
  w.factor = arena.take<float>(rows);
  w.delta = arena.take<float>(rows);
  w.sum = arena.take<float>(s.value_dim > tile ? queries * kMaxDim : 0);
  return w;
}

inline int64_t workspace_bytes(bool gradients, const CallSizes& s, int tile) {
  Arena arena;
  lay_out(arena, gradients, s, plan_of(s, tile), tile);
  return arena.bytes();
}

}  // namespace hw::linear_attention::sm80
