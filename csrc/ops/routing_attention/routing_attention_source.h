// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on CUDA: the key sources of the engine, for both
// backends (softmax/key_source.h says what it asks of one).
//
//   GroupSource   sequence n = b G + g: the rows of group g and its keys          forward, d_q
//   SpanSource    sequence n as above, or, by token and with listed keys, n = b T + t: span t of
//                 those who list a key region meets the region's tokens           d_k, d_v
//
// Slots of a span: listing l of it, row slot i of the group that lists  ->  l Wq + i.
//
// Positions are tokens. Symbols are those of routing_attention.h and
// routing_attention_simt_layout.h.
#pragma once

#include "ops/routing_attention/routing_attention_simt_layout.h"
#include "softmax/key_source.h"
#include "softmax/score.h"

namespace hw::routing_attention {

using softmax::kNoToken;
using softmax::kZeroKey;
using softmax::ScoreParams;

struct GroupSource {
  static constexpr bool kGathers = true, kInOrder = false;

  struct WorkItem : softmax::WorkItem {
    int group;                // g, or span t
    int region;               // of a span; -1: there is no such span
    int first_listing, list;  // of a span, in the lists of Regions
    int rows, keys;           // slots
  };

  Routing lists;
  int row_slots_of_list, key_slots_of_list;  // Wq, Wk
  int row_regions, key_regions;              // that there are

  template <class Params>  // of a call
  static GroupSource of(const Params& p) {
    return {p, static_cast<int>(p.max_q), static_cast<int>(p.max_k),
            static_cast<int>(p.rows.grid.count()), static_cast<int>(p.keys.grid.count())};
  }

  HW_HOST_DEVICE HW_INLINE WorkItem work_item(const ScoreParams& p, int64_t n, int head) const {
    const int64_t groups = lists.groups();
    WorkItem w = item_of(p, n / groups, head);
    w.group = static_cast<int>(n % groups);
    return w;
  }

  HW_HOST_DEVICE HW_INLINE static int rows(const WorkItem& w) { return w.rows; }
  HW_HOST_DEVICE HW_INLINE static int keys(const WorkItem& w) { return w.keys; }
  HW_HOST_DEVICE HW_INLINE int64_t row_entry(const WorkItem& w, int slot) const {
    return region(lists.rows, w, w.group, slot);
  }
  HW_HOST_DEVICE HW_INLINE int64_t key_entry(const WorkItem& w, int slot) const {
    return keys_in_order() ? slot : region(lists.keys, w, w.group, slot);
  }
  // A list's slots are whole regions: of a span too, where those of several lists follow each
  // other.
  HW_HOST_DEVICE HW_INLINE int row_token(const WorkItem&, int slot, int64_t entry) const {
    return token(lists.rows.grid, row_regions, slot, entry, kNoToken);
  }
  HW_HOST_DEVICE HW_INLINE int key_token(const WorkItem&, int slot, int64_t entry) const {
    if (keys_in_order()) return slot;
    return token(lists.keys.grid, key_regions, slot, entry, lists.pad_keys ? kZeroKey : kNoToken);
  }
  HW_HOST_DEVICE HW_INLINE static int row_position(const WorkItem&, int, int token) {
    return token;
  }
  HW_HOST_DEVICE HW_INLINE static int key_position(const WorkItem&, int, int token) {
    return token;
  }

  // By slot those without token have results too.
  HW_HOST_DEVICE HW_INLINE int64_t row_result(const WorkItem& w, int slot, int token) const {
    return lists.by_slot ? int64_t{w.group} * w.rows + slot : token;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_result(const WorkItem&, int, int token) {
    return token;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_batch(const WorkItem& w) { return w.at.batch; }
  HW_HOST_DEVICE HW_INLINE bool keys_in_order() const { return !lists.keys; }

 protected:
  // All but what says which group it is.
  HW_HOST_DEVICE HW_INLINE WorkItem item_of(const ScoreParams& p, int64_t batch, int head) const {
    WorkItem w{};
    w.at = {batch, 0, p.q.size[1], 0, p.k.size[1]};
    w.mask = softmax::mask_of(p, w.at);
    w.head = head, w.key_head = head / p.group();
    w.rows = row_slots_of_list, w.keys = key_slots_of_list;
    return w;
  }

  // Lists::token in two steps and in 32 bits, since divisions are dear; `count`: regions that there
  // are, `absent`: in place of a token.
  HW_HOST_DEVICE HW_INLINE static int64_t region(const Lists& l, const WorkItem& w, int group,
                                                 int slot) {
    const int size = static_cast<int>(l.grid.size());
    return l.entries(w.at.batch, w.head, group, size == 1 ? slot : slot / size);
  }
  HW_HOST_DEVICE HW_INLINE static int token(const RegionGrid& grid, int count, int slot,
                                            int64_t region, int absent) {
    if (region < 0 || region >= count) return absent;
    const int size = static_cast<int>(grid.size());
    return grid.token_in(static_cast<int>(region), slot % size, absent);
  }
};
static_assert(softmax::KeySource<GroupSource>);

struct SpanSource : GroupSource {
  Regions regions;
  bool by_span;
  bool keys_by_slot;  // results of keys are [B, G Wk] by slot, [B, T n] by span; else tokens
  int entries_of_list, region_size;  // N and n of the keys

  HW_HOST_DEVICE HW_INLINE WorkItem work_item(const ScoreParams& p, int64_t n, int head) const {
    if (!by_span) return GroupSource::work_item(p, n, head);
    WorkItem w = item_of(p, n / regions.spans, head);
    const int64_t span = n % regions.spans;
    w.list = static_cast<int>(regions.listed.list(w.at.batch, head));
    const Range listings = regions.listings(w.list, span);
    w.group = static_cast<int>(span);
    w.region = regions.regions_of(w.list)[span];
    w.first_listing = static_cast<int>(listings.begin);
    w.rows = static_cast<int>(listings.count()) * row_slots_of_list;
    w.keys = w.region < 0 ? 0 : region_size;
    return w;
  }

  HW_HOST_DEVICE HW_INLINE int64_t row_entry(const WorkItem& w, int slot) const {
    if (!by_span) return GroupSource::row_entry(w, slot);
    const int listing = w.first_listing + slot / row_slots_of_list;
    const int group = regions.listed.items_of(w.list)[listing] / entries_of_list;
    return region(lists.rows, w, group, slot % row_slots_of_list);
  }
  HW_HOST_DEVICE HW_INLINE int64_t key_entry(const WorkItem& w, int slot) const {
    return by_span ? w.region : GroupSource::key_entry(w, slot);
  }
  HW_HOST_DEVICE HW_INLINE int64_t key_result(const WorkItem& w, int slot, int token) const {
    return token < 0 || !keys_by_slot ? token : int64_t{w.group} * w.keys + slot;
  }
};
static_assert(softmax::KeySource<SpanSource>);

}  // namespace hw::routing_attention
