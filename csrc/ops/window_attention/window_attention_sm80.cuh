// SPDX-License-Identifier: Apache-2.0
// Attention inside the windows of an image on tensor cores (mma, ldmatrix, cp.async): bf16 and f16.
// The loops are those of softmax/sm80, over windows, cut as lists of slots are.
//
//   _source.h   where rows and keys lie     _bias.cuh   the table     _sm80_layout.h   workspace
#pragma once

#include "ops/attention/attention_sm80.cuh"
#include "ops/window_attention/window_attention_bias.cuh"
#include "ops/window_attention/window_attention_sm80_layout.h"
#include "ops/window_attention/window_attention_source.h"

namespace hw::window_attention::sm80 {

using softmax::FullScore;
using softmax::PlainScore;

template <class Element, int kDim, softmax::ScoreKind Kind, int kOwn>
void forward(const ForwardParams& p, const softmax::ForwardParams& f, const Context& context,
             Arena& arena) {
  softmax::sm80::forward<Element, kDim, Kind, WindowSource, ListCut<kOwn>>(
      f, WindowSource::of(p), Kind{}, sizes_of(p).sequences, context, arena);
}

template <class Element, int kDim>
void forward(const ForwardParams& p, const Call& call) {
  const Context& context = call.context;
  Arena arena(call.workspace, "window_attention.forward");
  Element* const bias = bias_in<Element>(arena, sizes_of(p));
  expand_table(p, bias, context);
  const softmax::ForwardParams f = engine_params(p, bias);
  const int rows = rows_of_list_block(f);
  if (!softmax::sm80::is_plain(f))
    forward<Element, kDim, FullScore, kMedium>(p, f, context, arena);
  else if (rows == kNarrow)
    forward<Element, kDim, PlainScore, kNarrow>(p, f, context, arena);
  else if (rows == kMedium)
    forward<Element, kDim, PlainScore, kMedium>(p, f, context, arena);
  else
    forward<Element, kDim, PlainScore, kWide>(p, f, context, arena);
}

template <class Element, int kDim, softmax::ScoreKind Kind>
void backward_of_windows(const BackwardParams& p, const softmax::BackwardParams& b,
                         const Context& context) {
  using Cut = ListCut<kMedium>;
  const WindowSizes s = sizes_of(p);
  const softmax::sm80::GradientParams<Element, Kind, WindowSource> of{
      WindowSource::of(p),
      {},
      b,
      softmax::sm80::loop_inputs<Element>(b, Kind::kPlain, b.d_w, b.v, b.row, b.rest, b.delta),
      output_of<Element>(b.d_q),
      output_of<Element>(b.d_k),
      output_of<Element>(b.d_v),
      {},
      {},
      {},
      s.d_bias,
      0};
  using Queries = softmax::sm80::QueryGradKernel<Element, kDim, Kind, WindowSource, Cut>;
  using Keys = softmax::sm80::KeyGradKernel<Element, kDim, Kind, true, true, WindowSource, Cut>;
  softmax::sm80::launch_blocks<Queries>(s.sequences * s.heads, of, s.slots, context);
  softmax::sm80::launch_blocks<Keys>(s.sequences * b.key_heads(), of, s.slots, context);
  if constexpr (!Kind::kPlain) {
    if (s.d_bias)
      softmax::sm80::launch_bias<Element, kDim, WindowSource, Cut>(of, s.sequences, context);
  }
}

template <class Element, int kDim>
void backward(const BackwardParams& p, const Call& call) {
  Arena arena(call.workspace, "window_attention.backward");
  const auto memory = backward_workspace<Element, float>(arena, sizes_of(p));
  expand_table(p, memory.bias, call.context);
  const softmax::BackwardParams b = engine_params(p, memory);
  softmax::sm80::has_plain_scores(b)
      ? backward_of_windows<Element, kDim, PlainScore>(p, b, call.context)
      : backward_of_windows<Element, kDim, FullScore>(p, b, call.context);
  if (memory.d_bias) fold_table(p, memory.d_bias, call.context);
}

}  // namespace hw::window_attention::sm80

namespace hw::window_attention {

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

}  // namespace hw::window_attention
