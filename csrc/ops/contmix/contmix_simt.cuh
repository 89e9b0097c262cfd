// SPDX-License-Identifier: Apache-2.0
// ContMix on CUDA: every dtype, every width, sm_75 and later.
//
//   _simt_layout.h       tokens of a block, parts of a backward call, workspace
//   _simt_weights.cuh    the weights of some tokens
//   _simt_forward.cuh    _simt_backward.cuh, its kernels in _simt_gradients.cuh
#pragma once

#include "ops/contmix/contmix_simt_backward.cuh"
#include "ops/contmix/contmix_simt_forward.cuh"

namespace hw::contmix {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& forward = simt::forward<Element>;
  static constexpr auto& backward = simt::backward<Element>;
};

}  // namespace hw::contmix
