// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: tiles of slots whose tokens are looked up (KeySource::kGathers).
//
//   tokens    in shared memory, filled a tile ahead of the copies that need them: three tiles of
//             the other side, and one barrier more per walk than two stages of dense rows have
//   loads     row i is that of token[i], zeros without one
//   masks     by positions, which are in any order. What a whole tile can meet is decided by the
//             least and the largest position of every 16 slots (Extent): tiles that nobody sees are
//             not even loaded, tiles that everybody sees entirely are not masked
#pragma once

#include <climits>

#include "softmax/key_source.h"
#include "softmax/score.h"

#include "core/gpu/tile.cuh"

namespace hw::softmax::sm80 {

// In place of a position: what no slot has.
inline constexpr int kNever = -3;
static_assert(kNever < kNoToken && kNoToken < kZeroKey && kZeroKey < 0);

// Positions of some slots: the least, the largest (negative: there are none); slots without token
// and zero keys among them, a bit each. Of the size that one load reads.
struct alignas(16) Extent {
  int low = INT_MAX, high = kNoToken;
  uint32_t holes = 0, zero_keys = 0;

  HW_DEVICE HW_INLINE bool none() const { return high < 0; }
  HW_DEVICE HW_INLINE bool full() const { return holes == 0; }
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
    all.holes |= parts[i].holes;
    all.zero_keys |= parts[i].zero_keys;
  }
  return all;
}

// Whether a row of `rows` may see a key of `keys`.
HW_DEVICE HW_INLINE bool may_meet(const Mask& mask, const Extent& rows, const Extent& keys) {
  if (rows.none()) return false;
  if (keys.zero_keys != 0) return true;
  if (keys.none()) return false;
  const Range seen = mask.keys_of(rows.range());
  return seen.begin <= keys.high && seen.end > keys.low;
}

