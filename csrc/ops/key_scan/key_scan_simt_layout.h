// SPDX-License-Identifier: Apache-2.0
// Key scan on CUDA: how a call is cut into work, and its workspace; from shapes only.
//
// A unit is one head, one slice of value columns, one segment of time. It is carried by 8, 16 or 32
// lanes of a warp; a lane owns as many columns as make 16 bytes: side by side where the strides
// allow 16-byte loads, else as many as there are lanes apart. A warp carries 4, 2 or 1 units.
// Time is cut only if the heads alone leave the device idle: then
//   (a) every segment scans from an empty state,  (b) the states are combined in order,
//   (c) every segment scans again from its true start.
#pragma once

#include <cstdint>

#include "ops/key_scan/key_scan.h"

#include "core/host/workspace.h"
#include "core/math.h"

namespace hw::key_scan::simt {

inline constexpr int kThreads = 128;
inline constexpr int kSegmentStep = 64;         // segments are multiples of this
inline constexpr int kThreadsWanted = 2 * 128;  // per multiprocessor

// Columns of a lane.
template <class Element>
inline constexpr int kOwn = 16 / static_cast<int>(sizeof(Element));

struct Geometry {
  int64_t batch = 0, tokens = 0, heads = 0, value_dim = 0;
  int lanes = 32;        // of a unit
  int slices = 1;        // of the value columns
  int64_t segments = 1;  // of time; one also where there is no token
  int64_t segment_tokens = 0;

  HW_HOST_DEVICE int64_t batch_heads() const { return batch * heads; }
  HW_HOST_DEVICE int64_t units() const { return batch_heads() * slices * segments; }
  HW_HOST_DEVICE int units_per_block() const { return kThreads / lanes; }
  int64_t blocks() const { return ceil_div<int64_t>(units(), units_per_block()); }
};

template <class Element>
Geometry make_geometry(const Ref<const void, 4>& v, const Context& context) {
  Geometry g;
  g.batch = v.size[0], g.tokens = v.size[1], g.heads = v.size[2], g.value_dim = v.size[3];
  const int64_t needed = ceil_div<int64_t>(g.value_dim, kOwn<Element>);
  g.lanes = needed <= 8 ? 8 : needed <= 16 ? 16 : 32;
  g.slices = static_cast<int>(max_of<int64_t>(ceil_div<int64_t>(needed, g.lanes), 1));
  const int64_t wanted = kThreadsWanted * max_of<int64_t>(context.multiprocessors, 1);
  const int64_t have = max_of<int64_t>(g.batch_heads() * g.slices * g.lanes, 1);
  const int64_t length = ceil_div(max_of<int64_t>(g.tokens, 1), ceil_div(wanted, have));
  g.segment_tokens = round_up<int64_t>(length, kSegmentStep);
  g.segments = max_of<int64_t>(ceil_div(g.tokens, g.segment_tokens), 1);
  return g;
}

// Offsets in the workspace, counted in accumulators. Segments first, then (batch, head).
struct Workspace {
  int64_t rows = 0;    // [segments, B, H, Dv]       forward: o;  backward: R
  int64_t own = 0;     // [segments, B, H, 2]        forward: max and sum of the segment alone
  int64_t start = 0;   // [segments, B, H, 2]        forward: max and sum before the segment
  int64_t totals = 0;  // [segments, B, H, slices]   backward: T
  int64_t scores = 0;  // [slices, B, S + 1, H]      backward: ds, and d_lse0 behind the last row
  int64_t size = 0;
};

inline Workspace make_workspace(const Geometry& g, bool gradients) {
  Workspace w;
  const auto take = [&w](int64_t count) {
    const int64_t at = w.size;
    w.size += round_up<int64_t>(count, 32);
    return at;
  };
  const int64_t cuts = g.segments > 1 ? g.segments * g.batch_heads() : 0;
  w.rows = take(cuts * g.value_dim);
  w.own = take(gradients ? 0 : cuts * 2);
  w.start = take(gradients ? 0 : cuts * 2);
  w.totals = take(gradients ? cuts * g.slices : 0);
  w.scores = take(gradients && g.slices > 1 ? g.slices * g.batch_heads() * (g.tokens + 1) : 0);
  return w;
}

// Bytes of workspace of a call, forward or with gradients.
inline int64_t workspace_bytes(const ForwardParams& p, const Call& call, bool gradients) {
  const auto accumulators = [&](const Geometry& g) { return make_workspace(g, gradients).size; };
  Arena arena;
  switch (call.element) {
    case DType::f64:
      arena.take<double>(accumulators(make_geometry<double>(p.v, call.context)));
      break;
    case DType::f32:
      arena.take<float>(accumulators(make_geometry<float>(p.v, call.context)));
      break;
    default: arena.take<float>(accumulators(make_geometry<bf16>(p.v, call.context)));
  }
  return arena.bytes();
}

}  // namespace hw::key_scan::simt
