// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: rows and keys that are not a sequence's in their order, but listed.
//
// Kernels take what they work on from a KeySource. DenseSource is that of attention itself: rows
// first, first + 1, .. of a sequence meet keys 0, 1, .. of it. A listed one has, on either side,
// slots; a slot holds a token or none. A tile is kCount slots from one of them on:
//
//   tokens    in shared memory, filled a tile ahead of the copies that need them: three tiles of
//             the other side, and one barrier more per walk than two stages of dense rows have
//   loads     row i is that of token[i], zeros without one
//   masks     by tokens; lists are in any order. What a whole tile can meet is decided by the least
//             and the largest token of every 16 slots (Extent): tiles that nobody sees are not even
//             loaded, tiles that everybody sees entirely are not masked
//
// A listed KeySource has, besides kListed = true,
//
//   ForwardTiles, LoopTiles              as those of sm80/layout.h
//   WorkItem, work_item(p, n, head)      of task n, with what the following need
//   row_slots(item), key_slots(item)     slots of either side
//   listed_row(item, slot)               what the list has for a slot, listed_key of a key
//   row_token(item, slot, listed)        its token, key_token of a key; kNoToken where it has none
//   result_row(item, slot, token)        where results of a row are, result_key of a key; negative:
//                                        nowhere
//   first_result(item, slot)             Slots::results from a row on
//   row_sums, key_sums, value_sums       fp32 [B, results, Hq, D | Dv]: what d_q, d_k and d_v are
//                                        made from by the caller; absent: they are written
//   key_owners, heads_of_owner           as those of DenseSource
//   keys_in_order()                      slot = token for keys, none is beyond them
//   pad_keys(), mask_self(), kSelfScore  as routing_attention.h has them
#pragma once

#include <climits>

#include "softmax/mask.h"
#include "softmax/params.h"

#include "core/gpu/tile.cuh"

namespace hw::softmax::sm80 {

// What a block works on: a head of a sequence.
struct WorkItem {
  Sequence at;
  Mask mask;
  int head, key_head;  // of the queries, of the keys
};

// In place of tokens: a slot without one, a slot beyond the list, what no slot holds.
inline constexpr int kNoToken = -1, kBeyond = -2, kNever = -3;

// Tokens of some slots: the least, the largest (negative: there are none), and whether all have
// one.
struct Extent {
  int low = INT_MAX, high = kBeyond;
  bool full = true;

  HW_DEVICE HW_INLINE bool none() const { return high < 0; }
  HW_DEVICE HW_INLINE Range range() const { return {low, int64_t{high} + 1}; }
};

// Of 16 kParts slots.
template <int kParts>
HW_DEVICE HW_INLINE Extent merged(const Extent* parts) {
  Extent all;
  HW_UNROLL
  for (int i = 0; i < kParts; ++i) {
    all.low = min_of(all.low, parts[i].low);
    all.high = max_of(all.high, parts[i].high);
    all.full &= parts[i].full;
  }
  return all;
}

// Whether a row of `rows` may see a key of `keys`.
HW_DEVICE HW_INLINE bool may_meet(const Mask& mask, const Extent& rows, const Extent& keys,
                                  bool pad_keys) {
  if (rows.none()) return false;
  if (pad_keys && !keys.full) return true;
  if (keys.none()) return false;
  const Range seen = mask.keys_of(rows.range());
  return seen.begin <= keys.high && seen.end > keys.low;
}

// Whether all rows of `rows` see all keys of `keys`, none of them (mask_self) itself.
HW_DEVICE HW_INLINE bool all_meet(const Mask& mask, const Extent& rows, const Extent& keys,
                                  bool mask_self) {
  if (!rows.full || !keys.full || !mask.whole(rows.range(), keys.range())) return false;
  return !mask_self || mask.diagonal(rows.high) < keys.low || mask.diagonal(rows.low) > keys.high;
}

// Tokens of kCount slots, in shared memory.
template <int kCount>
struct Tokens {
  static constexpr int kParts = kCount / 16;
  static_assert(kCount % 16 == 0, "whole strips");
  int at[kCount];
  Extent parts[kParts];

  HW_DEVICE HW_INLINE Extent extent() const { return merged<kParts>(parts); }
};

// What a thread reads of the lists for the tokens of kCount slots from `first` on, asked for before
// it starts the copies of another tile, so that it does not wait. SlotList: of(slot) what a list
// has for a slot, token(slot, listed) the token that follows from it, `slots` that there are.
template <int kThreads, int kCount, class SlotList>
struct TokenPrefetch {
  static_assert(kCount <= kThreads, "a slot per thread");
  const SlotList& list;
  int first;
  int64_t listed;

