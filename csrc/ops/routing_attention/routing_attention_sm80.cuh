// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on tensor cores (mma, ldmatrix, cp.async): bf16 and
// f16.
//
//   _sm80_layout.h      workspace; softmax/sm80/list_cut.h how it is cut
//   _source.h           sequences of the engine, tokens of slots, where results are
//   _slots.cuh          indices; sums over slots and over spans
//   softmax/sm80/*.cuh, of which the kernels are
//
// Results of what may be listed several times are by slot or by span, and then summed:
//
//                 by slot                       by token, keys listed        by token, all keys
//   o, d_q        w, fp32 of row slots, summed  written                      written
//   d_k, d_v      fp32 of key slots, summed     fp32 of spans, summed        written
#pragma once

#include "ops/attention/attention_sm80.cuh"
#include "ops/routing_attention/routing_attention_slots.cuh"
#include "ops/routing_attention/routing_attention_sm80_layout.h"
#include "ops/routing_attention/routing_attention_source.h"

#include "core/gpu/launch.h"

namespace hw::routing_attention::sm80 {

using softmax::FullScore;
using softmax::PlainScore;

template <class Element, int kDim, softmax::ScoreKind Kind, int kOwn>
void forward(const ForwardParams& p, const softmax::ForwardParams& f, const Context& context,
             Arena& arena) {
  const SelfScore<Kind> kind{{}, p.mask_self};
  softmax::sm80::forward<Element, kDim, SelfScore<Kind>, GroupSource, ListCut<kOwn>>(
      f, GroupSource::of(p), kind, p.batch() * p.groups(), context, arena);
}

template <class Element, int kDim>
void forward(const ForwardParams& p, const Call& call) {
  const Context& context = call.context;
  Arena arena(call.workspace, "routing_attention.forward");
  const ForwardWorkspace at = forward_workspace(arena, shape_of(p));
  softmax::ForwardParams f = p;
  if (p.by_slot) f.o = p.w, f.w = {};  // the engine's output is that of slots
  const int rows = rows_of_list_block(p);
  if (!is_plain(p))
    forward<Element, kDim, FullScore, kMedium>(p, f, context, arena);
  else if (rows == kNarrow)
    forward<Element, kDim, PlainScore, kNarrow>(p, f, context, arena);
  else if (rows == kMedium)
    forward<Element, kDim, PlainScore, kMedium>(p, f, context, arena);
  else
    forward<Element, kDim, PlainScore, kWide>(p, f, context, arena);
  if (!p.by_slot) return;
  mean_slots<Element>(p, index_tokens(p.rows, at.rows, context), context);
}

// ---- Backward -----------------------------------------------------------------------------------

inline Ref<const void, 3> row_numbers(const float* data, const RoutingSizes& s) {
  const int64_t slots = s.groups * s.row_slots;
  return {data, {s.batch, s.heads, slots}, {s.heads * slots, slots, 1}};
}

// d_row_temperature of slots [B, G Wq, Hq].
inline Ref<void, 3> temperature_array(float* data, const RoutingSizes& s) {
  const int64_t slots = s.groups * s.row_slots;
  return {data, {s.batch, slots, s.heads}, {slots * s.heads, s.heads, 1}};
}

// Everything that the kernels of the gradients have in common.
template <class Element>
struct Backward {
  const Context& context;
  const BackwardParams& b;
  const RoutingSizes& s;
  const BackwardWorkspace<float>&
      at;  // by slot or span: where sums that are still to be made begin
  softmax::sm80::LoopInputs<Element> inputs;
  bool shared_bias;

  bool by_span() const { return s.keys_listed && !s.by_slot; }

