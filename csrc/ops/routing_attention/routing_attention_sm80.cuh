// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on tensor cores (mma, ldmatrix, cp.async): bf16 and f16.
//
//   _sm80_layout.cuh    what it takes, how it is cut
//   _sm80_feed.cuh      tasks, tokens of slots, places of results
//   _slots.cuh          indices; sums over slots and over spans
//   ops/attention/attention_sm80_*.cuh, of which the kernels are, fed with lists
//
// Results of what may be listed several times are by slot or by span, and then summed:
//
//                 by slot                       by token, keys listed        by token, all keys
//   o, d_q        w, fp32 of row slots, summed  written                      written
//   d_k, d_v      fp32 of key slots, summed     fp32 of spans, summed        written
#pragma once

#include "ops/attention/attention_sm80.cuh"
#include "ops/routing_attention/routing_attention_slots.cuh"
#include "ops/routing_attention/routing_attention_sm80_feed.cuh"

#include "core/launch.h"

namespace hw::routing_attention::sm80 {

template <class Params>
Listed listed(const Params& p) {
  Listed feed{};
  feed.lists = p;
  feed.row_slots_of_list = static_cast<int>(p.max_q);
  feed.key_slots_of_list = static_cast<int>(p.max_k);
  feed.row_cells = static_cast<int>(p.rows.cells.count());
  feed.key_cells = static_cast<int>(p.keys.cells.count());
  return feed;
}

template <class Element, int kDim, bool kPlain>
void forward(const Call& call, const ForwardParams& p, const attention::ForwardParams& f) {
  using Kernel = attention::sm80::ForwardKernel<Element, kDim, kPlain, Listed>;
  attention::sm80::Plan plan;
  plan.blocks = ceil_div<int64_t>(p.max_q, Kernel::kRows);
  plan.tasks = plan.blocks * p.query_heads() * p.batch() * p.groups();
  const typename Kernel::Params params{listed(p),
                                       f,
                                       attention::sm80::ScoreInputs<Element>(f),
                                       input_of<Element>(f.v),
                                       output_of<Element>(f.o),
                                       output_of<Element>(f.w),
                                       attention::sm80::units_of(kPlain, f),
                                       plan,
                                       {}};
  launch<Kernel>({plan.tasks, 1, 1}, sizeof(typename Kernel::Smem), call.context, params);
}

template <class Element, int kDim>
void forward(const Call& call) {
  const ForwardParams p = forward_params(call);
  attention::ForwardParams f = p;
  if (p.by_slot) f.o = p.w, f.w = {};  // the engine's output is that of slots
  attention::sm80::is_plain(f) ? forward<Element, kDim, true>(call, p, f)
                               : forward<Element, kDim, false>(call, p, f);
  if (!p.by_slot) return;
  Room room(call.tensor(kForwardWorkspace), "routing_attention.forward");
  const ForwardRoom at = forward_room(room, forward_shape(call));
  mean_slots<Element>(p, index_tokens(p.rows, at.rows, call.context), call.context);
}

// ---- Backward -----------------------------------------------------------------------------------

inline Ref<const void, 3> row_numbers(const float* data, const Shape& s) {
  const int64_t slots = s.groups * s.row_slots;
  return {data, {s.batch, s.heads, slots}, {s.heads * slots, slots, 1}};
}
inline Output<float> sums_of(float* data, const Shape& s, int64_t places, int64_t width) {
  if (!data) return {};
  return {place_array(data, s.batch, places, s.heads, width), true};
}

// The gradients of the attention itself; sums that are left to be made are in `at`.
template <class Element, int kDim, bool kPlain>
void attend(const Call& call, const BackwardParams& b, const Shape& s,
            const BackwardRoom<float>& at) {
  using namespace attention::sm80;  // NOLINT
  const Context& context = call.context;
  const auto inputs = loop_inputs<Element>(b, kPlain, b.d_w, b.v, b.row,
                                           b.by_slot ? row_numbers(at.delta, s) : b.delta);
  const bool shared_bias = attention::sm80::shares_bias(b);
  const int64_t tasks = s.batch * s.groups * s.heads;

  GradientParams<Element, Listed> q{listed(b), b,  inputs,      output_of<Element>(b.d_q),
                                    {},        {}, shared_bias, 0};
  q.row_sums = sums_of(at.d_q, s, s.groups * s.row_slots, s.dim);
  launch_blocks<QueryGradKernel<Element, kDim, kPlain, Listed>>(tasks, q, b.max_q, context);

  ListedKeys feed{listed(b)};
  feed.regions = at.regions;
  feed.by_span = s.keys_listed && !s.by_slot;
  feed.blocks_of_list = static_cast<int>(s.key_blocks), feed.cell = static_cast<int>(s.key_cell);
  const int64_t places = feed.by_span ? at.regions.spans * s.key_cell : s.groups * s.key_slots;
  if (s.keys_listed) {
    feed.key_sums = sums_of(at.d_k, s, places, s.dim);
    feed.value_sums = sums_of(at.d_v, s, places, s.value_dim);
  }
  const GradientParams<Element, ListedKeys> k{
      feed, b, inputs, {}, output_of<Element>(b.d_k), output_of<Element>(b.d_v), shared_bias, 0};
  using Keys = KeyGradKernel<Element, kDim, kPlain, true, true, ListedKeys>;
  const int64_t owners = s.keys_listed ? s.heads : b.key_heads();
  const int64_t groups = feed.by_span ? at.regions.spans : s.groups;
  launch_blocks<Keys>(s.batch * groups * owners, k, feed.by_span ? s.key_cell : s.key_slots,
                      context);
  if constexpr (!kPlain) {
    if (!shared_bias) return;
    // Rows that are not listed weigh nothing: their statistic is +inf.
    attention::BackwardParams all = b;
    all.max_q = s.rows, all.max_k = s.keys;
    launch_bias<Element, kDim>({{}, all, inputs, {}, {}, {}, shared_bias, 0}, context);
  }
}

template <class Element, int kDim>
void backward(const Call& call) {
  const BackwardParams b = backward_params(call);
  const Shape s = backward_shape(call);
  const Context& context = call.context;
  Room room(call.tensor(kBackwardWorkspace), "routing_attention.backward");
  BackwardRoom<float> at = backward_room<float>(room, s);
  if (s.by_slot) {
    at.rows = index_tokens(b.rows, at.rows, context);
    at.keys = index_tokens(b.keys, at.keys, context);
    slot_deltas<Element>(b, at.delta, context);
  } else if (s.keys_listed) {
    at.regions = index_regions(b.keys, at.regions, context);
  }

  attention::sm80::has_plain_scores(b) ? attend<Element, kDim, true>(call, b, s, at)
                                       : attend<Element, kDim, false>(call, b, s, at);

  const auto places = [&](float* data, int64_t count, int64_t width) {
    return place_array(data, s.batch, count, s.heads, width);
  };
  if (s.by_slot) {
    sum_slots<Element>(at.rows, places(at.d_q, s.groups * s.row_slots, s.dim), b.d_q, context);
    const int64_t slots = s.groups * s.key_slots;
    sum_slots<Element>(at.keys, places(at.d_k, slots, s.dim), b.d_k, context);
    if (b.d_v) sum_slots<Element>(at.keys, places(at.d_v, slots, s.value_dim), b.d_v, context);
  } else if (s.keys_listed) {
    const Cells& cells = b.keys.cells;
    const int64_t slots = at.regions.spans * s.key_cell;
    sum_spans<Element>(at.regions, cells, places(at.d_k, slots, s.dim), b.d_k, context);
    if (b.d_v)
      sum_spans<Element>(at.regions, cells, places(at.d_v, slots, s.value_dim), b.d_v, context);
  }
}

}  // namespace hw::routing_attention::sm80

namespace hw::routing_attention {

// kDim: the width that D and Dv are padded to.
template <class Element, int kDim>
struct Sm80 {
  static void forward(const Call& call) { sm80::forward<Element, kDim>(call); }
  static void backward(const Call& call) { sm80::backward<Element, kDim>(call); }
};

}  // namespace hw::routing_attention