// Whether all rows of `rows` see all keys of `keys`, and no score is set.
template <class Kind>
HW_DEVICE HW_INLINE bool all_meet(const Mask& mask, const Extent& rows, const Extent& keys,
                                  const Kind& kind) {
  if (!rows.full() || !keys.full() || !mask.whole(rows.range(), keys.range())) return false;
  if constexpr (Kind::kSets)
    return !kind.sets() || kind.set_key(mask, rows.high) < keys.low ||
           kind.set_key(mask, rows.low) > keys.high;
  return true;
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
// it starts the copies of another tile, so that it does not wait.
template <int kThreads, int kCount, class SlotList>
struct TokenPrefetch {
  static_assert(kCount <= kThreads, "a slot per thread");
  const SlotList& list;
  int first;
  int64_t entry;

  HW_DEVICE HW_INLINE TokenPrefetch(const SlotList& from, int first_slot)
      : list(from), first(first_slot) {
    entry = exists() ? list.entry(first + dev::thread_index()) : kNoToken;
  }
  // Writes the tokens. Whole block; they are visible behind the next barrier.
  HW_DEVICE HW_INLINE void fill(Tokens<kCount>& to) const {
    const int i = dev::thread_index();
    if (i - dev::lane() >= kCount) return;  // the same for a warp
    const int token = exists() ? list.token(first + i, entry) : kNoToken;
    const int position = token < 0 ? token : list.position(first + i, token);
    const int high = dev::warp_max<16>(position);
    const int low = -dev::warp_max<16>(position < 0 ? -INT_MAX : -position);
    const int half = dev::lane() & 16;  // 16 lanes have their slots in common
    const uint32_t holes = dev::ballot(token < 0) >> half & 0xffff;
    const uint32_t zeros = dev::ballot(token == kZeroKey) >> half & 0xffff;
    if (i >= kCount) return;
    to.at[i] = token;
    if (i % 16 == 0) to.parts[i / 16] = {low, high, holes, zeros};
  }

 private:
  HW_DEVICE HW_INLINE bool exists() const {
    return dev::thread_index() < kCount && first + dev::thread_index() < list.slots;
  }
};

// The slots of rows, or of keys, of a work item.
template <KeySource Source, bool kKeySide>
struct SlotList {
  const Source& source;
  const typename Source::WorkItem& item;
  int slots;

  HW_DEVICE HW_INLINE SlotList(const Source& s, const typename Source::WorkItem& w)
      : source(s), item(w), slots(static_cast<int>(kKeySide ? s.keys(w) : s.rows(w))) {}
  HW_DEVICE HW_INLINE int64_t entry(int slot) const {
    return kKeySide ? source.key_entry(item, slot) : source.row_entry(item, slot);
  }
  HW_DEVICE HW_INLINE int token(int slot, int64_t entry) const {
    return static_cast<int>(kKeySide ? source.key_token(item, slot, entry)
                                     : source.row_token(item, slot, entry));
  }
  HW_DEVICE HW_INLINE int position(int slot, int token) const {
    return static_cast<int>(kKeySide ? source.key_position(item, slot, token)
                                     : source.row_position(item, slot, token));
  }
};

// What a block keeps of its slots in shared memory; the other side's tile t is in other[t % 3].
template <int kOwn, int kOther>
struct GatheredTiles {
  Tokens<kOwn> own;
  Tokens<kOther> other[3];
};

// Some slots, as loads take them.
struct Slots {
  const int* token;  // in shared memory
  int first;
};

// Rows of a tensor [B, S, heads, columns].
template <class Element>
HW_DEVICE HW_INLINE ListedRows<Element> listed_rows(const Input<Element>& x, int64_t batch,
                                                    int head, const Slots& slots) {
  ListedRows<Element> rows;
  rows.origin = x.ref.at(batch, 0, head);
  rows.row = x.ref.stride[1];
  rows.column = x.ref.stride[3];
  rows.token = slots.token;
  rows.columns = static_cast<int>(x.ref.size[3]);
  rows.aligned = x.aligned;
  rows.whole = x.whole;
  return rows;
}
template <class Element, KeySource Source>
HW_DEVICE HW_INLINE ListedRows<Element> query_rows(const Input<Element>& x, const Source&,
                                                   const WorkItem& w, const Slots& slots) {
  return listed_rows(x, w.at.batch, w.head, slots);
}
template <class Element, KeySource Source>
HW_DEVICE HW_INLINE ListedRows<Element> key_rows(const Input<Element>& x, const Source& source,
                                                 const typename Source::WorkItem& w,
                                                 const Slots& slots) {
  return listed_rows(x, source.key_batch(w), w.key_head, slots);
}

// Numbers [B, Hq, S] (acc) of kCount keys, by position; of queries, by result.
template <int kCount, int kThreads, KeySource Source>
HW_DEVICE HW_INLINE void key_numbers(float* to, const Ref<const void, 3>& x, const Source& source,
                                     const typename Source::WorkItem& w, const Slots& slots) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers_at<kCount, kThreads>(
      to, from.at(w.at.batch, w.head, w.at.k_begin), from.stride[2], [&](int i) -> int64_t {
        const int token = slots.token[i];
        return token < 0 ? token : source.key_position(w, slots.first + i, token);
      });
}
template <int kCount, int kThreads, int kPitch, KeySource Source>
HW_DEVICE HW_INLINE void query_numbers(float* to, const Ref<const void, 3>& x, const Source& source,
                                       const typename Source::WorkItem& w, const Slots& slots) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers_at<kCount, kThreads, kPitch>(
      to, from.at(w.at.batch, w.head), from.stride[2], [&](int i) -> int64_t {
        const int token = slots.token[i];
        return token < 0 ? token : source.row_result(w, slots.first + i, token);
      });
}
// The same of [B, Sq, Hq], by position.
template <int kCount, int kThreads, KeySource Source>
HW_DEVICE HW_INLINE void temperatures(float* to, const Ref<const void, 3>& x, const Source& source,
                                      const typename Source::WorkItem& w, const Slots& slots) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers_at<kCount, kThreads>(
      to, from.at(w.at.batch, w.at.q_begin, w.head), from.stride[1], [&](int i) -> int64_t {
        const int token = slots.token[i];
        return token < 0 ? token : source.row_position(w, slots.first + i, token);
      });
}

}  // namespace hw::softmax::sm80
