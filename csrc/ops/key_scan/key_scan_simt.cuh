// SPDX-License-Identifier: Apache-2.0
// Key scan on CUDA: every dtype, every Dv, sm_75 and later.
//
//   _simt_layout.h     units, segments, workspace
//   _simt_lanes.cuh    log-sums, the columns of a lane
//   _simt_forward.cuh  _simt_backward.cuh   the functions
#pragma once

#include "ops/key_scan/key_scan_simt_backward.cuh"
#include "ops/key_scan/key_scan_simt_forward.cuh"

namespace hw::key_scan {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static void forward(const ForwardParams& p, const Call& call) { simt::forward<Element>(p, call); }
  static void backward(const BackwardParams& p, const Call& call) {
    simt::backward<Element>(p, call);
  }
};

}  // namespace hw::key_scan
