// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on tensor cores: its workspace. No device code here.
#pragma once

#include "ops/routing_attention/routing_attention_simt_layout.h"
#include "softmax/sm80/list_cut.h"

namespace hw::routing_attention::sm80 {

using softmax::sm80::is_plain;  // gates do not change scores: mixtures of heads are plain too
using softmax::sm80::kMedium;
using softmax::sm80::kNarrow;
using softmax::sm80::kWide;
using softmax::sm80::ListCut;
using softmax::sm80::rows_of_list_block;

// Bytes of workspace of a forward call: behind what both CUDA backends have, partial results of the
// spans of keys.
inline int64_t workspace_bytes(const ForwardParams& p, int64_t multiprocessors) {
  const int64_t sequences = p.batch() * p.groups();
  Arena arena;
  static_cast<void>(forward_workspace(arena, shape_of(p)));
  softmax::sm80::lay_out(
      arena, p, sequences,
      softmax::sm80::plan_of(p, sequences, rows_of_list_block(p), multiprocessors));
  return arena.bytes();
}

}  // namespace hw::routing_attention::sm80
