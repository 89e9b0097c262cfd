// SPDX-License-Identifier: Apache-2.0
// Cascaded group attention on tensor cores: what it takes and what a block has in shared memory;
// from shapes and the device only, and no device code.
#pragma once

#include <string>

#include "ops/cascaded_group_attention/cascaded_group_attention.h"

#include "core/host/cuda_device.h"

namespace hw::cascaded_group_attention::sm80 {

inline constexpr int kRows = 64;        // tokens of a block
inline constexpr int kKeyDim = 16;      // K
inline constexpr int kOutColumns = 64;  // of the last projection at a time

// Rows of a window, whole warps, so that no product of a warp meets two windows: what is not finite
// in one would reach the other, also times 0.
inline int64_t rows_of_window(const ForwardParams& p) {
  return p.tokens() <= 16 ? 16 : p.tokens() <= 32 ? 32 : kRows;
}

// d as an instance has it.
inline int64_t width(const ForwardParams& p) { return round_up<int64_t>(p.group(), 32); }

// At most: members of WindowKernel::Smem in their order, then a tile of relu a head.
inline int64_t shared_bytes(int64_t dim, int64_t heads) {
  const int64_t tile = kRows * dim * 2;
  const int64_t weights = max_of(dim * (2 * kKeyDim + dim), 2 * dim * kOutColumns) * 2;
  const int64_t keys = kRows * 32 * 2, plane = kRows * (kKeyDim + 1) * 4, places = 2048;
  return 2 * tile + 2 * keys + plane + weights + places + heads * tile;
}

// Why a call cannot run here; empty if it can.
inline std::string why_not(const ForwardParams& p, const Call& call) {
  if (p.key_dim() != kKeyDim)
    return concat("the tensor-core kernel has K = ", kKeyDim, " only, not ", p.key_dim());
  if (p.tokens() > kRows)
    return concat("the tensor-core kernel has windows of up to ", kRows, " tokens, not ",
                  p.tokens());
  const int64_t bytes = shared_bytes(width(p), p.heads());
  const int64_t most = cuda_device(call.tensors[0].device_index).shared_bytes_per_block;
  if (bytes > most)
    return concat("the tensor-core kernel needs ", bytes, " bytes of shared memory a block, ",
                  "the device has ", most);
  return {};
}

}  // namespace hw::cascaded_group_attention::sm80
