// SPDX-License-Identifier: Apache-2.0
// Attention inside the windows of an image in plain CUDA: every dtype, every D and Dv, sm_75 and
// later. The mathematics is in window_attention.h; the loops are those of softmax/simt, over
// windows.
//
//   _source.h   where rows and keys lie     _bias.cuh   the table     _simt_layout.h   workspace
#pragma once

#include "ops/window_attention/window_attention_bias.cuh"
#include "ops/window_attention/window_attention_source.h"
#include "softmax/simt/backward.cuh"
#include "softmax/simt/forward.cuh"

namespace hw::window_attention::simt {

using softmax::FullScore;

inline constexpr const char* kName = "window_attention";

template <class Element>
void forward(const ForwardParams& f, const Call& call) {
  using A = Accum<Element>;
  const WindowSizes s = sizes_of(f);
  Arena arena(call.workspace, kName);
  Element* const bias = bias_in<Element>(arena, s);
  expand_table(f, bias, call.context);

  softmax::simt::RowsParams<Element, FullScore, WindowSource> p{};
  p.f = engine_params(f, bias);
  p.source = WindowSource::of(f);
  p.plan = plan_of<A>(s, call);
  p.partials = arena.take<A>(p.plan.workspace());
  describe_tensors(p);
  run_rows(p, call.context);
}

template <class Element>
void backward(const BackwardParams& b, const Call& call) {
  const WindowSizes s = sizes_of(b);
  Arena arena(call.workspace, kName);
  const auto memory = backward_workspace<Element, Accum<Element>>(arena, s);
  expand_table(b, memory.bias, call.context);

  softmax::simt::GradParams<Element, FullScore, WindowSource> p{};
  p.b = engine_params(b, memory);
  p.source = WindowSource::of(b);
  describe_tensors(p);
  p.shared_bias = s.d_bias;
  run_query_grad(p, s.sequences, call.context);
  run_key_grad(p, s.sequences, call.context);
  if (!s.d_bias) return;
  run_bias_grad(p, s.sequences, call.context);
  fold_table(b, memory.d_bias, call.context);
}

}  // namespace hw::window_attention::simt

namespace hw::window_attention {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& forward = simt::forward<Element>;
  static constexpr auto& backward = simt::backward<Element>;
};

}  // namespace hw::window_attention
