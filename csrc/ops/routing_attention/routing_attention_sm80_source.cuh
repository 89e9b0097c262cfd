// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on tensor cores: the key sources of the engine of
// softmax/sm80 (its lists.cuh says what it asks of one).
//
//   Listed      task n = b G + g: the rows of group g and its keys            forward, d_q
//   ListedKeys  task n as above, or, by token and with listed keys, n = b T + t: span t of those
//               who list a key region meets the region's tokens               d_k, d_v
//
// Slots of a span: listing l of it, row slot i of the group that lists  ->  l Wq + i.
//
// Symbols are those of routing_attention.h and routing_attention_simt_layout.h.
#pragma once

#include "ops/routing_attention/routing_attention_sm80_layout.h"
#include "softmax/sm80/score.cuh"

#include "core/gpu/device.cuh"

namespace hw::routing_attention::sm80 {

using softmax::ScoreParams;
using softmax::sm80::kNoToken;

template <int kOwn>
struct Listed {
  static constexpr bool kListed = true;
  static constexpr float kSelfScore = static_cast<float>(routing_attention::kSelfScore);
  template <int kDim>
  using ForwardTiles = sm80::ForwardTiles<kOwn, kDim>;
  using LoopTiles = sm80::LoopTiles<kOwn>;

  struct WorkItem : softmax::sm80::WorkItem {
    int group;                // g, or span t
    int region;               // of a span; -1: there is no such span
    int first_listing, list;  // of a span, in the lists of Regions
    int rows, keys;           // slots
  };

  Routing lists;
  int row_slots_of_list, key_slots_of_list;  // Wq, Wk
  int row_cells, key_cells;                  // that there are
  Output<float> row_sums;                    // [B, G Wq, Hq, D]  by slot

  HW_DEVICE HW_INLINE WorkItem work_item(const ScoreParams& p, int64_t n, int head) const {
    const int64_t groups = lists.groups();
    WorkItem w = place_in(p, n / groups, head);
    w.group = static_cast<int>(n % groups);
    return w;
  }

  HW_DEVICE HW_INLINE int row_slots(const WorkItem& w) const { return w.rows; }
  HW_DEVICE HW_INLINE int key_slots(const WorkItem& w) const { return w.keys; }
  HW_DEVICE HW_INLINE int64_t listed_row(const WorkItem& w, int slot) const {
    return block(lists.rows, w, w.group, slot);
  }
  // A list's slots are whole cells: of a span too, where slots of several lists follow each other.
  HW_DEVICE HW_INLINE int row_token(const WorkItem&, int slot, int64_t listed) const {
    return token(lists.rows.cells, row_cells, slot, listed);
  }
  HW_DEVICE HW_INLINE int64_t listed_key(const WorkItem& w, int slot) const {
    return keys_in_order() ? slot : block(lists.keys, w, w.group, slot);
  }
  HW_DEVICE HW_INLINE int key_token(const WorkItem&, int slot, int64_t listed) const {
    return keys_in_order() ? slot : token(lists.keys.cells, key_cells, slot, listed);
  }

  HW_DEVICE HW_INLINE int64_t result_row(const WorkItem& w, int slot, int token) const {
    if (!lists.by_slot) return token;
    return slot < w.rows ? int64_t{w.group} * w.rows + slot : -1;
  }
  HW_DEVICE HW_INLINE int64_t first_result(const WorkItem& w, int slot) const {
    return lists.by_slot ? int64_t{w.group} * w.rows + slot : -1;
  }

  HW_DEVICE HW_INLINE bool keys_in_order() const { return !lists.keys; }
  HW_DEVICE HW_INLINE bool pad_keys() const { return lists.pad_keys; }
  HW_DEVICE HW_INLINE bool mask_self() const { return lists.mask_self; }

 protected:
  // All but what says which group it is.
  HW_DEVICE HW_INLINE WorkItem place_in(const ScoreParams& p, int64_t batch, int head) const {
    WorkItem w{};
    w.at = softmax::sequence(p, batch);
    w.mask = softmax::mask_of(p, w.at);
    w.head = head, w.key_head = head / p.group();
    w.rows = row_slots_of_list, w.keys = key_slots_of_list;
    return w;
  }

  // Lists::token in two steps and in 32 bits, since divisions are dear; `count`: cells that there
  // are.
  HW_DEVICE HW_INLINE static int64_t block(const Lists& l, const WorkItem& w, int group, int slot) {
    const Ref<const int64_t, 4>& blocks = l.blocks;
    const int size = static_cast<int>(l.cells.size());
    return blocks(w.at.batch, w.head, group, size == 1 ? slot : slot / size);
  }
  HW_DEVICE HW_INLINE static int token(const RegionGrid& c, int count, int slot, int64_t block) {
    if (block < 0 || block >= count) return kNoToken;
    const int size = static_cast<int>(c.size()), cell = static_cast<int>(block);
    if (size == 1) return cell;
    const int at = slot % size, cells = static_cast<int>(c.columns);
    const int width = static_cast<int>(c.width), columns = static_cast<int>(c.columns_of_image);
    const int y = cell / cells * static_cast<int>(c.height) + at / width;
    const int x = cell % cells * width + at % width;
    return y < static_cast<int>(c.rows_of_image) && x < columns ? y * columns + x : kNoToken;
  }
};

template <int kOwn>
struct ListedKeys : Listed<kOwn> {
  using Base = Listed<kOwn>;
  using Base::lists, Base::row_slots_of_list;
  using typename Base::WorkItem;

  Regions regions;
  bool by_span;
  int blocks_of_list, cell;  // N and n of the keys
  // [B, G Wk, Hq, D | Dv] by slot, [B, T n, Hq, D | Dv] by span
  Output<float> key_sums, value_sums;

  HW_DEVICE HW_INLINE WorkItem work_item(const ScoreParams& p, int64_t n, int head) const {
    if (!by_span) return Base::work_item(p, n, head);
    WorkItem w = Base::place_in(p, n / regions.spans, head);
    const int64_t span = n % regions.spans;
    w.list = static_cast<int>(regions.listed.list(w.at.batch, head));
    const Range listings = regions.listings(w.list, span);
    w.group = static_cast<int>(span);
    w.region = regions.regions_of(w.list)[span];
    w.first_listing = static_cast<int>(listings.begin);
    w.rows = static_cast<int>(listings.count()) * row_slots_of_list;
    w.keys = w.region < 0 ? 0 : cell;
    return w;
  }

  HW_DEVICE HW_INLINE int64_t listed_row(const WorkItem& w, int slot) const {
    if (!by_span) return Base::listed_row(w, slot);
    const int listing = w.first_listing + slot / row_slots_of_list;
    const int group = regions.listed.items_of(w.list)[listing] / blocks_of_list;
    return Base::block(lists.rows, w, group, slot % row_slots_of_list);
  }
  HW_DEVICE HW_INLINE int64_t listed_key(const WorkItem& w, int slot) const {
    return by_span ? w.region : Base::listed_key(w, slot);
  }

  HW_DEVICE HW_INLINE int64_t result_key(const WorkItem& w, int slot, int token) const {
    if (token < 0 || !key_sums.ref) return token;
    return int64_t{w.group} * w.keys + slot;
  }

  // Fed by lists, keys have results of their own for each query head.
  HW_DEVICE HW_INLINE int key_owners(const ScoreParams& p) const {
    return key_sums.ref ? p.query_heads() : p.key_heads();
  }
  HW_DEVICE HW_INLINE int heads_of_owner(const ScoreParams& p) const {
    return key_sums.ref ? 1 : p.group();
  }
};

}  // namespace hw::routing_attention::sm80
