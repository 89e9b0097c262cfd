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
  static void forward(const ForwardParams& p, const Call& call) { simt::forward<Element>(p, call); }
  static void backward(const BackwardParams& p, const Call& call) {
    simt::backward<Element>(p, call);
  }
  static void step(const StepParams& p, const Call& call) { simt::step<Element>(p, call); }
};

}  // namespace hw::linear_attention
