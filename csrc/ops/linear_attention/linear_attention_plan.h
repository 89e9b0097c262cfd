// SPDX-License-Identifier: Apache-2.0
// How the CUDA kernels cut a call of linear attention into work: from shapes only, never from data,
// so that the workspace is known before anything runs and no call waits for the device.
//
// Three schedules:
//   direct  every block of rows meets its keys tile by tile; quadratic, no state, no workspace.
//           For short sequences, where S (D + Dv) / 2 < 2 F Dv multiplications per token, and only
//           if no state is passed in or out.
//   single  one segment per sequence: its states are carried from chunk to chunk in one block.
//   split   sequences are cut into segments of `segment_tokens` so that the device fills:
//             (a) every segment reduces its own keys to a state     (totals)
//             (b) exclusive prefix over the segments of a sequence  (in fixed order; this pass also
//                 writes the final state, backward: the gradient of the initial one)
//             (c) every segment walks its chunks from its state
// A call that is not causal and not direct runs (a) and (b) too: each row applies the total.
//
// Packed sequences: where sequence n starts is known on the device only, so segments have slots:
//   segment k of sequence n has slot  floor(cu[n] / L) + n + k     (unpacked: n * per_sequence + k)
// Slots of one sequence never reach those of the next, because
//   floor((c + len) / L) - floor(c / L) + 1 >= ceil(len / L).
// There are floor(S / L) + N of them, some stay empty, and a slot's sequence is found by bisection.
#pragma once

#include <cstdint>

#include "ops/linear_attention/linear_attention.h"

#include "core/host/call.h"
#include "core/macros.h"
#include "core/math.h"

namespace hw::linear_attention {

inline constexpr int64_t kChunk = 64;          // segments are multiples of this
inline constexpr int64_t kDirectTokens = 512;  // longest sequence for the direct schedule

enum class Schedule : int { direct = 0, single = 1, split = 2 };

// The shapes that decide.
struct CallSizes {
  int64_t batch = 0, tokens = 0, sequences = 0;
  int query_heads = 0, key_heads = 0, dim = 0, value_dim = 0, features = 0;
  bool packed = false, causal = false, normalize = false, any_state = false;
  int multiprocessors = 1;

  HW_HOST_DEVICE int group() const { return key_heads ? query_heads / key_heads : 0; }
};

struct Plan {
  Schedule schedule = Schedule::single;
  bool packed = false;
  bool causal = false;
  int64_t sequences = 0;       // N
  int64_t segment_tokens = 0;  // L; single: S
  int64_t per_sequence = 1;    // slots of one sequence; packed and not single: unused
  int64_t num_slots = 0;       // slots of all sequences, empty ones included

