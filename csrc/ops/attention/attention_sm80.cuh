// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores (mma, ldmatrix, cp.async): bf16 and f16. In softmax/sm80/:
//
//   layout.h       what it takes, how it is cut, workspace
//   score.cuh      scores in fragments; gather.cuh tiles of slots whose tokens are looked up
//   epilogue.cuh   outputs of a row, merge of partial results
//   forward.cuh    loop R: rows with a running softmax
//   loop.cuh       loops R2 and C: rows or keys, given the row statistics
//   backward.cuh   gradients
//   columns.cuh    sums, maxima, P^T x
//
// Compile-time choices: the dtype, the width that D and Dv are padded to, and the three axes of a
// loop: the source of rows and keys, the kind of score, the cut. Plain scores, scale > 0 times
// products under a mask, save the registers of the others and half of the instructions per score;
// gates, mixtures and w of a row are run-time flags of both, as they come behind the loop.
// All options of scores that are not plain are run-time flags, the same for all threads, looked at
// once per tile.
#pragma once

#include "softmax/simt/row_dot.cuh"
#include "softmax/sm80/backward.cuh"
#include "softmax/sm80/columns.cuh"
#include "softmax/sm80/forward.cuh"

#include "core/gpu/launch.h"
#include "core/host/workspace.h"

