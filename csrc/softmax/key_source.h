// SPDX-License-Identifier: Apache-2.0
// Where rows and keys come from: the first of the three axes of a loop, whose others are what a
// score is (softmax/score.h) and how the work is cut (layout.h of a backend). Loops R, R2 and C of
// every backend take any of each; identity_mix, the gradient of a bias that is broadcast, and
// single pairs are of sources in their order.
//
// A loop works on work items: a query head of one of the sequences that the source has. Each of its
// two sides, rows and keys, has slots 0, 1, .. n - 1, and a slot
//
//   token      where its row of q, k, v is on the axis S of the tensor; or kZeroKey: a key and
//              value of zeros that every row sees; or kNoToken: nobody sees it
//   position   what masks, biases and score functors call i and j. Numbers of keys and rows (bias,
//              key_bias, key_gain, row_temperature, gates) are at begin + position, data at the
//              token
//   result     where its results are on the axis S of the outputs, whether it has a token or not;
//              negative: nowhere. Of rows o, w, statistics, read-outs, d_q, d_row_temperature, of
//              keys d_k and d_v; gradients and sums of numbers of keys are where numbers are
//
//                    token            position    result
//   DenseSource      begin + slot     slot        begin + slot      a sequence in its order
//   lists            of a list        token       token, or slot    ops/routing_attention
//   windows          by arithmetic    slot        token             ops/window_attention
//   pages            of a table       slot        slot              tests/emu/sources.cuh
//
// On CUDA a tile of slots is loaded by a stream of addresses, or where the source gathers by the
// tokens of its slots, which are looked up a tile ahead. On the CPU (softmax/cpu/sorted_source.h)
// positions never decrease from slot to slot, so that a row sees an interval of slots.
#pragma once

#include <concepts>

#include "softmax/mask.h"
#include "softmax/params.h"

namespace hw::softmax {

// In place of a token.
inline constexpr int kZeroKey = -1, kNoToken = -2;

// What a loop works on; sources may add to it. The mask is one of positions.
struct WorkItem {
  Sequence at;
  Mask mask;
  int head, key_head;  // of the queries, of the keys
};

// Two steps to a token, so that the first, which waits for memory, can be taken ahead of time:
// entry(slot) what a list has for the slot, token(slot, entry) what follows from it.
template <class S>
concept KeySource =
    requires(const S& s, const ScoreParams& p, const typename S::WorkItem& w, int64_t n, int slot) {
      requires std::derived_from<typename S::WorkItem, WorkItem>;
      // Whether tokens are looked up (32 bits each); else they are begin + slot.
      { S::kGathers } -> std::convertible_to<bool>;
      // Whether the position of a slot is its number, on both sides.
      { S::kInOrder } -> std::convertible_to<bool>;
      { s.work_item(p, n, slot) } -> std::same_as<typename S::WorkItem>;  // of sequence n, a head
      { s.rows(w) } -> std::integral;
      { s.keys(w) } -> std::integral;
      { s.row_entry(w, slot) } -> std::integral;
      { s.key_entry(w, slot) } -> std::integral;
      { s.row_token(w, slot, n) } -> std::integral;
      { s.key_token(w, slot, n) } -> std::integral;
      { s.row_position(w, slot, slot) } -> std::integral;
      { s.key_position(w, slot, slot) } -> std::integral;
      { s.row_result(w, slot, slot) } -> std::integral;
      { s.key_result(w, slot, slot) } -> std::integral;
      // The batch entry of k and v.
      { s.key_batch(w) } -> std::integral;
      // Whether positions of keys are slots, of this call, and none is a zero key: then what a row
      // sees is a range of slots.
      { s.keys_in_order() } -> std::same_as<bool>;
    };

// Rows and keys of a sequence, in their order.
struct DenseSource {
  static constexpr bool kGathers = false, kInOrder = true;
  using WorkItem = softmax::WorkItem;

  HW_HOST_DEVICE HW_INLINE static WorkItem work_item(const ScoreParams& p, int64_t n, int head) {
    const Sequence at = sequence(p, n);
    return {at, mask_of(p, at), head, head / p.group()};
  }
  HW_HOST_DEVICE HW_INLINE static int64_t rows(const WorkItem& w) { return w.at.q_count; }
  HW_HOST_DEVICE HW_INLINE static int64_t keys(const WorkItem& w) { return w.at.k_count; }
  HW_HOST_DEVICE HW_INLINE static int64_t row_entry(const WorkItem&, int64_t slot) { return slot; }
  HW_HOST_DEVICE HW_INLINE static int64_t key_entry(const WorkItem&, int64_t slot) { return slot; }
  HW_HOST_DEVICE HW_INLINE static int64_t row_token(const WorkItem& w, int64_t slot, int64_t) {
    return w.at.q_begin + slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_token(const WorkItem& w, int64_t slot, int64_t) {
    return w.at.k_begin + slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t row_position(const WorkItem&, int64_t slot, int64_t) {
    return slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_position(const WorkItem&, int64_t slot, int64_t) {
    return slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t row_result(const WorkItem& w, int64_t slot, int64_t) {
    return w.at.q_begin + slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_result(const WorkItem& w, int64_t slot, int64_t) {
    return w.at.k_begin + slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_batch(const WorkItem& w) { return w.at.batch; }
  HW_HOST_DEVICE HW_INLINE static constexpr bool keys_in_order() { return true; }
};
static_assert(KeySource<DenseSource>);

}  // namespace hw::softmax
