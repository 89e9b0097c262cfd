// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores (mma, ldmatrix, cp.async): bf16 and f16. In softmax/sm80/:
//
//   layout.h       what it takes, how it is cut, workspace
//   score.cuh      what a block works on, scores in fragments
//   epilogue.cuh   outputs of a row, merge of partial results
//   forward.cuh    loop R: rows with a running softmax
//   loop.cuh       loops R2 and C: rows or keys, given the row statistics
//   backward.cuh   gradients
//   columns.cuh    sums, maxima, P^T x
//
// Compile-time choices: the dtype, the width that D and Dv are padded to, and whether scores are
// plain, scale > 0 times products under a mask, which saves their registers and half of the
// instructions per score. All options of scores that are not plain are run-time flags, the same for
// all threads, looked at once per tile.
#pragma once

#include "softmax/sm80/backward.cuh"
#include "softmax/sm80/columns.cuh"
#include "softmax/sm80/forward.cuh"

#include "core/gpu/launch.h"
#include "core/host/workspace.h"

namespace hw::softmax::sm80 {

// Whether scores are scale > 0 times products, masked, and weights a softmax. 1 / scale is a float.
inline bool has_plain_scores(const ScoreParams& p) {
  return is_softmax(p.activation) && p.scale > 1e-30 && p.softcap == 0 && !p.bias && !p.key_bias &&
         !p.key_gain && !p.row_temperature;
}

inline bool is_plain(const ForwardParams& f) {
  const bool more =
      f.w || f.head_gate || f.identity_mix || f.entropy || f.p_max || f.sq_norm || f.mass;
  return has_plain_scores(f) && f.v && !more;
}

inline Units units_of(bool plain, const ScoreParams& p) {
  if (!plain) return {};
  const float scale = static_cast<float>(p.scale);
  return {scale * kLog2e, scale, 1.0f / scale};
}

template <class Element, int kDim, bool kPlain>
void forward(const ForwardParams& f, const Context& context, const hw::Workspace& memory) {
  using Kernel = ForwardKernel<Element, kDim, kPlain>;
  const Plan plan = plan_of(f, Kernel::kRows, context.multiprocessors);
  Arena arena(memory, "attention.forward");
  const Workspace at = lay_out(arena, f, plan);
  const Units units = units_of(kPlain, f);
  const Partials partials{at.w, at.sums, at.rows, at.values};
  const Output<Element> o = output_of<Element>(f.o), w = output_of<Element>(f.w);
  const typename Kernel::Params params{
      {}, f, ScoreInputs<Element>(f), input_of<Element>(f.v), o, w, units, plan, partials};
  launch<Kernel>({plan.tasks, plan.spans, 1}, sizeof(typename Kernel::Smem), context, params);
  if (plan.spans == 1) return;
  using Merge = MergeKernel<Element, kPlain>;
  const typename Merge::Params merge{f, o, w, partials, plan.spans, units};
  launch<Merge>({ceil_div<int64_t>(at.rows, Merge::kWarps), 1, 1}, 0, context, merge);
}

template <class Element, int kDim>
void forward(const ForwardParams& f, const Call& call) {
  is_plain(f) ? forward<Element, kDim, true>(f, call.context, call.workspace)
              : forward<Element, kDim, false>(f, call.context, call.workspace);
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

// d_bias where it is broadcast.
template <class Element, int kDim>
void launch_bias(GradientParams<Element> p, const Context& context) {
  using Bias = BiasGradKernel<Element, kDim>;
  p.blocks = ceil_div<int64_t>(p.b.max_q, Bias::L::kOwn);
  launch<Bias>(Bias::grid(p), sizeof(typename Bias::Smem), context, p);
}

template <class Element, int kDim, bool kPlain>
void backward(const BackwardParams& b, const Context& context) {
  const GradientParams<Element> p{
      {},
      b,
      loop_inputs<Element>(b, kPlain, b.d_w, b.v, b.row, b.rest, b.delta),
      output_of<Element>(b.d_q),
      output_of<Element>(b.d_k),
      output_of<Element>(b.d_v),
      adds_up_bias(b),
      0};
  const int64_t queries = b.sequences() * b.query_heads(), keys = b.sequences() * b.key_heads();
  launch_blocks<QueryGradKernel<Element, kDim, kPlain>>(queries, p, b.max_q, context);
  if constexpr (kDim <= 128) {
    launch_blocks<KeyGradKernel<Element, kDim, kPlain, true, true>>(keys, p, b.max_k, context);
  } else {
    launch_blocks<KeyGradKernel<Element, kDim, kPlain, true, false>>(keys, p, b.max_k, context);
    if (b.d_v)
      launch_blocks<KeyGradKernel<Element, kDim, kPlain, false, true>>(keys, p, b.max_k, context);
  }
  if constexpr (!kPlain) {
    if (p.shared_bias) launch_bias<Element, kDim>(p, context);
  }
}

template <class Element, int kDim>
void backward(const BackwardParams& b, const Call& call) {
  has_plain_scores(b) ? backward<Element, kDim, true>(b, call.context)
                      : backward<Element, kDim, false>(b, call.context);
}

template <class Element, int kDim, bool kPlain>
void columns(const ColumnsParams& c, const Context& context) {
  using Kernel = ColumnsKernel<Element, kDim, kPlain>;
  const typename Kernel::Params p{
      {},
      c,
      loop_inputs<Element>(c, kPlain, c.x, {}, c.row, c.rest, c.row_weight),
      output_of<Element>(c.y),
      0};
  launch_blocks<Kernel>(c.sequences() * c.query_heads(), p, c.max_k, context);
}

template <class Element, int kDim>
void columns(const ColumnsParams& c, const Call& call) {
  has_plain_scores(c) ? columns<Element, kDim, true>(c, call.context)
                      : columns<Element, kDim, false>(c, call.context);
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
};

}  // namespace hw::attention
