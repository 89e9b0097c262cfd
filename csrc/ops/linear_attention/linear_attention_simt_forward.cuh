// SPDX-License-Identifier: Apache-2.0
// Linear attention without tensor cores, forward: o, z and the final state.
#pragma once

#include "ops/linear_attention/linear_attention_simt_chunk_loop.cuh"
#include "ops/linear_attention/linear_attention_simt_totals.cuh"

#include "core/error.h"

namespace hw::linear_attention::simt {

// What both directions of a call have in common.
template <class Element>
WalkParams<Element> walk_params(const ForwardParams& f, const CallSizes& s, const Geometry& g) {
  using Acc = Accum<Element>;
  WalkParams<Element> p{};
  p.cu_seqlens = f.cu_seqlens;
  p.num_tokens = s.tokens;
  p.map = f.map;
  p.causal = f.causal;
  p.normalize = f.normalize;
  p.scale = static_cast<Acc>(f.scale);
  p.eps = static_cast<Acc>(f.eps);
  p.geometry = g;
  p.dim = s.dim;
  p.value_dim = s.value_dim;
  p.features = s.features;
  p.query_heads = s.query_heads;
  p.key_heads = s.key_heads;
  return p;
}

template <class Element, int kColumns>
void run_forward(const WalkParams<Element>& p, const Context& context) {
  make_states<Element, kColumns, false>(p, context);
  const int bytes = p.geometry.shared.size * static_cast<int>(sizeof(Accum<Element>));
  using Kernel = WalkKernel<Element, kColumns, false, true, false>;
  launch<Kernel>({p.blocks(false), 1, 1}, bytes, context, p);
}

template <class Element>
void forward(const ForwardParams& f, const Call& call) {
  using Acc = Accum<Element>;
  const CallSizes s = forward_shape(f, call.context);
  const Geometry g = make_geometry<Acc>(s, f.map, false);
  Arena arena(call.workspace, "linear_attention.forward");
  const Workspace<Acc> w = lay_out<Acc>(arena, s, g, false);

  WalkParams<Element> p = walk_params<Element>(f, s, g);
  p.outer = operand_rows<Element>(f.q, {}, true);
  p.inner = operand_rows<Element>(f.k, f.v, false);
  p.split_heads = g.plan.schedule == Schedule::direct;
  p.start_kv = f.kv0.template as<const Acc>();
  p.start_z = f.z0.template as<const Acc>();
  p.final_kv = f.kv1.template as<Acc>();
  p.final_z = f.z1.template as<Acc>();
  p.states = w.states;
  p.applied = f.o.template as<Element>();
  p.applied_vectors = has_vectors(p.applied);
  p.z = f.z.template as<Acc>();
  if (g.columns == kWide<Acc>)
    run_forward<Element, kWide<Acc>>(p, call.context);
  else
    run_forward<Element, kNarrow>(p, call.context);
}

}  // namespace hw::linear_attention::simt
