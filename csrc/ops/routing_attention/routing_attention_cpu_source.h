// SPDX-License-Identifier: Apache-2.0
// The key source of the engine on the CPU (softmax/cpu/sorted_source.h): rows of a list, and either
// all keys, in their order, or those of a group (_cpu_group.h).
//
// Positions are tokens.
#pragma once

#include <algorithm>

#include "ops/routing_attention/routing_attention.h"
#include "softmax/cpu/sorted_source.h"

namespace hw::routing_attention {
namespace {

using softmax::ScoreParams;

struct ListSource {
  static constexpr bool kGathers = true, kInOrder = false;

  struct WorkItem : softmax::WorkItem {
    int64_t rows, keys;
    const int64_t* row_tokens;  // [rows]
    // Of a group; null: results at the token, all keys
    const int64_t* results;    // [rows] where those of a row are
    const int64_t* key_list;   // [keys] tokens, or kZeroKey
    const Range *seen, *self;  // [rows] key slots that a row sees, that are the row itself
    bool copied;               // k and v are read at slots
  };

  // Of all query heads, for work_item().
  const int64_t *row_tokens = nullptr, *counts = nullptr;  // [B, Hq, most], increasing; [B, Hq]
  int64_t most = 0;
  int heads = 0;
  bool keys_listed = false;

  HW_INLINE const int64_t* rows_of(int64_t batch, int head) const {
    return row_tokens + (batch * heads + head) * most;
  }
  HW_INLINE int64_t count(int64_t batch, int head) const { return counts[batch * heads + head]; }

  HW_INLINE WorkItem work_item(const ScoreParams& p, int64_t batch, int head) const {
    const softmax::Sequence at = softmax::sequence(p, batch);
    return {{at, softmax::mask_of(p, at), head, head / p.group()},
            count(batch, head),
            at.k_count,
            rows_of(batch, head),
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            false};
  }

  HW_INLINE static int64_t rows(const WorkItem& w) { return w.rows; }
  HW_INLINE static int64_t keys(const WorkItem& w) { return w.keys; }
  HW_INLINE static int64_t row_entry(const WorkItem& w, int64_t slot) { return w.row_tokens[slot]; }
  HW_INLINE static int64_t key_entry(const WorkItem& w, int64_t slot) {
    return w.key_list != nullptr ? w.key_list[slot] : slot;
  }
  HW_INLINE static int64_t row_token(const WorkItem&, int64_t, int64_t entry) { return entry; }
  HW_INLINE static int64_t key_token(const WorkItem& w, int64_t slot, int64_t entry) {
    return w.copied ? slot : entry;
  }
  HW_INLINE static int64_t row_position(const WorkItem&, int64_t, int64_t token) { return token; }
  HW_INLINE static int64_t key_position(const WorkItem& w, int64_t slot, int64_t) {
    return key_entry(w, slot);
  }
  HW_INLINE static int64_t row_result(const WorkItem& w, int64_t slot, int64_t token) {
    return w.results != nullptr ? w.results[slot] : token;
  }
  HW_INLINE static int64_t key_result(const WorkItem& w, int64_t slot, int64_t) {
    return key_entry(w, slot);
  }
  HW_INLINE static int64_t key_batch(const WorkItem& w) { return w.at.batch; }
  HW_INLINE bool keys_in_order() const { return !keys_listed; }

  HW_INLINE static bool keys_adjacent(const WorkItem& w) {
    return w.copied || w.key_list == nullptr;
  }
  HW_INLINE static Range visible_keys(const WorkItem& w, int64_t slot) {
    return w.seen != nullptr ? w.seen[slot] : w.mask.visible_keys(w.row_tokens[slot]);
  }
  HW_INLINE static Range set_keys(const WorkItem& w, int64_t slot) {
    if (w.self != nullptr) return w.self[slot];
    const int64_t self = w.mask.diagonal(w.row_tokens[slot]);
    return self < 0 ? Range{0, 0} : Range{self, self + 1};
  }
  HW_NOINLINE static Range row_slots(const WorkItem& w, const Range& positions) {
    const int64_t *first = w.row_tokens, *last = first + w.rows;
    return {std::lower_bound(first, last, positions.begin) - first,
            std::lower_bound(first, last, positions.end) - first};
  }
};
static_assert(softmax::SortedSource<ListSource>);

// Scores, and how they are told whether a token's score with itself is set.
using ListScore = SelfScore<softmax::FullScore>;

HW_INLINE ListScore score_of(const Routing& r) { return {{}, r.mask_self}; }

}  // namespace
}  // namespace hw::routing_attention
