// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on tensor cores: what it takes and how it is cut. No
// device code here: the host side asks `sm80::dim` and `sm80::workspace_bytes`.
#pragma once

#include "ops/attention/attention_sm80_layout.cuh"
#include "ops/routing_attention/routing_attention_simt_layout.cuh"

namespace hw::routing_attention::sm80 {

// The compiled width that serves a call: q, k and v are padded to it with zeros on their way to
// shared memory. function: 0 forward, 1 backward.
inline int dim(int function, const Call& call) {
  const Shape s = function == 0 ? forward_shape(call) : backward_shape(call);
  return static_cast<int>(max_of(s.dim, s.value_dim));
}

// That of the indices and of the sums over slots and spans, which both CUDA backends share.
inline int64_t workspace_bytes(int function, const Call& call) {
  return routing_attention::workspace_bytes(function != 0, call);
}

// Lists are short: a block owns 64 rows, a strip of 16 for each of 4 warps. Of a list of fewer, warps
// without rows only help to load.
template <int kDim>
struct ForwardTiles {
  static constexpr int kRows = 64, kKeys = kDim <= 64 ? 64 : 32;
  static constexpr int strips(bool) { return 1; }
  static constexpr int warps(bool) { return kRows / 16; }
  static constexpr int blocks(bool plain) { return !plain ? 2 : kDim <= 64 ? 4 : 3; }
};

}  // namespace hw::routing_attention::sm80
