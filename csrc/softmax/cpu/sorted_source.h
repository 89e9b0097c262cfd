// SPDX-License-Identifier: Apache-2.0
// What loops on the CPU ask of a source of rows and keys besides softmax/key_source.h: that it is
// sorted. A row slot sees an interval of key slots, and the ends of these intervals never decrease
// from row to row, as is so where positions never decrease from slot to slot. Every row slot has a
// token, every key slot a token or kZeroKey.
//
//   visible_keys(w, slot)      the key slots that a row slot sees
//   set_keys(w, slot)          those whose score with it a ScoreKind sets
//   row_slots(w, positions)    the row slots at these positions
//                              where slots are positions (kInOrder) all three are known
//   keys_adjacent(w)           whether the tokens of keys follow each other from that of slot 0 on,
//                              so that operands can be read where they lie; else they are gathered.
//                              Without kGathers they do
//
// Query heads that share a key head have the same keys, in the same slots, where loops keep sums of
// keys (Backward).
#pragma once

#include "softmax/key_source.h"
#include "softmax/score.h"

namespace hw::softmax {

template <class S>
concept SaysWhatIsSeen =
    requires(const S& s, const typename S::WorkItem& w, int64_t slot, const Range& positions) {
      { s.visible_keys(w, slot) } -> std::same_as<Range>;
      { s.set_keys(w, slot) } -> std::same_as<Range>;
      { s.row_slots(w, positions) } -> std::same_as<Range>;
    };

template <class S>
concept SaysWhereKeysLie = requires(const S& s, const typename S::WorkItem& w) {
  { s.keys_adjacent(w) } -> std::same_as<bool>;
};

template <class S>
concept SortedSource =
    KeySource<S> && (S::kInOrder || SaysWhatIsSeen<S>) && (!S::kGathers || SaysWhereKeysLie<S>);
static_assert(SortedSource<DenseSource>);

}  // namespace hw::softmax