  // Phases (a) and (b) run, and their results live in the workspace.
  HW_HOST_DEVICE bool has_totals() const {
    return schedule == Schedule::split || (schedule == Schedule::single && !causal);
  }
};

// One segment: rows [begin, end) of batch entry `batch`, which belong to sequence `sequence`.
struct Segment {
  int64_t sequence = 0, batch = 0;
  int64_t begin = 0, end = 0;                    // rows of the segment
  int64_t sequence_begin = 0, sequence_end = 0;  // rows of its sequence
  int64_t index = 0;                             // position within its sequence
  bool used = false;                             // false: an empty slot, nothing to do
};

// `any_state`: whether a state is passed in or out.
inline CallSizes shape_of(const ForwardParams& p, bool any_state, const Context& context) {
  CallSizes s;
  s.batch = p.q.size[0];
  s.tokens = p.tokens();
  s.packed = bool(p.cu_seqlens);
  s.sequences = p.sequences();
  s.query_heads = p.query_heads();
  s.key_heads = p.key_heads();
  s.dim = p.dim();
  s.value_dim = p.value_dim();
  s.features = p.features();
  s.causal = p.causal;
  s.normalize = p.normalize;
  s.any_state = any_state;
  s.multiprocessors = max_of<int>(context.multiprocessors, 1);
  return s;
}

inline CallSizes forward_shape(const ForwardParams& p, const Context& context) {
  return shape_of(p, p.kv0 || p.kv1, context);
}
inline CallSizes backward_shape(const BackwardParams& p, const Context& context) {
  return shape_of(p, p.kv0 || p.d_kv1 || p.d_kv0, context);
}

// Longest sequence for which tiles cost less than states: (D + Dv) S / 2 < 2 F Dv (causal).
HW_HOST_DEVICE inline int64_t direct_limit(const CallSizes& s) {
  const int64_t states = (s.causal ? 4 : 2) * static_cast<int64_t>(s.features) * s.value_dim;
  const int64_t limit = states / max_of<int64_t>(s.dim + s.value_dim, 1);
  return min_of(max_of(limit, kChunk), kDirectTokens);
}

// ---- When to cut --------------------------------------------------------------------------------
//
// The device holds `resident` blocks at a time and runs others in rounds behind them. In rows that
// a block walks, with F' what the traffic of a segment's state is worth:
//
//   single   rounds(blocks) S                       blocks: sequences x key heads x slices
//   split    rounds(blocks c) (L + L / 2 + F') + launches        c segments of L = S / c rows
//   full     single without a mask: has totals too, of all rows
//
//   L / 2    a walk reads q, k, v and writes o, totals read k and v: half of the bytes
//   F'       a state of F (Dv + 1) floats is written by the totals, read and written by the prefix
//            and read by the walk: 16 F (Dv + 1) bytes, where a row is 4 (D + Dv) of 16 bits
// Where the blocks fill the device, cuts gain nothing. A block alone on its multiprocessor is taken
// to be as fast as one beside others; it is faster, by how much is not known, so that whole calls
// that fill half of the device may be a little better than this says.
inline constexpr int64_t kLaunchRows = 256;  // two launches more, of about 3 us each

inline int64_t state_rows(const CallSizes& s) {
  return 4 * static_cast<int64_t>(s.features) * (s.value_dim + 1) /
         max_of<int64_t>(s.dim + s.value_dim, 1);
}

// Rows of time of `blocks` blocks with `rows` rows each.
inline int64_t time_of(const CallSizes& s, int64_t resident, int64_t blocks, int64_t rows,
                       bool totals) {
  const int64_t each = rows + (totals ? rows / 2 + state_rows(s) : 0);
  return ceil_div(blocks, resident) * each + (totals ? kLaunchRows : 0);
}

// Rows of a segment; all tokens: not cut. Where packed sequences begin is not known here: the
// longest is taken to have twice its share of the tokens.
inline int64_t segment_of(const CallSizes& s, int64_t slices, int64_t resident) {
  const int64_t tokens = max_of<int64_t>(s.tokens, 1), sequences = max_of<int64_t>(s.sequences, 1);
  const int64_t heads = max_of<int64_t>(s.key_heads * slices, 1), blocks = sequences * heads;
  if (blocks >= resident) return tokens;
  const int64_t longest = s.packed ? min_of(tokens, 2 * ceil_div(tokens, sequences)) : tokens;
  const int64_t most = ceil_div(resident, s.packed ? heads : blocks);
  int64_t best = tokens, least = time_of(s, resident, blocks, longest, !s.causal);
  for (int64_t cuts = 2; cuts <= most; ++cuts) {
    const int64_t length = round_up(ceil_div(tokens, cuts), kChunk);
    if (length >= tokens) continue;
    const int64_t segments =
        s.packed ? tokens / length + sequences : sequences * ceil_div(tokens, length);
    const int64_t time = time_of(s, resident, segments * heads, length, true);
    if (time < least) best = length, least = time;
  }
  return best;
}

// `slices`: blocks that share one segment of one key head. `direct_rows`: rows of one block in the
// direct schedule. `side_by_side`: blocks that a multiprocessor holds.
inline Plan make_plan(const CallSizes& s, int64_t slices, int64_t direct_rows,
                      int64_t side_by_side = 2) {
  Plan p;
  p.packed = s.packed;
  p.causal = s.causal;
  p.sequences = s.sequences;
  if (!s.any_state && s.tokens <= direct_limit(s)) {
    p.schedule = Schedule::direct;
    p.segment_tokens = direct_rows;
  } else {
    p.segment_tokens = segment_of(s, slices, side_by_side * s.multiprocessors);
    p.schedule = p.segment_tokens < s.tokens ? Schedule::split : Schedule::single;
  }
  if (p.schedule == Schedule::single) {
    p.num_slots = s.sequences;
  } else if (p.packed) {
    p.num_slots = s.tokens / p.segment_tokens + s.sequences;
  } else {
    p.per_sequence = ceil_div(s.tokens, p.segment_tokens);
    p.num_slots = s.sequences * p.per_sequence;
  }
  return p;
}

// First slot of sequence n.
HW_HOST_DEVICE inline int64_t first_slot(const Plan& p, const int64_t* cu_seqlens, int64_t stride,
                                         int64_t n) {
  if (!p.packed || p.schedule == Schedule::single) return n * p.per_sequence;
  return cu_seqlens[n * stride] / p.segment_tokens + n;
}

// Segments of sequence n that have rows; one, even without rows, in the single schedule.
HW_HOST_DEVICE inline int64_t segment_count(const Plan& p, int64_t rows) {
  return p.schedule == Schedule::single ? 1 : ceil_div(rows, p.segment_tokens);
}

// The segment at a slot. Sequence by bisection: the last n whose first slot is <= `slot`.
template <class Params>
HW_HOST_DEVICE Segment locate(const Plan& p, const Params& params, int64_t slot) {
  const int64_t* cu = params.cu_seqlens.data;
  const int64_t stride = params.cu_seqlens.stride[0];
  int64_t n = slot / p.per_sequence;
  if (p.packed && p.schedule != Schedule::single) {
    int64_t low = 0, high = p.sequences;  // first_slot(low) <= slot < first_slot(high)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (first_slot(p, cu, stride, middle) <= slot ? low : high) = middle;
    }
    n = low;
  }
  const Sequence rows = sequence(params, n);
  Segment s;
  s.sequence = n;
  s.batch = rows.batch;
  s.sequence_begin = rows.begin;
  s.sequence_end = rows.end;
  s.index = slot - first_slot(p, cu, stride, n);
  s.used = s.index < segment_count(p, rows.end - rows.begin);
  s.begin = min_of(rows.begin + s.index * p.segment_tokens, rows.end);
  s.end = min_of(s.begin + p.segment_tokens, rows.end);
  return s;
}

// States of the segments of one direction: kv [slots, H, F, Dv] and z [slots, H, F], accumulation
// type, one behind the other.
struct StateLayout {
  int64_t slots = 0, heads = 0, features = 0, value_dim = 0;

  HW_HOST_DEVICE int64_t kv(int64_t slot, int64_t head, int64_t feature) const {
    return ((slot * heads + head) * features + feature) * value_dim;
  }
  HW_HOST_DEVICE int64_t z(int64_t slot, int64_t head) const {
    return slots * heads * features * value_dim + (slot * heads + head) * features;
  }
  HW_HOST_DEVICE int64_t size() const { return slots * heads * features * (value_dim + 1); }
};

inline StateLayout state_layout(const CallSizes& s, const Plan& p) {
  return {p.num_slots, s.key_heads, s.features, s.value_dim};
}

}  // namespace hw::linear_attention
