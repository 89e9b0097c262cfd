// SPDX-License-Identifier: Apache-2.0
// Linear attention on tensor cores (mma, ldmatrix, cp.async): bf16 and f16, taylor2 with D <= 16,
// any strides, any Dv.
//
//   _sm80_layout.h       what it takes, plan and workspace
//   _sm80_tile.cuh       tiles, fragments, features in slots
//   _sm80_state.cuh      the state in registers
//   _sm80_loop.cuh       roles of the tensors, the walk of a block
//   _sm80_forward.cuh    the loop that applies weights: o, dv; totals of segments
//   _sm80_backward.cuh   the loop that differentiates scores: dq, dk
//
// Phases: (a) totals of the segments, (b) their prefix (shared with the simt backend), (c) the
// loop. (a) and (b) only where the plan cuts sequences, or where every row sees the whole sequence.
#pragma once

#include "ops/linear_attention/linear_attention_simt_totals.cuh"
#include "ops/linear_attention/linear_attention_sm80_backward.cuh"
#include "ops/linear_attention/linear_attention_sm80_forward.cuh"
#include "ops/linear_attention/linear_attention_sm80_layout.h"

#include "core/gpu/launch.h"

namespace hw::linear_attention::sm80 {

// A call, its plan and its workspace.
template <class Params>
struct Work {
  const Params& params;
  CallSizes shape;
  Plan plan;
  Workspace at;
  const Context& context;

  int64_t slices(int tile) const { return max_of(ceil_div(shape.value_dim, tile), 1); }

  // One number per query, [B, S, Hq].
  Ref<const float, 3> per_query(const float* data) const {
    const int64_t heads = shape.query_heads;
    return {data, {shape.batch, shape.tokens, heads}, {shape.tokens * heads, heads, 1}};
  }

