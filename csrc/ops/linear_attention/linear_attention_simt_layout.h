// SPDX-License-Identifier: Apache-2.0
// Linear attention without tensor cores: tile sizes, shared memory and workspace, from shapes only.
// No device code here: the host side asks `simt::workspace_bytes`.
//
// A block owns a slice of `columns` value columns of one segment of one key head. It holds the
// state of that slice [F, columns] and walks over chunks of 32 rows. 128 threads are 16 row groups
// times 8 column lanes; a thread owns 2 rows x columns / 8 columns of what its block computes.
//
//   wide     128 bytes of columns (32 floats, 16 doubles), if the state then fits
//   narrow   8 columns, for more features (taylor2 with D = 32: 561) and for small Dv
// q and k are held 32 columns at a time, so that any D runs; taylor2 needs one such tile. Shared
// memory stays within 64 KB, what sm_75 has; a state beyond that lives in the workspace instead.
#pragma once

#include "ops/linear_attention/linear_attention_plan.h"

#include "core/host/workspace.h"

namespace hw::linear_attention::simt {

inline constexpr int kRows = 32;  // rows of a chunk
inline constexpr int kThreads = 128;
inline constexpr int kLanes = 8;  // threads along columns
inline constexpr int kGroups = kThreads / kLanes;
inline constexpr int kTileDim = 32;  // columns of q and k held at a time
inline constexpr int kNarrow = 8;
inline constexpr int kSharedLimit = 64 * 1024;

template <class Acc>
inline constexpr int kWide = 128 / static_cast<int>(sizeof(Acc));
// Rows of tiles are padded by 16 bytes: rows that follow each other start in different banks.
template <class Acc>
inline constexpr int kPad = 16 / static_cast<int>(sizeof(Acc));
template <class Acc>
inline constexpr int kRowStride = kRows + kPad<Acc>;

// Where each tile starts in shared memory, counted in accumulators. "Outer" rows are those that
// the block computes (q: o, dq; k: dk, dv), "inner" ones those that it sums over.
struct SharedLayout {
  int outer = 0;        // [tile_dim + 1][kRowStride]  pre-mapped q or k, transposed; last row: ones
  int inner = 0;        // [tile_dim + 1][kRowStride]
  int values = 0;       // [kRows][columns + pad]      v or g of the inner rows
  int cotangents = 0;   // [kRows][columns + pad]      g or v of the outer rows
  int inner_extra = 0;  // [kRows]                     1 or dz
  int outer_extra = 0;  // [kRows]
  int weights = 0;   // [kRows][kRowStride]         w or ds, inner x outer; also dm, feature x outer
  int gradient = 0;  // [tile_dim][kRowStride]      dq or dk, transposed
  int pairs = 0;     // [tile_features]             FeaturePair
  int z = 0;         // [F]
  int kv = 0;        // [F][columns + pad]
  int size = 0;
};

// The monomial m_f = x_a x_b; a column equal to tile_dim is the constant 1.
struct FeaturePair {
  uint8_t a, b;
};

struct Geometry {
  Plan plan;
  int columns = 0, slices = 1;
  int tile_dim = 0, dim_tiles = 1;  // columns of q and k in a tile, number of tiles
  int tile_features = 0;            // features of a tile
  bool resident = true;             // the state is in shared memory
  bool keeps_sums = false;          // backward: dq and dk wait in the workspace in between
  SharedLayout shared;              // backward: of the gradient kernels
  StateLayout states;

