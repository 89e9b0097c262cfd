// SPDX-License-Identifier: Apache-2.0
// Linear attention without tensor cores, backward: dq, dk, dv and the initial state's gradient.
//
//   rows     dz_i = -<do_i, o_i> / z_i                                   (normalised)
//   states   of the keys, forward, and of the queries, backward          (see the plan)
//   walks    grad_queries: dq;   grad_keys: dk and dv
// Nothing but z is kept from the forward pass; states are computed again from k and v.
#pragma once

#include "ops/linear_attention/linear_attention_simt_forward.cuh"

namespace hw::linear_attention::simt {

// A warp per row; reads do and o once.
template <class Element>
struct RowsKernel {
  using Acc = Accum<Element>;
  struct Params {
    Ref<const Element, 4> o, d_o;  // [B, S, Hq, Dv]
    Ref<const Acc, 3> z;           // [B, S, Hq]
    Acc* d_z;                      // [B, S, Hq]   out
    int64_t rows;
  };
  static constexpr int kThreads = 128, kWarps = kThreads / dev::kWarp;

  HW_DEVICE static void main(const Params& p) {
    const int64_t row = static_cast<int64_t>(dev::block_index_x()) * kWarps + dev::warp();
    if (row >= p.rows) return;
    const int64_t heads = p.z.size[2], tokens = p.z.size[1];
    const int64_t h = row % heads, s = row / heads % tokens, b = row / heads / tokens;
    const Element *o = p.o.at(b, s, h), *d_o = p.d_o.at(b, s, h);
    Acc sum = 0;
    for (int64_t c = dev::lane(); c < p.o.size[3]; c += dev::kWarp) {
      sum += static_cast<Acc>(o[c * p.o.stride[3]]) * static_cast<Acc>(d_o[c * p.d_o.stride[3]]);
    }
    sum = dev::warp_sum(sum);
    const Acc z = p.z(b, s, h);
    if (dev::lane() == 0) p.d_z[row] = z == Acc(0) ? Acc(0) : -sum / z;
  }
};

template <class Element>
void find_row_gradients(const BackwardParams& b, const CallSizes& s, Accum<Element>* d_z,
                        const Context& context) {
  using Acc = Accum<Element>;
  using Kernel = RowsKernel<Element>;
  const typename Kernel::Params p{b.o.template as<const Element>(),
                                  b.d_o.template as<const Element>(), b.z.template as<const Acc>(),
                                  d_z, s.batch * s.tokens * s.query_heads};
  launch<Kernel>({ceil_div<int64_t>(p.rows, Kernel::kWarps), 1, 1}, 0, context, p);
}

template <class Element, int kColumns>
void run_backward(const WalkParams<Element>& queries, const WalkParams<Element>& keys,
                  const Context& context) {
  const int bytes = queries.geometry.shared.size * static_cast<int>(sizeof(Accum<Element>));
  make_states<Element, kColumns, false>(queries, context);
  using GradQueries = WalkKernel<Element, kColumns, false, false, true>;
  launch<GradQueries>({queries.blocks(true), 1, 1}, bytes, context, queries);
  make_states<Element, kColumns, true>(keys, context);
  using GradKeys = WalkKernel<Element, kColumns, true, true, true>;
  launch<GradKeys>({keys.blocks(true), 1, 1}, bytes, context, keys);
}

template <class Element>
void backward(const BackwardParams& b, const Call& call) {
  using Acc = Accum<Element>;
  const CallSizes s = backward_shape(b, call.context);
  const Geometry g = make_geometry<Acc>(s, b.map, true);
  Arena arena(call.workspace, "linear_attention.backward");
  const Workspace<Acc> w = lay_out<Acc>(arena, s, g, true);

  OperandRows<Element> query = operand_rows<Element>(b.q, b.d_o, true);
  const OperandRows<Element> key = operand_rows<Element>(b.k, b.v, false);
  if (b.normalize) {
    query.z = b.z.template as<const Acc>();
    query.d_z = w.d_z;
    find_row_gradients<Element>(b, s, w.d_z, call.context);
  }

  WalkParams<Element> queries = walk_params<Element>(b, s, g);
  queries.outer = query;
  queries.inner = key;
  queries.split_heads = g.plan.schedule == Schedule::direct;
  queries.start_kv = b.kv0.template as<const Acc>();
  queries.start_z = b.z0.template as<const Acc>();
  queries.states = w.states;
  queries.graded = b.d_q.template as<Element>();
  queries.sums = g.keeps_sums ? w.d_q : nullptr;

  WalkParams<Element> keys = walk_params<Element>(b, s, g);
  keys.outer = key;
  keys.inner = query;
  keys.start_kv = b.d_kv1.template as<const Acc>();
  keys.start_z = b.d_z1.template as<const Acc>();
  keys.final_kv = b.d_kv0.template as<Acc>();
  keys.final_z = b.d_z0.template as<Acc>();
  keys.states = w.states;
  keys.applied = b.d_v.template as<Element>();
  keys.applied_vectors = has_vectors(keys.applied);
  keys.graded = b.d_k.template as<Element>();
  keys.sums = g.keeps_sums ? w.d_k : nullptr;

  if (g.columns == kWide<Acc>)
    run_backward<Element, kWide<Acc>>(queries, keys, call.context);
  else
    run_backward<Element, kNarrow>(queries, keys, call.context);
}

}  // namespace hw::linear_attention::simt
