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
  static constexpr auto& forward = simt::forward<Element>;
  static constexpr auto& backward = simt::backward<Element>;
};

}  // namespace hw::key_scan
