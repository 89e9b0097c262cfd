// SPDX-License-Identifier: Apache-2.0
// A key source that no operator has: sequences whose tokens lie in pages, in any order.
#pragma once

#include "softmax/key_source.h"

#include "core/macros.h"

namespace hw::test {

// The token of slot s is page[sequence, s / 16] 16 + s % 16: of rows in a batch entry of their own,
// of keys in one cache that all sequences share. Positions and results are in order.
struct PagedSource {
  static constexpr bool kGathers = true, kInOrder = true;
  static constexpr int64_t kPage = 16;
  using WorkItem = softmax::WorkItem;

  int64_t row_count, key_count;                // of every sequence
  Ref<const int32_t, 2> row_pages, key_pages;  // [sequences, pages of one]

  HW_HOST_DEVICE HW_INLINE WorkItem work_item(const softmax::ScoreParams& p, int64_t n,
                                              int head) const {
    const softmax::Sequence at{n, 0, row_count, 0, key_count};
    return {at, softmax::mask_of(p, at), head, head / p.group()};
  }
  HW_HOST_DEVICE HW_INLINE int64_t rows(const WorkItem&) const { return row_count; }
  HW_HOST_DEVICE HW_INLINE int64_t keys(const WorkItem&) const { return key_count; }
  HW_HOST_DEVICE HW_INLINE int row_entry(const WorkItem& w, int64_t slot) const {
    return row_pages(w.at.batch, slot / kPage);
  }
  HW_HOST_DEVICE HW_INLINE int key_entry(const WorkItem& w, int64_t slot) const {
    return key_pages(w.at.batch, slot / kPage);
  }
  HW_HOST_DEVICE HW_INLINE static int row_token(const WorkItem&, int64_t slot, int64_t page) {
    return static_cast<int>(page * kPage + slot % kPage);
  }
  HW_HOST_DEVICE HW_INLINE static int key_token(const WorkItem&, int64_t slot, int64_t page) {
    return static_cast<int>(page * kPage + slot % kPage);
  }
  HW_HOST_DEVICE HW_INLINE static int64_t row_position(const WorkItem&, int64_t slot, int64_t) {
    return slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_position(const WorkItem&, int64_t slot, int64_t) {
    return slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t row_result(const WorkItem&, int64_t slot, int64_t) {
    return slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_result(const WorkItem&, int64_t slot, int64_t) {
    return slot;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_batch(const WorkItem&) { return 0; }
  HW_HOST_DEVICE HW_INLINE static constexpr bool keys_in_order() { return true; }
};
static_assert(softmax::KeySource<PagedSource>);

}  // namespace hw::test
