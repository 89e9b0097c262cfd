// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys in plain CUDA: every dtype, every D and Dv, sm_75 and
// later. The mathematics is in routing_attention.h; the loops are those of softmax/simt, over
// lists.
//
//   _simt_lists.cuh    where rows and keys lie            _simt_layout.h   workspace
//   _slots.cuh         indices of slots and regions, sums over them
//
//   forward                       rows of groups (RowsKernel); by slot o is the mean of slots
//   backward  by slot             d_q, d_k, d_v of slots, from D of slots, then sums per token
//             keys listed         d_q per token; d_k, d_v of the spans of key regions, then sums
//             all keys            all per token; a bias that is shared: the dense BiasGradKernel,
//                                 for which rows in no list have weight 0
#pragma once

#include "ops/routing_attention/routing_attention_simt_lists.cuh"
#include "ops/routing_attention/routing_attention_slots.cuh"
#include "softmax/simt/backward.cuh"
#include "softmax/simt/forward.cuh"

namespace hw::routing_attention::simt {

using softmax::simt::GradParams;
using softmax::simt::RowsParams;

inline constexpr const char* kName = "routing_attention";

// ---- Forward ------------------------------------------------------------------------------------

// Blocks of rows; keys are not cut into spans.
template <class A>
softmax::simt::ForwardPlan plan_of(const ForwardParams& f) {
  softmax::simt::ForwardPlan plan = softmax::simt::forward_plan<A>(
      f.batch() * f.groups(), f.query_heads(), f.max_q, f.max_k, f.value_dim(), 0);
  plan.spans = 1;
  plan.span = max_of<int64_t>(f.max_k, 1);
  return plan;
}

template <class Element>
void forward(const ForwardParams& f, const Call& call) {
  Arena arena(call.workspace, kName);
  const ForwardWorkspace memory = forward_workspace(arena, shape_of(f));

  RowsParams<Element, Listed> p{};
  p.f = f;
  if (f.by_slot) p.f.o = f.w, p.f.w = {};
  p.plan = plan_of<Accum<Element>>(f);
  p.q = softmax::simt::operand_rows<Element>(f.q);
  p.k = softmax::simt::operand_rows<Element>(f.k);
  p.v = softmax::simt::operand_rows<Element>(f.v);
  p.o_vectors = p.f.o && has_vectors(p.f.o.template as<Element>());
  p.w_vectors = p.f.w && has_vectors(p.f.w.template as<Element>());
  softmax::simt::run_rows(p, call.context);
  if (!f.by_slot || !f.o) return;
  mean_slots<Element>(f, index_tokens(f.rows, memory.rows, call.context), call.context);
}

// ---- Backward -----------------------------------------------------------------------------------

// Gradients of slots, then of tokens.
template <class Element>
void backward_by_slot(GradParams<Element, Listed>& p,
                      const BackwardWorkspace<Accum<Element>>& memory, const Context& context) {
  const BackwardParams b = p.b;
  const int64_t batch = b.batch(), heads = b.query_heads();
  const int64_t slots = b.groups() * b.rows.slots(), key_slots = b.groups() * b.keys.slots();
  const Csr rows = index_tokens(b.rows, memory.rows, context);
  const Csr keys = index_keys(b, rows, memory.keys, context);
  slot_deltas<Element>(b, memory.delta, context);

  p.b.delta = {memory.delta, {batch, heads, slots}, {heads * slots, slots, 1}};
  const auto d_q = place_array(memory.d_q, batch, slots, heads, b.dim());
  const auto d_k = place_array(memory.d_k, batch, key_slots, heads, b.dim());
  const auto d_v = place_array(memory.d_v, batch, key_slots, heads, b.value_dim());
  p.b.d_q = d_q.template as<void>(), p.b.d_k = d_k.template as<void>();
  if (b.d_v) p.b.d_v = d_v.template as<void>();
  p.wide_rows = p.wide_keys = true;
  describe_tensors(p);
  run_query_grad(p, batch * b.groups(), context);
  run_key_grad(p, batch * b.groups(), heads, context);

  sum_slots<Element>(rows, d_q, b.d_q, context);
  sum_slots<Element>(keys, d_k, b.d_k, context);
  if (b.d_v) sum_slots<Element>(keys, d_v, b.d_v, context);
}

// d_q per token; d_k and d_v of spans, then of tokens.
template <class Element>
void backward_by_region(GradParams<Element, Listed>& p,
                        const BackwardWorkspace<Accum<Element>>& memory, const Context& context) {
  const BackwardParams b = p.b;
  const int64_t batch = b.batch(), heads = b.query_heads(), cell = b.keys.cells.size();
  const Regions regions = index_regions(b.keys, memory.regions, context);
  describe_tensors(p);
  run_query_grad(p, batch * b.groups(), context);

  const auto d_k = place_array(memory.d_k, batch, regions.spans * cell, heads, b.dim());
  const auto d_v = place_array(memory.d_v, batch, regions.spans * cell, heads, b.value_dim());
  p.b.d_k = d_k.template as<void>();
  if (b.d_v) p.b.d_v = d_v.template as<void>();
  p.b.regions = regions;
  p.b.by_spans = p.wide_keys = true;
  p.b.max_k = cell;
  describe_tensors(p);  // of the spans
  run_key_grad(p, batch * regions.spans, heads, context);

  sum_spans<Element>(regions, b.keys.cells, d_k, b.d_k, context);
  if (b.d_v) sum_spans<Element>(regions, b.keys.cells, d_v, b.d_v, context);
}

// Listed rows and all keys: every gradient per token.
template <class Element>
void backward_all_keys(GradParams<Element, Listed>& p, const Context& context) {
  describe_tensors(p);
  run_query_grad(p, p.b.batch(), context);
  run_key_grad(p, p.b.batch(), p.b.key_heads(), context);
  if (!p.shared_bias) return;
  GradParams<Element, softmax::simt::MaskedSequence> dense{};
  dense.b = p.b;
  describe_tensors(dense);
  run_bias_grad(dense, context);
}

template <class Element>
void backward(const BackwardParams& b, const Call& call) {
  GradParams<Element, Listed> p{};
  static_cast<BackwardParams&>(p.b) = b;
  Arena arena(call.workspace, kName);
  const auto memory = backward_workspace<Accum<Element>>(arena, shape_of(b));
  if (p.b.by_slot)
    backward_by_slot(p, memory, call.context);
  else if (p.b.keys)
    backward_by_region(p, memory, call.context);
  else
    backward_all_keys(p, call.context);
}

}  // namespace hw::routing_attention::simt

namespace hw::routing_attention {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static void forward(const ForwardParams& p, const Call& call) { simt::forward<Element>(p, call); }
  static void backward(const BackwardParams& p, const Call& call) {
    simt::backward<Element>(p, call);
  }
};

}  // namespace hw::routing_attention
