// SPDX-License-Identifier: Apache-2.0
// ContMix on CUDA: how a call is cut into work, and its workspace; from shapes only.
//
// Forward: a block has some tokens of a group of a batch entry; their weights stay in its shared
// memory. Backward: weights and their gradients stand in a workspace for a part of the batch
// entries and groups at a time, as many as keep the device busy, and parts follow one another.
#pragma once

#include <cstdint>

#include "ops/contmix/contmix.h"

#include "core/host/workspace.h"
#include "core/math.h"

namespace hw::contmix::simt {

inline constexpr int kThreads = 128;
inline constexpr int kMostTokens = 16;           // of a block
inline constexpr int kStep = 32;                 // taps and centres that are multiplied at a time
inline constexpr int64_t kMostBytes = 44 << 10;  // of shared memory
inline constexpr int64_t kBlocksWanted = 4;      // per multiprocessor
inline constexpr int64_t kRowsOfSlice = 256, kMostSlices = 64;

// Shared memory of a block with the weights of `tokens` tokens, in numbers.
inline int64_t numbers_of(int64_t tokens, int64_t taps) {
  return tokens * taps + kMostTokens * kStep + kStep * (kStep + 1);
}

// Tokens of a block; 0: the weights of one token do not fit.
inline int tokens_of(int64_t taps, int64_t number_bytes) {
  int tokens = kMostTokens;
  while (tokens > 0 && numbers_of(tokens, taps) * number_bytes > kMostBytes) tokens /= 2;
  return tokens;
}

// A part of the batch entries and groups: whole batch entries, or groups of one of them.
struct Parts {
  int64_t batch = 1, groups = 1;  // of a part; the last may be smaller
};

inline Parts parts_of(const ForwardParams& p, int64_t number_bytes, const Context& context) {
  const int64_t tokens = max_of(tokens_of(p.weight.size[0], number_bytes), 1);
  const int64_t blocks = max_of<int64_t>(ceil_div(p.tokens(), tokens), 1);
  const int64_t wanted = kBlocksWanted * max_of<int64_t>(context.multiprocessors, 1);
  const int64_t planes = max_of<int64_t>(ceil_div(wanted, blocks), 1), groups = p.groups();
  Parts parts;
  parts.groups = max_of<int64_t>(min_of(planes, groups), 1);
  if (parts.groups == groups)
    parts.batch =
        min_of(ceil_div(planes, max_of<int64_t>(groups, 1)), max_of<int64_t>(p.batch(), 1));
  return parts;
}

// Arrays of a backward call, of the accumulation type.
template <class A>
struct Workspace {
  Parts parts;
  int64_t slices = 1;  // of the rows (tokens and groups) of a part
  A* p = nullptr;      // [batch, Y, X, groups, T]  of a part: weights
  A* ds = nullptr;     // the same: dp, then ds; null if only dv is wanted
  A* map = nullptr;    // [slices, T, A + 1]        sums of dW and dc
  A* table[2] = {};    // [B, G, entries]           sums of dr, by half

  Workspace(Arena& arena, const BackwardParams& q, const Context& context)
      : parts(parts_of(q, sizeof(A), context)) {
    const int64_t taps = q.weight.size[0], rows = parts.batch * q.tokens() * parts.groups;
    slices = min_of(kMostSlices, max_of<int64_t>(ceil_div(rows, kRowsOfSlice), 1));
    p = arena.take<A>(rows * taps);
    if (!q.wants_scores()) return;
    ds = arena.take<A>(rows * taps);
    if (q.d_weight || q.d_bias) map = arena.take<A>(slices * taps * (q.centres() + 1));
    for (int m = 0; m < 2; ++m)
      if (q.d_table(m)) table[m] = arena.take<A>(q.batch() * q.groups() * q.window(m).offsets());
  }
};

inline int64_t workspace_bytes(const BackwardParams& p, const Call& call) {
  Arena arena;
  if (call.element == DType::f64)
    Workspace<double>(arena, p, call.context);
  else
    Workspace<float>(arena, p, call.context);
  return arena.bytes();
}

}  // namespace hw::contmix::simt