  HW_DEVICE HW_INLINE TokenPrefetch(const SlotList& from, int first_slot)
      : list(from), first(first_slot) {
    listed = exists() ? list.of(first + dev::thread_index()) : kNoToken;
  }
  // Writes the tokens. Whole block; they are visible behind the next barrier.
  HW_DEVICE HW_INLINE void fill(Tokens<kCount>& to) const {
    const int i = dev::thread_index();
    if (i - dev::lane() >= kCount) return;  // the same for a warp
    const int token = exists() ? list.token(first + i, listed) : kBeyond;
    const int high = dev::warp_max<16>(token);
    const int low = -dev::warp_max<16>(token < 0 ? -INT_MAX : -token);
    const uint32_t holes = dev::ballot(token < 0) >> (dev::lane() & 16) & 0xffff;
    if (i >= kCount) return;
    to.at[i] = token;
    if (i % 16 == 0) to.parts[i / 16] = {low, high, holes == 0};
  }

 private:
  HW_DEVICE HW_INLINE bool exists() const {
    return dev::thread_index() < kCount && first + dev::thread_index() < list.slots;
  }
};

// The slots of rows, or of keys, of a work item.
template <class KeySource, bool kKeySide>
struct SlotList {
  const KeySource& source;
  const typename KeySource::WorkItem& item;
  int slots;

  HW_DEVICE HW_INLINE SlotList(const KeySource& f, const typename KeySource::WorkItem& w)
      : source(f), item(w), slots(kKeySide ? f.key_slots(w) : f.row_slots(w)) {}
  HW_DEVICE HW_INLINE int64_t of(int slot) const {
    return kKeySide ? source.listed_key(item, slot) : source.listed_row(item, slot);
  }
  HW_DEVICE HW_INLINE int token(int slot, int64_t listed) const {
    return kKeySide ? source.key_token(item, slot, listed) : source.row_token(item, slot, listed);
  }
};

// What a block keeps of its lists in shared memory; the other side's tile t is in other[t % 3].
template <int kOwn, int kOther>
struct ListedTiles {
  Tokens<kOwn> own;
  Tokens<kOther> other[3];
};

// Some slots, as loads take them.
struct Slots {
  const int* token;      // in shared memory
  int64_t results = -1;  // row of the first one's results; negative: results are at tokens
};

// Rows of a tensor [B, S, heads, columns].
template <class Element>
HW_DEVICE HW_INLINE ListedRows<Element> listed_rows(const Input<Element>& x, const WorkItem& w,
                                                    int head, const Slots& slots) {
  ListedRows<Element> rows;
  rows.origin = x.ref.at(w.at.batch, 0, head);
  rows.row = x.ref.stride[1];
  rows.column = x.ref.stride[3];
  rows.token = slots.token;
  rows.columns = static_cast<int>(x.ref.size[3]);
  rows.aligned = x.aligned;
  rows.whole = x.whole;
  return rows;
}
template <class Element>
HW_DEVICE HW_INLINE ListedRows<Element> query_rows(const Input<Element>& x, const WorkItem& w,
                                                   const Slots& slots) {
  return listed_rows(x, w, w.head, slots);
}
template <class Element>
HW_DEVICE HW_INLINE ListedRows<Element> key_rows(const Input<Element>& x, const WorkItem& w,
                                                 const Slots& slots) {
  return listed_rows(x, w, w.key_head, slots);
}

// Numbers [B, Hq, S] (acc) of kCount keys; of queries, where they may be by slot.
template <int kCount, int kThreads>
HW_DEVICE HW_INLINE void key_numbers(float* to, const Ref<const void, 3>& x, const WorkItem& w,
                                     const Slots& slots) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers_at<kCount, kThreads>(to, from.at(w.at.batch, w.head), from.stride[2],
                                    [&](int i) { return slots.token[i]; });
}
template <int kCount, int kThreads, int kPitch>
HW_DEVICE HW_INLINE void query_numbers(float* to, const Ref<const void, 3>& x, const WorkItem& w,
                                       const Slots& slots) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers_at<kCount, kThreads, kPitch>(
      to, from.at(w.at.batch, w.head), from.stride[2], [&](int i) -> int64_t {
        const int token = slots.token[i];
        return token < 0 || slots.results < 0 ? token : slots.results + i;
      });
}
// The same of [B, Sq, Hq], by token.
template <int kCount, int kThreads>
HW_DEVICE HW_INLINE void temperatures(float* to, const Ref<const void, 3>& x, const WorkItem& w,
                                      const Slots& slots) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers_at<kCount, kThreads>(to, from.at(w.at.batch, 0, w.head), from.stride[1],
                                    [&](int i) { return slots.token[i]; });
}

}  // namespace hw::softmax::sm80
