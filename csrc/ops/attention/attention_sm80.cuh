// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores (mma, ldmatrix, cp.async): bf16 and f16.
//
//   _sm80_layout.cuh     what it takes, how it is cut, workspace
//   _sm80_score.cuh      place of a block, scores in fragments
//   _sm80_finish.cuh     outputs of a row, merge of partial results
//   _sm80_forward.cuh    loop R
#pragma once

#include "ops/attention/attention_sm80_forward.cuh"

#include "core/launch.h"

namespace hw::attention::sm80 {

// Whether scores are scale > 0 times products, masked, and weights a softmax.
inline bool has_plain_scores(const ScoreParams& p) {
  return is_softmax(p.activation) && p.scale > 0 && p.softcap == 0 && !p.bias && !p.key_bias &&
         !p.key_gain && !p.row_temperature;
}

inline bool is_plain(const ForwardParams& f) {
  return has_plain_scores(f) && f.v && !f.w && !f.head_gate && !f.identity_mix && !f.entropy &&
         !f.p_max && !f.sq_norm && !f.mass;
}

inline Units units_of(bool plain, const ScoreParams& p) {
  if (!plain) return {};
  const float scale = static_cast<float>(p.scale);
  return {scale * kLog2e, scale};
}

// The workspace of a call; checked to be large enough.
inline char* workspace_of(const Call& call, int tensor, int64_t needed) {
  const Tensor& given = call.tensor(tensor);
  const int64_t bytes = given.present() ? given.numel() * dtype_size(given.dtype) : 0;
  check(bytes >= needed, ErrorKind::value, "attention: workspace has ", bytes,
        " bytes, expected at least ", needed);
  return static_cast<char*>(given.data);
}

template <class Element, int kDim, bool kPlain>
void forward(const Call& call, const ForwardParams& f) {
  using Kernel = ForwardKernel<Element, kDim, kPlain>;
  const Plan plan = plan_of(f, Kernel::kRows);
  const Workspace at = make_workspace(f, plan);
  float* floats = reinterpret_cast<float*>(workspace_of(call, 19, at.bytes));
  const Units units = units_of(kPlain, f);
  const Partials partials{floats, floats + at.sums, at.rows, at.values};
  const Output<Element> o = output_of<Element>(f.o), w = output_of<Element>(f.w);
  const typename Kernel::Params params{
      f, ScoreInputs<Element>(f), input_of<Element>(f.v), o, w, units, plan, partials};
  launch<Kernel>({plan.tasks, plan.spans, 1}, sizeof(typename Kernel::Smem), call.context, params);
  if (plan.spans == 1) return;
  using Merge = MergeKernel<Element>;
  const typename Merge::Params merge{f, o, w, partials, plan.spans, units};
  launch<Merge>({ceil_div<int64_t>(at.rows, Merge::kWarps), 1, 1}, 0, call.context, merge);
}

template <class Element, int kDim>
void forward(const Call& call) {
  const ForwardParams f = forward_params(call);
  is_plain(f) ? forward<Element, kDim, true>(call, f) : forward<Element, kDim, false>(call, f);
}

}  // namespace hw::attention::sm80

namespace hw::attention {

// kDim: the width that D and Dv are padded to.
template <class Element, int kDim>
struct Sm80 {
  static void forward(const Call& call) { sm80::forward<Element, kDim>(call); }
};

}  // namespace hw::attention