  // States of the segments.
  StateRefs slots() const {
    const StateLayout& l = at.states;
    StateRefs refs;
    refs.kv = {at.slots + l.kv(0, 0, 0),
               {l.slots, l.heads, l.features, l.value_dim},
               {l.kv(1, 0, 0), l.kv(0, 1, 0), l.kv(0, 0, 1), 1}};
    refs.z = {at.slots + l.z(0, 0),
              {l.slots, l.heads, l.features},
              {l.heads * l.features, l.features, 1}};
    return refs;
  }
};

// What all loops of a call have in common.
template <class Element, class Params>
LoopParams<Element> loop_params(const Work<Params>& w) {
  LoopParams<Element> p{};
  p.plan = w.plan;
  p.tokens = {w.params.cu_seqlens, w.shape.tokens};
  p.group = w.shape.group();
  p.causal = w.params.causal;
  p.normalize = w.params.normalize;
  p.scale = static_cast<float>(w.params.scale);
  p.eps = static_cast<float>(w.params.eps);
  return p;
}

// States as they come with the call; null where absent.
inline StateRefs state_refs(const Ref<const void, 4>& kv, const Ref<const void, 3>& z) {
  Ref<void, 4> kv_out;
  Ref<void, 3> z_out;
  kv_out.data = const_cast<void*>(kv.data);  // only read: it is a `before`
  z_out.data = const_cast<void*>(z.data);
  for (int i = 0; i < 4; ++i) kv_out.size[i] = kv.size[i], kv_out.stride[i] = kv.stride[i];
  for (int i = 0; i < 3; ++i) z_out.size[i] = z.size[i], z_out.stride[i] = z.stride[i];
  return {kv_out.as<float>(), z_out.as<float>()};
}

// Phases (a) and (b): p's `before` and `after` belong to the whole sequence and are replaced by
// those of the segments.
template <class Element, int kDim, bool kQueries, class Params>
void make_states(LoopParams<Element>& p, const Work<Params>& w) {
  if (!w.plan.has_totals()) return;
  const StateRefs start = p.before, final = p.after;
  p.after = w.slots();
  using Totals = TotalsKernel<Element, kDim, kQueries>;
  const Grid grid{w.plan.num_slots, w.shape.key_heads, w.slices(kDim)};
  launch<Totals>(grid, sizeof(typename Totals::Smem), w.context, p);

  simt::WalkParams<Element> walk{};
  walk.cu_seqlens = p.tokens.cu_seqlens;
  walk.num_tokens = w.shape.tokens;
  walk.causal = p.causal;
  walk.geometry.plan = w.plan;
  walk.geometry.states = w.at.states;
  walk.value_dim = w.shape.value_dim;
  walk.features = w.shape.features;
  walk.key_heads = w.shape.key_heads;
  walk.start_kv = start.kv.template as<const float>();
  walk.start_z = start.z.template as<const float>();
  walk.final_kv = final.kv;
  walk.final_z = final.z;
  walk.states = w.at.slots;
  using Prefix = simt::PrefixKernel<Element>;
  const typename Prefix::Params prefix{walk, kQueries};
  launch<Prefix>({prefix.blocks(), 1, 1}, 0, w.context, prefix);

  p.before = w.slots();
  p.after = {};
  p.by_slot = true;
}

template <class Element, int kDim, bool kQueries, class Params>
void apply(const LoopParams<Element>& p, const Work<Params>& w) {
  using Kernel = ApplyKernel<Element, kDim, kQueries>;
  const int heads = kQueries ? w.shape.key_heads : w.shape.query_heads;
  const Grid grid{w.plan.num_slots, heads, w.slices(kDim)};
  launch<Kernel>(grid, sizeof(typename Kernel::Smem), w.context, p);
}

template <class Element>
void set_output(LoopParams<Element>& p, const Ref<void, 4>& y) {
  p.y = y.template as<Element>();
  p.y_paired = rows_aligned(p.y, 4);
}

template <class Params>
Work<Params> work_of(const Params& params, const CallSizes& shape, bool gradients, const Call& call,
                     int tile) {
  const Plan plan = plan_of(shape, tile);
  Arena arena(call.workspace, "linear_attention");
  return {params, shape, plan, lay_out(arena, gradients, shape, plan, tile), call.context};
}

template <class Element, int kDim>
void forward(const ForwardParams& f, const Call& call) {
  const Work<ForwardParams> w =
      work_of(f, forward_shape(f, call.context), /*gradients=*/false, call, kDim);
  LoopParams<Element> p = loop_params<Element>(w);
  p.a = input_of<Element>(f.q);
  p.b = input_of<Element>(f.k);
  p.x = input_of<Element>(f.v);
  set_output(p, f.o);
  p.z = f.z.template as<float>();
  p.before = state_refs(f.kv0, f.z0);
  p.after = {f.kv1.template as<float>(), f.z1.template as<float>()};
  make_states<Element, kDim, false>(p, w);
  apply<Element, kDim, false>(p, w);
}

// 1 / z and -<do, o> of every query, into the workspace.
template <class Element>
void find_row_scalars(LoopParams<Element>& p, const Work<BackwardParams>& w) {
  if (!p.normalize) return;
  using Kernel = RowsKernel<Element>;
  const BackwardParams& b = w.params;
  const int64_t rows = w.shape.batch * w.shape.tokens * w.shape.query_heads;
  const typename Kernel::Params rows_params{input_of<Element>(b.o.template as<const void>()),
                                            input_of<Element>(b.d_o),
                                            b.z.template as<const float>(),
                                            w.at.factor,
                                            w.at.delta,
                                            rows};
  launch<Kernel>({ceil_div<int64_t>(rows, Kernel::kRowsOfBlock), 1, 1}, 0, w.context, rows_params);
  p.factor = w.per_query(w.at.factor);
  p.delta = w.per_query(w.at.delta);
}

// dq (over keys) or dk (over queries); slices of v's columns one after another.
template <class Element, int kDim, bool kQueries>
void gradient(LoopParams<Element>& p, const Work<BackwardParams>& w) {
  using Kernel = GradientKernel<Element, kDim, kQueries>;
  const int64_t heads = kQueries ? w.shape.key_heads : w.shape.query_heads;
  if (w.slices(kDim) > 1) {
    p.sum = {w.at.sum,
             {w.shape.batch, w.shape.tokens, heads, kPadded},
             {w.shape.tokens * heads * kPadded, heads * kPadded, kPadded, 1}};
  }
  for (int slice = 0; slice < w.slices(kDim); ++slice) {
    p.first = slice * kDim;
    launch<Kernel>({w.plan.num_slots, heads, 1}, sizeof(typename Kernel::Smem), w.context, p);
  }
}

template <class Element, int kDim>
void backward(const BackwardParams& b, const Call& call) {
  const Work<BackwardParams> w =
      work_of(b, backward_shape(b, call.context), /*gradients=*/true, call, kDim);
  LoopParams<Element> keys = loop_params<Element>(w);
  find_row_scalars(keys, w);
  LoopParams<Element> queries = keys;

  keys.a = queries.b = input_of<Element>(b.q);
  keys.b = queries.a = input_of<Element>(b.k);
  keys.x = queries.u = input_of<Element>(b.v);
  keys.u = queries.x = input_of<Element>(b.d_o);

  keys.before = state_refs(b.kv0, b.z0);
  make_states<Element, kDim, false>(keys, w);
  set_output(keys, b.d_q);
  gradient<Element, kDim, false>(keys, w);

  queries.before = state_refs(b.d_kv1, b.d_z1);
  queries.after = {b.d_kv0.template as<float>(), b.d_z0.template as<float>()};
  make_states<Element, kDim, true>(queries, w);
  set_output(queries, b.d_v);
  apply<Element, kDim, true>(queries, w);
  set_output(queries, b.d_k);
  gradient<Element, kDim, true>(queries, w);
}

}  // namespace hw::linear_attention::sm80

namespace hw::linear_attention {

// kDim: the tile of value columns, 64 or 128.
template <class Element, int kDim>
struct Sm80 {
  static void forward(const ForwardParams& p, const Call& call) {
    sm80::forward<Element, kDim>(p, call);
  }
  static void backward(const BackwardParams& p, const Call& call) {
    sm80::backward<Element, kDim>(p, call);
  }
};

}  // namespace hw::linear_attention
