// SPDX-License-Identifier: Apache-2.0
// Linear attention without tensor cores, backward: dq, dk, dv and the initial state's gradient.
//
//   rows     dz_i = -<do_i, o_i> / z_i                                   (normalised)
//   states   of the keys, forward, and of the queries, backward          (see the plan)
//   walks    grad_queries: dq;   grad_keys: dk and dv
//   reduce   dq and dk: sum of the slices' parts, scale and pre'         (only if there are parts)
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

// A thread per element; reads every part once.
template <class Element>
struct ReduceKernel {
  using Acc = Accum<Element>;
  struct Params {
    const Acc* parts;           // [slices, B, S, heads, D]
    Ref<const Element, 4> key;  // [B, S, heads, D]   q or k
    Ref<Element, 4> gradient;   // [B, S, heads, D]   out
    FeatureMap map;
    Acc scale;
    int slices;
    int64_t elements;
  };
  static constexpr int kThreads = 256;

  HW_DEVICE static void main(const Params& p) {
    const int64_t i = static_cast<int64_t>(dev::block_index_x()) * kThreads + dev::thread_index();
    if (i >= p.elements) return;
    Acc sum = 0;
    for (int slice = 0; slice < p.slices; ++slice) sum += p.parts[slice * p.elements + i];
    const int64_t *size = p.key.size, d = i % size[3], h = i / size[3] % size[2];
    const int64_t s = i / size[3] / size[2] % size[1], b = i / size[3] / size[2] / size[1];
    const Acc x = p.key(b, s, h, d);
    p.gradient(b, s, h, d) = Element(sum * p.scale * pre_map_derivative(p.map, x));
  }
};

template <class Element>
void find_row_gradients(const BackwardParams& b, const Shape& s, Accum<Element>* d_z,
                        const Context& context) {
  using Acc = Accum<Element>;
  using Kernel = RowsKernel<Element>;
  const typename Kernel::Params p{b.o.template as<const Element>(),
                                  b.d_o.template as<const Element>(), b.z.template as<const Acc>(),
                                  d_z, s.batch * s.tokens * s.query_heads};
  launch<Kernel>({ceil_div<int64_t>(p.rows, Kernel::kWarps), 1, 1}, 0, context, p);
}

template <class Element>
void reduce_parts(const WalkParams<Element>& p, const Context& context) {
  if (!p.geometry.partial) return;
  using Kernel = ReduceKernel<Element>;
  const Ref<const Element, 4>& key = p.outer.key;
  typename Kernel::Params r{};
  r.parts = p.partial;
  r.key = key;
  r.gradient = p.graded;
  r.map = p.map;
  r.scale = p.outer.query ? p.scale : Accum<Element>(1);
  r.slices = p.geometry.slices;
  r.elements = key.size[0] * key.size[1] * key.size[2] * key.size[3];
  launch<Kernel>({ceil_div<int64_t>(r.elements, Kernel::kThreads), 1, 1}, 0, context, r);
}

template <class Element, int kColumns>
void run_backward(const WalkParams<Element>& queries, const WalkParams<Element>& keys,
                  const Context& context) {
  const int bytes = queries.geometry.shared.size * static_cast<int>(sizeof(Accum<Element>));
  make_states<Element, kColumns, false>(queries, context);
  using GradQueries = WalkKernel<Element, kColumns, false, false, true>;
  launch<GradQueries>({queries.blocks(), 1, 1}, bytes, context, queries);
  make_states<Element, kColumns, true>(keys, context);
  using GradKeys = WalkKernel<Element, kColumns, true, true, true>;
  launch<GradKeys>({keys.blocks(), 1, 1}, bytes, context, keys);
}

template <class Element>
void backward(const Call& call) {
  using Acc = Accum<Element>;
  const BackwardParams b = backward_params(call);
  const Shape s = backward_shape(call);
  const Geometry g = make_geometry<Acc>(s, b.map, true);
  const Workspace w = make_workspace<Acc>(s, g, true);
  char* workspace = workspace_of(call, 16, w.bytes);
  const auto place = [&](int64_t at) { return reinterpret_cast<Acc*>(workspace + at); };

  Side<Element> query = make_side<Element>(b.q, b.d_o, true);
  const Side<Element> key = make_side<Element>(b.k, b.v, false);
  if (b.normalize) {
    query.z = b.z.template as<const Acc>();
    query.d_z = place(w.d_z);
    find_row_gradients<Element>(b, s, place(w.d_z), call.context);
  }

  WalkParams<Element> queries = walk_params<Element>(b, s, g);
  queries.outer = query;
  queries.inner = key;
  queries.split_heads = g.plan.schedule == Schedule::direct;
  queries.start_kv = b.kv0.template as<const Acc>();
  queries.start_z = b.z0.template as<const Acc>();
  queries.states = place(w.keys);
  queries.graded = b.d_q.template as<Element>();
  queries.partial = place(w.d_q);

  WalkParams<Element> keys = walk_params<Element>(b, s, g);
  keys.outer = key;
  keys.inner = query;
  keys.start_kv = b.d_kv1.template as<const Acc>();
  keys.start_z = b.d_z1.template as<const Acc>();
  keys.final_kv = b.d_kv0.template as<Acc>();
  keys.final_z = b.d_z0.template as<Acc>();
  keys.states = place(w.queries);
  keys.applied = b.d_v.template as<Element>();
  keys.applied_vectors = has_vectors(keys.applied);
  keys.graded = b.d_k.template as<Element>();
  keys.partial = place(w.d_k);

  if (g.columns == kWide<Acc>)
    run_backward<Element, kWide<Acc>>(queries, keys, call.context);
  else
    run_backward<Element, kNarrow>(queries, keys, call.context);
  reduce_parts(queries, call.context);
  reduce_parts(keys, call.context);
}

}  // namespace hw::linear_attention::simt
