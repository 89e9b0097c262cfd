// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys without tensor cores: where rows and keys lie, for the
// loops of softmax/simt.
//
// A sequence of the engine is one of
//
//   group   rows: the list of rows of group g; keys: its list of keys, or all keys
//   span    rows: the lists of rows of the groups that list key region r, those of one span, one
//           after another; keys: the tokens of r                  (d_k, d_v where keys are listed)
//
// whose lists are of the query head that is at work. The tile keeps the tokens of its slots in
// shared memory, so that what is here runs once per slot of a tile, and integer divisions are few.
#pragma once

#include "ops/routing_attention/routing_attention_simt_layout.h"
#include "softmax/simt/tile.cuh"

namespace hw::routing_attention {

// Backward parameters of the engine's kernels.
struct ListedBackwardParams : BackwardParams {
  Regions regions;
  bool by_spans;  // sequences are spans
};

struct Listed {
  static constexpr bool kListed = true;
  static constexpr double kFixedScore = kSelfScore;
  using ForwardParams = routing_attention::ForwardParams;
  using BackwardParams = ListedBackwardParams;

  const Routing* routing;
  const Regions* regions;  // null: the sequence is a group
  Mask mask;               // of tokens
  int64_t batch_, place;   // place: group, or span
  const int32_t* items;    // span: the listings of the region, g N + n
  int32_t count, region, head;

  HW_DEVICE HW_INLINE static Listed of(const ForwardParams& p, int64_t n) {
    return at(p, n, p.groups(), nullptr);
  }
  HW_DEVICE HW_INLINE static Listed of(const BackwardParams& p, int64_t n) {
    if (p.by_spans) return at(p, n, p.regions.spans, &p.regions);
    return at(p, n, p.groups(), nullptr);
  }

  // Goes to a query head.
  HW_DEVICE HW_INLINE void enter(int query_head) {
    head = query_head;
    if (!regions) return;
    const int64_t list = regions->listed.list(batch_, head);
    const Range listings = regions->listings(list, place);
    items = regions->listed.items_of(list) + listings.begin;
    count = static_cast<int32_t>(listings.count());
    region = regions->regions_of(list)[place];
  }

  HW_DEVICE HW_INLINE int64_t batch() const { return batch_; }
  HW_DEVICE HW_INLINE bool by_slot() const { return routing->by_slot; }
  HW_DEVICE HW_INLINE int64_t rows() const { return (regions ? count : 1) * routing->rows.slots(); }
  HW_DEVICE HW_INLINE int64_t keys() const {
    if (regions) return routing->keys.cells.size();
    return routing->keys ? routing->keys.slots() : mask.keys;
  }

  // Token of row slot i, of key slot j; -1 where there is none.
  HW_DEVICE HW_INLINE int64_t row(int64_t i) const {
    if (!regions) return token(routing->rows, place, i);
    const int64_t slots = routing->rows.slots();
    const int64_t group = items[i / slots] / routing->keys.blocks.size[3];
    return token(routing->rows, group, i % slots);
  }
  HW_DEVICE HW_INLINE int64_t key(int64_t j) const {
    if (regions) return routing->keys.cells.token(region, j);
    return routing->keys ? token(routing->keys, place, j) : j;
  }

  // Results by slot are in the order of groups and their slots; those of spans likewise.
  HW_DEVICE HW_INLINE int64_t row_result(int64_t i, int64_t token) const {
    return by_slot() ? place * routing->rows.slots() + i : token;
  }
  HW_DEVICE HW_INLINE int64_t key_result(int64_t j, int64_t token) const {
    return regions || by_slot() ? place * keys() + j : token;
  }

  // Lists are in any order: tiles are looked at one by one.
  HW_DEVICE HW_INLINE Range keys_of(const Range&) const { return {0, keys()}; }
  HW_DEVICE HW_INLINE Range rows_of(const Range&) const { return {0, rows()}; }
  HW_DEVICE HW_INLINE int64_t seen(int64_t, int64_t token) const {
    return mask.visible_keys(token).count();
  }

  // Row i and key j by token; -1: a slot without one, which as a key may be seen, -2: no slot.
  HW_DEVICE HW_INLINE bool tokens_meet(int64_t i, int64_t j) const {
    if (i < 0) return false;
    if (j < 0) return j == -1 && routing->pad_keys;
    const int64_t at = mask.diagonal(i);
    return (mask.left < 0 || j >= at - mask.left) && (mask.right < 0 || j <= at + mask.right);
  }
  HW_DEVICE HW_INLINE bool is_fixed(int64_t i, int64_t j) const {
    return routing->mask_self && j == mask.diagonal(i);
  }

 private:
  template <class Params>
  HW_DEVICE HW_INLINE static Listed at(const Params& p, int64_t n, int64_t places,
                                       const Regions* regions) {
    const int64_t b = n / places;
    const Mask mask = mask_of(p, {b, 0, p.q.size[1], 0, p.k.size[1]});
    return {&p, regions, mask, b, n % places, nullptr, 0, -1, 0};
  }

  HW_DEVICE HW_INLINE int64_t token(const Lists& lists, int64_t group, int64_t slot) const {
    return lists.token(batch_, head, group, slot);
  }
};

}  // namespace hw::routing_attention