  Output<float> sums(float* data, int64_t rows, int64_t width) const {
    if (!data) return {};
    return {array_of_rows(data, s.batch, rows, s.heads, width), true};
  }
  // Gradients of what `source` gives.
  template <softmax::ScoreKind Kind, softmax::KeySource Source>
  softmax::sm80::GradientParams<Element, SelfScore<Kind>, Source> params(
      const Source& source) const {
    return {source,
            {{}, b.mask_self},
            b,
            inputs,
            output_of<Element>(b.d_q),
            output_of<Element>(b.d_k),
            output_of<Element>(b.d_v),
            {},
            {},
            {},
            shared_bias,
            0};
  }
};

template <class Element, int kDim, softmax::ScoreKind Kind, int kOwn>
void query_gradients(const Backward<Element>& x) {
  using Kernel =
      softmax::sm80::QueryGradKernel<Element, kDim, SelfScore<Kind>, GroupSource, ListCut<kOwn>>;
  const RoutingSizes& s = x.s;
  auto p = x.template params<Kind>(GroupSource::of(x.b));
  if (s.by_slot && x.b.d_row_temperature)
    p.b.d_row_temperature = temperature_array(x.at.d_row_temperature, s);
  p.d_q_sums = x.sums(x.at.d_q, s.groups * s.row_slots, s.dim);
  softmax::sm80::launch_blocks<Kernel>(s.batch * s.groups * s.heads, p, s.row_slots, x.context);
}

template <class Element, int kDim, softmax::ScoreKind Kind, int kOwn>
void key_gradients(const Backward<Element>& x) {
  using Kernel = softmax::sm80::KeyGradKernel<Element, kDim, SelfScore<Kind>, true, true,
                                              SpanSource, ListCut<kOwn>>;
  const RoutingSizes& s = x.s;
  const SpanSource source{GroupSource::of(x.b),
                          x.at.regions,
                          x.by_span(),
                          s.keys_listed,
                          static_cast<int>(s.key_entries),
                          static_cast<int>(s.key_region_size)};
  const int64_t groups = source.by_span ? x.at.regions.spans : s.groups;
  const int64_t slots = source.by_span ? s.key_region_size : s.key_slots;
  auto p = x.template params<Kind>(source);
  if (s.keys_listed) {
    p.d_k_sums = x.sums(x.at.d_k, groups * slots, s.dim);
    p.d_v_sums = x.sums(x.at.d_v, groups * slots, s.value_dim);
  }
  const int64_t owners = s.keys_listed ? s.heads : x.b.key_heads();
  softmax::sm80::launch_blocks<Kernel>(s.batch * groups * owners, p, slots, x.context);
}

template <class Element, int kDim>
void gradients(const Backward<Element>& x) {
  if (!softmax::sm80::has_plain_scores(x.b)) {
    query_gradients<Element, kDim, FullScore, kMedium>(x);
    key_gradients<Element, kDim, FullScore, kMedium>(x);
    if (!x.shared_bias) return;
    // Rows that are not listed weigh nothing: their statistic is +inf.
    softmax::sm80::GradientParams<Element, FullScore, softmax::DenseSource> all{
        {}, {}, x.b, x.inputs, {}, {}, {}, {}, {}, {}, true, 0};
    all.b.max_q = x.s.rows, all.b.max_k = x.s.keys;
    softmax::sm80::launch_bias<Element, kDim, softmax::DenseSource, softmax::sm80::SequenceCut>(
        all, x.b.batch(), x.context);
    return;
  }
  x.s.row_slots <= kNarrow ? query_gradients<Element, kDim, PlainScore, kNarrow>(x)
                           : query_gradients<Element, kDim, PlainScore, kMedium>(x);
  (x.by_span() ? x.s.key_region_size : x.s.key_slots) <= kNarrow
      ? key_gradients<Element, kDim, PlainScore, kNarrow>(x)
      : key_gradients<Element, kDim, PlainScore, kMedium>(x);
}

template <class Element, int kDim>
void backward(const BackwardParams& b, const Call& call) {
  const RoutingSizes s = shape_of(b);
  const Context& context = call.context;
  Arena arena(call.workspace, "routing_attention.backward");
  BackwardWorkspace<float> at = backward_workspace<float>(arena, s);
  if (s.by_slot) {
    at.rows = index_tokens(b.rows, at.rows, context);
    at.keys = index_keys(b, at.rows, at.keys, context);
    slot_deltas<Element>(b, at.delta, context);
  } else if (s.keys_listed) {
    at.regions = index_regions(b.keys, at.regions, context);
  }

  const auto inputs =
      softmax::sm80::loop_inputs<Element>(b, softmax::sm80::has_plain_scores(b), b.d_w, b.v, b.row,
                                          b.rest, s.by_slot ? row_numbers(at.delta, s) : b.delta);
  gradients<Element, kDim>({context, b, s, at, inputs, softmax::adds_up_bias(b)});

  const auto rows_of = [&](float* data, int64_t count, int64_t width) {
    return array_of_rows(data, s.batch, count, s.heads, width);
  };
  if (s.by_slot) {
    const int64_t row_slots = s.groups * s.row_slots;
    sum_slots<Element>(at.rows, rows_of(at.d_q, row_slots, s.dim), b.d_q, context);
    sum_temperatures(at.rows, at.d_row_temperature, b.d_row_temperature, row_slots, context);
    const int64_t slots = s.groups * s.key_slots;
    sum_slots<Element>(at.keys, rows_of(at.d_k, slots, s.dim), b.d_k, context);
    if (b.d_v) sum_slots<Element>(at.keys, rows_of(at.d_v, slots, s.value_dim), b.d_v, context);
  } else if (s.keys_listed) {
    const RegionGrid& grid = b.keys.grid;
    const int64_t slots = at.regions.spans * s.key_region_size;
    sum_spans<Element>(at.regions, grid, rows_of(at.d_k, slots, s.dim), b.d_k, context);
    if (b.d_v)
      sum_spans<Element>(at.regions, grid, rows_of(at.d_v, slots, s.value_dim), b.d_v, context);
  }
}

}  // namespace hw::routing_attention::sm80

namespace hw::routing_attention {

// kDim: the width that D and Dv are padded to.
template <class Element, int kDim>
struct Sm80 {
  static void forward(const ForwardParams& p, const Call& call) {
    sm80::forward<Element, kDim>(p, call);
  }
  static void backward(const BackwardParams& p, const Call& call) {
    sm80::backward<Element, kDim>(p, call);
  }
};

}  // namespace hw::routing_attention