namespace hw::softmax::sm80 {

inline Units units_of(bool plain, const ScoreParams& p) {
  if (!plain) return {};
  const float scale = static_cast<float>(p.scale);
  return {scale * kLog2e, scale, 1.0f / scale};
}

// The forward pass of `sequences` of a source; `arena` has the partial results of its spans.
template <class Element, int kDim, ScoreKind Kind, KeySource Source, class Cut>
void forward(const ForwardParams& f, const Source& source, const Kind& kind, int64_t sequences,
             const Context& context, Arena& arena) {
  using Kernel = ForwardKernel<Element, kDim, Kind, Source, Cut>;
  const Plan plan = plan_of(f, sequences, Kernel::kRows, context.multiprocessors);
  const Workspace at = lay_out(arena, f, sequences, plan);
  const Units units = units_of(Kind::kPlain, f);
  const Partials partials{at.w, at.sums, at.rows, at.values};
  const Output<Element> o = output_of<Element>(f.o), w = output_of<Element>(f.w);
  const typename Kernel::Params params{
      source, kind, f,       ScoreInputs<Element>(f), input_of<Element>(f.v), o, w,
      units,  plan, partials};
  launch<Kernel>({plan.row_blocks, plan.spans, 1}, sizeof(typename Kernel::Smem), context, params);
  if (plan.spans == 1) return;
  using Merge = MergeKernel<Element, Kind, Source>;
  const typename Merge::Params merge{source, f, o, w, partials, plan.spans, units};
  launch<Merge>({ceil_div<int64_t>(at.rows, Merge::kWarps), 1, 1}, 0, context, merge);
}

template <class Element, int kDim, ScoreKind Kind>
void forward_of_sequences(const ForwardParams& f, const Call& call) {
  Arena arena(call.workspace, "attention.forward");
  forward<Element, kDim, Kind, DenseSource, SequenceCut>(f, {}, {}, f.sequences(), call.context,
                                                         arena);
}

template <class Element, int kDim>
void forward(const ForwardParams& f, const Call& call) {
  is_plain(f) ? forward_of_sequences<Element, kDim, PlainScore>(f, call)
              : forward_of_sequences<Element, kDim, FullScore>(f, call);
}

// ---- Passes that know the row statistics --------------------------------------------------------

template <class Element>
LoopInputs<Element> loop_inputs(const ScoreParams& p, bool plain, const Ref<const void, 4>& queries,
                                const Ref<const void, 4>& keys, const Ref<const void, 3>& statistic,
                                const Ref<const void, 3>& rest, const Ref<const void, 3>& extra) {
  return {ScoreInputs<Element>(p),
          input_of<Element>(queries),
          input_of<Element>(keys),
          statistic,
          rest,
          extra,
          units_of(plain, p).unit};
}

template <class Kernel>
void launch_blocks(int64_t groups, typename Kernel::Params params, int64_t rows,
                   const Context& context) {
  params.blocks = ceil_div<int64_t>(rows, Kernel::L::kOwn);
  launch<Kernel>({groups * params.blocks, 1, 1}, sizeof(typename Kernel::Smem), context, params);
}

// d_k and d_v, by the kernels that sums of this width fit.
template <class Element, int kDim, ScoreKind Kind, KeySource Source, class Cut>
void launch_key_gradients(int64_t groups, const GradientParams<Element, Kind, Source>& p,
                          int64_t keys, const Context& context) {
  if constexpr (Loop<Element, kDim, Kind, true, true, Source, Cut>::kTeam == 2) {
    using Paired = PairedKeyGradKernel<Element, kDim, Kind, Source, Cut>;
    launch_blocks<Paired>(groups, p, keys, context);
  } else if constexpr (kDim <= 128) {
    using Both = KeyGradKernel<Element, kDim, Kind, true, true, Source, Cut>;
    launch_blocks<Both>(groups, p, keys, context);
  } else {
    using Keys = KeyGradKernel<Element, kDim, Kind, true, false, Source, Cut>;
    using Values = KeyGradKernel<Element, kDim, Kind, false, true, Source, Cut>;
    launch_blocks<Keys>(groups, p, keys, context);
    if (p.b.d_v) launch_blocks<Values>(groups, p, keys, context);
  }
}

// d_bias where it is broadcast, over these sequences too.
template <class Element, int kDim, KeySource Source, class Cut>
void launch_bias(GradientParams<Element, FullScore, Source> p, int64_t sequences,
                 const Context& context) {
  using Bias = BiasGradKernel<Element, kDim, Source, Cut>;
  p.sequences = sequences;
  p.blocks = ceil_div<int64_t>(p.b.max_q, Bias::L::kOwn);
  launch<Bias>(Bias::grid(p), sizeof(typename Bias::Smem), context, p);
}

template <class Element, int kDim, ScoreKind Kind>
void backward_of_sequences(const BackwardParams& b, const Context& context) {
  using Source = DenseSource;
  using Cut = SequenceCut;
  const GradientParams<Element, Kind, Source> p{
      {},
      {},
      b,
      loop_inputs<Element>(b, Kind::kPlain, b.d_w, b.v, b.row, b.rest, b.delta),
      output_of<Element>(b.d_q),
      output_of<Element>(b.d_k),
      output_of<Element>(b.d_v),
      {},
      {},
      {},
      adds_up_bias(b),
      0};
  const int64_t queries = b.sequences() * b.query_heads(), keys = b.sequences() * b.key_heads();
  launch_blocks<QueryGradKernel<Element, kDim, Kind, Source, Cut>>(queries, p, b.max_q, context);
  launch_key_gradients<Element, kDim, Kind, Source, Cut>(keys, p, b.max_k, context);
  if constexpr (!Kind::kPlain) {
    if (p.shared_bias) launch_bias<Element, kDim, Source, Cut>(p, b.batch(), context);
  }
}

template <class Element, int kDim>
void backward(const BackwardParams& b, const Call& call) {
  has_plain_scores(b) ? backward_of_sequences<Element, kDim, PlainScore>(b, call.context)
                      : backward_of_sequences<Element, kDim, FullScore>(b, call.context);
}

template <class Element, int kDim, ScoreKind Kind>
void columns_of_sequences(const ColumnsParams& c, const Context& context) {
  using Kernel = ColumnsKernel<Element, kDim, Kind, DenseSource, SequenceCut>;
  const typename Kernel::Params p{
      {},
      {},
      c,
      loop_inputs<Element>(c, Kind::kPlain, c.x, {}, c.row, c.rest, c.row_weight),
      output_of<Element>(c.y),
      0};
  launch_blocks<Kernel>(c.sequences() * c.query_heads(), p, c.max_k, context);
}

template <class Element, int kDim>
void columns(const ColumnsParams& c, const Call& call) {
  has_plain_scores(c) ? columns_of_sequences<Element, kDim, PlainScore>(c, call.context)
                      : columns_of_sequences<Element, kDim, FullScore>(c, call.context);
}

}  // namespace hw::softmax::sm80

namespace hw::attention {

// kDim: the width that D and Dv are padded to.
template <class Element, int kDim>
struct Sm80 {
  static void forward(const softmax::ForwardParams& p, const Call& call) {
    softmax::sm80::forward<Element, kDim>(p, call);
  }
  static void backward(const softmax::BackwardParams& p, const Call& call) {
    softmax::sm80::backward<Element, kDim>(p, call);
  }
  static void columns(const softmax::ColumnsParams& p, const Call& call) {
    softmax::sm80::columns<Element, kDim>(p, call);
  }
  static void row_dot(const softmax::RowDotParams& p, const Call& call) {
    softmax::simt::row_dot<Element>(p, call);
  }
};

}  // namespace hw::attention
