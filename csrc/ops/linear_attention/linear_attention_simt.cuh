// SPDX-License-Identifier: Apache-2.0
// Linear attention in plain CUDA: every dtype, every D and Dv, sm_75 and later.
//
//   _simt_layout.h        tile sizes, shared memory, workspace
//   _simt_tiles.cuh       the pieces: loading, scores, products with tiles and states
//   _simt_state.cuh       parameters, the work of a block, the state it carries
//   _simt_chunk_loop.cuh  the loop over chunks: o, dq, dk, dv
//   _simt_totals.cuh      states of the segments and their prefix
//   _simt_forward.cuh     _simt_backward.cuh   _simt_step.cuh     the functions
#pragma once

#include "ops/linear_attention/linear_attention_simt_backward.cuh"
#include "ops/linear_attention/linear_attention_simt_forward.cuh"
#include "ops/linear_attention/linear_attention_simt_step.cuh"

namespace hw::linear_attention {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& forward = simt::forward<Element>;
  static constexpr auto& backward = simt::backward<Element>;
  static constexpr auto& step = simt::step<Element>;
};

}  // namespace hw::linear_attention