  // z of a state that is not resident, of one slice: behind the slots.
  HW_HOST_DEVICE int64_t running_z(int64_t slot, int64_t head, int64_t slice) const {
    return states.size() + ((slot * states.heads + head) * slices + slice) * states.features;
  }
  // Accumulators of the states of one direction.
  int64_t state_size() const {
    if (plan.schedule == Schedule::direct) return 0;
    if (!resident) return running_z(states.slots, 0, 0);
    return plan.has_totals() ? states.size() : 0;
  }
};

template <class Acc>
SharedLayout shared_layout(const Geometry& g, int features, bool gradients) {
  SharedLayout s;
  const auto take = [&s](int count) {
    const int at = s.size;
    s.size += round_up(count, kPad<Acc>);
    return at;
  };
  const int value_tile = kRows * (g.columns + kPad<Acc>);
  const bool state = g.resident && g.plan.schedule != Schedule::direct;
  s.outer = take((g.tile_dim + 1) * kRowStride<Acc>);
  s.inner = take((g.tile_dim + 1) * kRowStride<Acc>);
  s.values = take(value_tile);
  s.cotangents = take(gradients ? value_tile : 0);
  s.inner_extra = take(kRows);
  s.outer_extra = take(kRows);
  s.weights = take(kRows * kRowStride<Acc>);
  s.gradient = take(gradients ? g.tile_dim * kRowStride<Acc> : 0);
  s.pairs = take(ceil_div(g.tile_features * static_cast<int>(sizeof(FeaturePair)),
                          static_cast<int>(sizeof(Acc))));
  s.z = take(state ? features : 0);
  s.kv = take(state ? features * (g.columns + kPad<Acc>) : 0);
  return s;
}

template <class Acc>
Geometry make_geometry(const CallSizes& s, FeatureMap map, bool gradients) {
  Geometry g;
  g.tile_dim = min_of(s.dim, kTileDim);
  g.dim_tiles = max_of(ceil_div(s.dim, kTileDim), 1);
  g.tile_features = map == FeatureMap::taylor2 ? s.features : g.tile_dim;
  const auto fit = [&](int columns, bool resident) {
    g.columns = columns;
    g.resident = resident;
    g.slices = max_of(ceil_div(s.value_dim, columns), 1);
    g.plan = make_plan(s, gradients ? 1 : g.slices, kRows);  // gradient blocks take all slices
    g.shared = shared_layout<Acc>(g, s.features, gradients);
    return g.shared.size * static_cast<int64_t>(sizeof(Acc)) <= kSharedLimit;
  };
  const bool resident = s.features <= kSharedLimit / kNarrow;  // keeps the sizes within an int
  if (!(resident && s.value_dim > kNarrow && fit(kWide<Acc>, true)) &&
      !(resident && fit(kNarrow, true))) {
    fit(kNarrow, false);
  }
  g.keeps_sums = gradients && (g.slices > 1 || g.dim_tiles > 1);
  g.states = {g.plan.num_slots, s.key_heads, s.features,
              static_cast<int64_t>(g.slices) * g.columns};
  return g;
}

// Parts of the workspace; forward has only `states`.
template <class Acc>
struct Workspace {
  // kv [slots, H, F, slices * columns], z [slots, H, F]: over keys; then, backward, over queries
  Acc* states = nullptr;
  Acc* d_z = nullptr;  // [B, S, Hq]     dz_i = -<do_i, o_i> / z_i
  Acc* d_q = nullptr;  // [B, S, Hq, D]
  Acc* d_k = nullptr;  // [B, S, H, D]
};

template <class Acc>
Workspace<Acc> lay_out(Arena& arena, const CallSizes& s, const Geometry& g, bool gradients) {
  Workspace<Acc> w;
  const int64_t rows = s.batch * s.tokens;
  const int64_t sums = g.keeps_sums ? rows * s.dim : 0;
  w.states = arena.take<Acc>(g.state_size());
  w.d_z = arena.take<Acc>(gradients && s.normalize ? rows * s.query_heads : 0);
  w.d_q = arena.take<Acc>(sums * s.query_heads);
  w.d_k = arena.take<Acc>(sums * s.key_heads);
  return w;
}

// Bytes of workspace of a call, forward or with gradients; `step` needs none.
inline int64_t workspace_bytes(const CallSizes& s, FeatureMap map, DType element, bool gradients) {
  Arena arena;
  if (element == DType::f64)
    lay_out<double>(arena, s, make_geometry<double>(s, map, gradients), gradients);
  else
    lay_out<float>(arena, s, make_geometry<float>(s, map, gradients), gradients);
  return arena.bytes();
}

}  // namespace hw::linear_attention::simt
