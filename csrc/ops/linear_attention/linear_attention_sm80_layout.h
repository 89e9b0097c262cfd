// SPDX-License-Identifier: Apache-2.0
// Linear attention on tensor cores: what it takes, how it is cut, and its workspace, from shapes,
// scalars and the device only. No device code here: the host side asks `sm80::why_not`, `dim` and
// `workspace_bytes`.
#pragma once

#include <cmath>
#include <string>

#include "ops/linear_attention/linear_attention_plan.h"

#include "core/host/cuda_device.h"

namespace hw::linear_attention::sm80 {

inline constexpr int kMaxDim = 16;         // columns of q and k
inline constexpr int kMaxValueTile = 128;  // columns of v in a block
inline constexpr int kLeastTile = 64;

// Shared memory of a block: every device from sm_80 on has the first, sm_80 and sm_90 the second,
// which the gradients of the largest tile need.
inline constexpr int kSharedLimit = 99 * 1024, kWideSharedLimit = 160 * 1024;

enum class Pass : int { forward = 0, backward = 1 };

inline Shape shape_of_pass(Pass pass, const Call& call) {
  return pass == Pass::backward ? backward_shape(call) : forward_shape(call);
}

// The largest value tile that a pass has on the device of the call.
inline int max_tile(Pass pass, const Call& call) {
  if (pass == Pass::forward) return kMaxValueTile;
  const int bytes = cuda_device(call.tensor(0).device_index).shared_bytes_per_block;
  return bytes < kWideSharedLimit ? kLeastTile : kMaxValueTile;
}

// The value tile wanted: dv columns; of more than the largest tile, slices of it.
inline int dim(Pass pass, const Call& call) {
  return static_cast<int>(min_of<int64_t>(call.tensor(2).size[3], max_tile(pass, call)));
}

// The tile of the instance that a call runs with.
inline int tile_of(Pass pass, const Call& call) {
  return dim(pass, call) <= kLeastTile ? kLeastTile : kMaxValueTile;
}

// Why a forward or backward call cannot run here; empty if it can.
inline std::string why_not(Pass pass, const Call& call) {
  const Shape s = shape_of_pass(pass, call);
  const int first = static_cast<int>(call.scalars.size()) - 5;
  const auto map = static_cast<FeatureMap>(call.integer(first));
  const double scale = std::abs(call.scalar(first + 3));
  if (map != FeatureMap::taylor2) return "the tensor-core kernels have feature_map='taylor2' only";
  if (s.dim > kMaxDim) return concat("D = ", s.dim, " is above ", kMaxDim);
  // States over queries are kept without their coefficients: see state.cuh.
  const bool given =
      pass == Pass::backward && (call.tensor(9).present() || call.tensor(10).present());
  if (pass == Pass::backward && !(scale >= 1e-6 && scale <= 1e6) && (scale != 0 || given))
    return concat("|scale| = ", scale, " is not in 1e-6 .. 1e6 in the backward pass");
  return {};
}

// Tokens up to which tiles alone are always faster than states: a chunk meets an earlier one in 64
// mma per warp, a state costs it 160. Beyond, up to direct_limit(), the direct schedule pays where
// it is what fills the device.
inline constexpr int64_t kAlwaysDirect = 256;

inline Plan plan_of(Shape s, int tile) {
  const int64_t slices = max_of(ceil_div(s.value_dim, tile), 1);
  const bool full = s.sequences * s.key_heads * slices >= 2 * s.multiprocessors;
  s.any_state |= s.tokens > kAlwaysDirect && full;
  return make_plan(s, slices, kChunk);
}

// Byte offsets in the workspace; forward has only `slots`.
struct Workspace {
  StateLayout states;
  int64_t slots = 0;   // states over keys, fp32; then, backward, over queries
  int64_t factor = 0;  // [B, S, Hq] 1 / z_i, 0 where z_i is
  int64_t delta = 0;   // [B, S, Hq] -<do_i, o_i>
  int64_t sum = 0;     // [B, S, Hq, kMaxDim] dq, then dk, while slices of v are added up
  int64_t bytes = 0;
};

inline Workspace make_workspace(Pass pass, const Shape& s, const Plan& plan, int tile) {
  const bool backward = pass == Pass::backward;
  Carver carver;
  Workspace w;
  w.states = state_layout(s, plan);
  const int64_t queries = backward ? s.batch * s.tokens * s.query_heads : 0;
  const int64_t rows = s.normalize ? queries : 0;
  w.slots = carver.take(plan.has_totals() ? w.states.size() : 0, sizeof(float));
  w.factor = carver.take(rows, sizeof(float));
  w.delta = carver.take(rows, sizeof(float));
  w.sum = carver.take(s.value_dim > tile ? queries * kMaxDim : 0, sizeof(float));
  w.bytes = carver.bytes;
  return w;
}

inline int64_t workspace_bytes(Pass pass, const Call& call) {
  const Shape s = shape_of_pass(pass, call);
  const int tile = tile_of(pass, call);
  return make_workspace(pass, s, plan_of(s, tile), tile).bytes;
}

}  // namespace hw::linear_attention::sm80
