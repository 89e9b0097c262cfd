// SPDX-License-Identifier: Apache-2.0
// Attention inside the windows of an image on tensor cores: its workspace. No device code here.
#pragma once

#include "ops/window_attention/window_attention_simt_layout.h"
#include "softmax/sm80/list_cut.h"

namespace hw::window_attention::sm80 {

using softmax::sm80::kMedium;
using softmax::sm80::kNarrow;
using softmax::sm80::kWide;
using softmax::sm80::ListCut;
using softmax::sm80::rows_of_list_block;

inline int64_t workspace_bytes(const ForwardParams& p, const Call& call) {
  Arena arena;
  const WindowSizes s = sizes_of(p);
  bias_in<uint16_t>(arena, s);
  const softmax::ForwardParams f = engine_params(p, &p);  // any address will do
  softmax::sm80::lay_out(
      arena, f, s.sequences,
      softmax::sm80::plan_of(f, s.sequences, rows_of_list_block(f), call.context.multiprocessors));
  return arena.bytes();
}

}  // namespace hw::window_attention::sm80
