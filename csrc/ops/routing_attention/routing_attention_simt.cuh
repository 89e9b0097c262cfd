// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys in plain CUDA: every dtype, every D and Dv, sm_75 and
// later. The mathematics is in routing_attention.h; the loops are those of softmax/simt, over
// lists.
//
//   _source.h      where rows and keys lie            _simt_layout.h   workspace
//   _slots.cuh     indices of slots and regions, sums over them
//
//   forward                       rows of groups (RowsKernel), merged where keys are in spans; by
//                                 slot o is the mean of slots
//   backward  by slot             d_q, d_k, d_v of slots, from D of slots, then sums per token
//             keys listed         d_q per token; d_k, d_v of the spans of key regions, then sums
//             all keys            all per token; a bias that is shared: the dense BiasGradKernel,
//                                 for which rows in no list have weight 0
#pragma once

#include "ops/routing_attention/routing_attention_slots.cuh"
#include "ops/routing_attention/routing_attention_source.h"
#include "softmax/simt/backward.cuh"
#include "softmax/simt/forward.cuh"

namespace hw::routing_attention::simt {

using Score = SelfScore<softmax::FullScore>;
template <class Element, softmax::KeySource Source>
using GradParams = softmax::simt::GradParams<Element, Score, Source>;

inline constexpr const char* kName = "routing_attention";

// ---- Forward ------------------------------------------------------------------------------------

template <class Element>
void forward(const ForwardParams& f, const Call& call) {
  using A = Accum<Element>;
  Arena arena(call.workspace, kName);
  const ForwardWorkspace memory = forward_workspace(arena, shape_of(f));

  softmax::simt::RowsParams<Element, Score, GroupSource> p{};
  p.f = f;
  if (f.by_slot) p.f.o = f.w, p.f.w = {};
  p.source = GroupSource::of(f);
  p.score.mask_self = f.mask_self;
  p.plan = simt_plan<A>(shape_of(f), call);
  p.partials = arena.take<A>(p.plan.workspace());
  describe_tensors(p);
  run_rows(p, call.context);
  if (!f.by_slot || !f.o) return;
  mean_slots<Element>(f, index_tokens(f.rows, memory.rows, call.context), call.context);
}

// ---- Backward -----------------------------------------------------------------------------------

// Of the groups; `b`: tensors and gradients.
template <class Element, class Source>
GradParams<Element, Source> params_of(const BackwardParams& b) {
  GradParams<Element, Source> p{};
  p.b = b;
  static_cast<GroupSource&>(p.source) = GroupSource::of(b);
  p.score.mask_self = b.mask_self;
  return p;
}

// d_q of the groups.
template <class Element>
void query_gradients(const BackwardParams& b, const Context& context) {
  auto p = params_of<Element, GroupSource>(b);
  p.wide_rows = b.by_slot;
  describe_tensors(p);
  run_query_grad(p, b.batch() * b.groups(), context);
}

// d_k and d_v, of slots or spans, in the accumulation type.
template <class Element>
void key_gradients_by_slot(GradParams<Element, SpanSource>& p, int64_t sequences,
                           const Context& context) {
  p.wide_keys = p.keys_per_query_head = p.source.keys_by_slot = true;
  describe_tensors(p);
  run_key_grad(p, sequences, context);
}

// Gradients of slots, then of tokens.
template <class Element>
void backward_by_slot(const BackwardParams& b, const BackwardWorkspace<Accum<Element>>& memory,
                      const Context& context) {
  const int64_t batch = b.batch(), heads = b.query_heads();
  const int64_t slots = b.groups() * b.rows.slots(), key_slots = b.groups() * b.keys.slots();
  const Csr rows = index_tokens(b.rows, memory.rows, context);
  const Csr keys = index_keys(b, rows, memory.keys, context);
  slot_deltas<Element>(b, memory.delta, context);

  BackwardParams of_slots = b;
  of_slots.delta = {memory.delta, {batch, heads, slots}, {heads * slots, slots, 1}};
  const auto d_q = array_of_rows(memory.d_q, batch, slots, heads, b.dim());
  const auto d_k = array_of_rows(memory.d_k, batch, key_slots, heads, b.dim());
  const auto d_v = array_of_rows(memory.d_v, batch, key_slots, heads, b.value_dim());
  of_slots.d_q = d_q.template as<void>(), of_slots.d_k = d_k.template as<void>();
  if (b.d_v) of_slots.d_v = d_v.template as<void>();
  if (b.d_row_temperature)
    of_slots.d_row_temperature = {
        memory.d_row_temperature, {batch, slots, heads}, {slots * heads, heads, 1}};
  query_gradients<Element>(of_slots, context);
  auto p = params_of<Element, SpanSource>(of_slots);
  key_gradients_by_slot(p, batch * b.groups(), context);

  sum_slots<Element>(rows, d_q, b.d_q, context);
  sum_slots<Element>(keys, d_k, b.d_k, context);
  if (b.d_v) sum_slots<Element>(keys, d_v, b.d_v, context);
  sum_temperatures(rows, memory.d_row_temperature, b.d_row_temperature, slots, context);
}

// d_q per token; d_k and d_v of spans, then of tokens.
template <class Element>
void backward_by_region(const BackwardParams& b, const BackwardWorkspace<Accum<Element>>& memory,
                        const Context& context) {
  const int64_t batch = b.batch(), heads = b.query_heads(), size = b.keys.grid.size();
  const Regions regions = index_regions(b.keys, memory.regions, context);
  query_gradients<Element>(b, context);

  const auto d_k = array_of_rows(memory.d_k, batch, regions.spans * size, heads, b.dim());
  const auto d_v = array_of_rows(memory.d_v, batch, regions.spans * size, heads, b.value_dim());
  auto p = params_of<Element, SpanSource>(b);
  p.b.d_k = d_k.template as<void>();
  if (b.d_v) p.b.d_v = d_v.template as<void>();
  p.b.max_k = size;
  p.source.regions = regions;
  p.source.by_span = true;
  p.source.entries_of_list = static_cast<int>(b.keys.entries.size[3]);
  p.source.region_size = static_cast<int>(size);
  key_gradients_by_slot(p, batch * regions.spans, context);

  sum_spans<Element>(regions, b.keys.grid, d_k, b.d_k, context);
  if (b.d_v) sum_spans<Element>(regions, b.keys.grid, d_v, b.d_v, context);
}

// Listed rows and all keys: every gradient per token.
template <class Element>
void backward_all_keys(const BackwardParams& b, const Context& context) {
  query_gradients<Element>(b, context);
  auto p = params_of<Element, SpanSource>(b);
  describe_tensors(p);
  run_key_grad(p, b.batch(), context);
  if (!p.shared_bias) return;
  softmax::simt::GradParams<Element, softmax::FullScore, softmax::DenseSource> dense{};
  dense.b = b;
  describe_tensors(dense);
  run_bias_grad(dense, b.batch(), context);
}

template <class Element>
void backward(const BackwardParams& b, const Call& call) {
  Arena arena(call.workspace, kName);
  const auto memory = backward_workspace<Accum<Element>>(arena, shape_of(b));
  if (b.by_slot)
    backward_by_slot<Element>(b, memory, call.context);
  else if (b.keys)
    backward_by_region<Element>(b, memory, call.context);
  else
    backward_all_keys<Element>(b, call.context);
}

}  // namespace hw::routing_attention::simt

namespace hw::routing_attention {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& forward = simt::forward<Element>;
  static constexpr auto& backward = simt::backward<Element>;
};

}  // namespace hw::routing_attention
