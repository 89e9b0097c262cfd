// SPDX-License-Identifier: Apache-2.0
// A group of listed rows and keys on the CPU, as a small sequence that the engine's blocks can
// take.
//
//   rows     tokens of q, read where they lie; slots without token are left out
//   keys     copied side by side into memory of the task, [Wk, D] and [Wk, Dv], which stays in L2
//            while the rows of the group meet them; or read where they lie
//
// Where positions matter (masks, a token's score with itself), both lists are sorted by position:
// then each row sees an interval of the keys, and the ends of these never decrease, as the engine
// wants it. The order of slots has no other meaning.
#pragma once

#include <algorithm>
#include <utility>

#include "ops/routing_attention/routing_attention_cpu_source.h"
#include "softmax/cpu/operands.h"

#include "core/host/workspace.h"

namespace hw::routing_attention {
namespace {

using Block = softmax::Block<ListSource>;
using softmax::kRows;
using softmax::kRowsAhead;

// A list by position: tokens, and the slots where they stood.
struct List {
  int64_t *token, *slot;  // [slots]
  int64_t count;
};

template <class T>
class Group {
 public:
  // Of up to `heads` query heads, which have their lists in common. `in_place`: keys are not
  // gathered.
  template <class Params>
  HW_NOINLINE explicit Group(const Params& p, int heads = 1, bool in_place = false)
      : routing_(p),
        q_(p.q.template as<const T>()),
        k_(p.k.template as<const T>()),
        v_(p.v.template as<const T>()),
        heads_per_key_(p.group()),
        heads_(heads),
        in_place_(in_place),
        most_rows_(p.rows.slots()),
        most_keys_(p.keys.slots()) {
    if constexpr (requires { p.o; })
      if (!p.by_slot) o_ = p.o.template as<const T>();
    by_position_ = mask_of(p, sequence(p, 0));
    source_.keys_listed = true;
    ordered_ = by_position_.left >= 0 || by_position_.right >= 0 || p.mask_self;
    Arena sizes;
    lay_out(sizes);
    memory_.reserve(sizes.bytes());
    Arena arena({memory_.data(), sizes.bytes()}, "routing_attention");
    lay_out(arena);
  }

  // The tensors that a pass over the group reads its keys from: any batch entry, its heads.
  Ref<const void, 4> keys() const { return side_by_side(k_, k_copy_); }
  Ref<const void, 4> values() const { return side_by_side(v_, v_copy_); }

  int64_t rows() const { return now_.rows.count; }
  int64_t key_count() const { return now_.keys.count; }
  int64_t row_token(int64_t i) const { return now_.rows.token[i]; }
  int64_t row_slot(int64_t i) const { return now_.rows.slot[i]; }  // in the group
  int64_t result(int64_t i) const { return result_[i]; }
  int64_t key_token(int64_t j) const { return now_.keys.token[j]; }  // -1: a zero key
  // The token whose row is prefetched while that of i, of j is worked on; -1: none.
  int64_t row_ahead(int64_t i) const {
    return i + kRowsAhead < rows() ? row_token(i + kRowsAhead) : -1;
  }
  int64_t key_ahead(int64_t j) const {
    return j + kRowsAhead < key_count() ? key_token(j + kRowsAhead) : -1;
  }

  // Reads the lists of the group that is next, of `heads` query heads from `head` on.
  HW_NOINLINE void look_up(int64_t batch, int head, int heads, int64_t group) {
    next_.batch = batch, next_.head = head, next_.heads = heads, next_.group = group;
    read(routing_.rows, false, next_.rows);
    read(routing_.keys, routing_.pad_keys, next_.keys);
    ahead_count_ = 0;
    ahead_bytes_ = heads * q_.size[3] * static_cast<int64_t>(sizeof(T));
    add_ahead(q_, next_.rows, head);
    add_ahead(k_, next_.keys, key_head(head));
    add_ahead(v_, next_.keys, key_head(head));
    add_ahead(o_, next_.rows, head);
  }

  // A part of what the next group reads and writes, to be prefetched while a block of this one is
  // worked on; as many rows a step as get through with the block.
  HW_NOINLINE Prefetches prefetches(int64_t part, int64_t parts) const {
    const int64_t begin = ahead_count_ * part / parts, end = ahead_count_ * (part + 1) / parts;
    const int64_t width = v_.size[3];
    const int64_t tiles = ceil_div<int64_t>(key_count(), softmax::kKeys);
    const int64_t rows_of_products =
        in_place_ ? 2 * std::min<int64_t>(rows(), kRows) : softmax::kKeys + width;
    const int64_t steps = tiles * ceil_div<int64_t>(rows_of_products, kTileRows);
    return {ahead_ + begin, end - begin, ahead_bytes_,
            ceil_div(end - begin, std::max<int64_t>(steps, 1))};
  }

  // Goes to the next group.
  HW_NOINLINE void enter() {
    std::swap(now_, next_);
    for (int64_t i = 0; i < rows(); ++i)
      result_[i] = routing_.by_slot ? now_.group * most_rows_ + row_slot(i) : row_token(i);
    if (!in_place_) gather(k_, k_copy_), gather(v_, v_copy_);
    if (ordered_)
      find_seen();
    else
      std::fill_n(seen_, rows(), Range{0, key_count()});
    const softmax::Sequence at{now_.batch, 0, by_position_.rows, 0, by_position_.keys};
    item_ = {{at, by_position_, 0, 0}, rows(), key_count(), now_.rows.token, result_,
             now_.keys.token,          seen_,  self_,       !in_place_};
  }
  void load(int64_t batch, int head, int64_t group) {
    look_up(batch, head, 1, group);
    enter();
  }
  int64_t batch() const { return now_.batch; }
  int64_t number() const { return now_.group; }
  int first_head() const { return now_.head; }
  int heads() const { return now_.heads; }

  // Rows [begin, begin + kRows) of a head of the group.
  HW_NOINLINE Block block(int64_t begin, int head) const {
    Block block{&source_, item_, {begin, std::min<int64_t>(begin + kRows, rows())}};
    block.item.head = head, block.item.key_head = key_head(head);
    return block;
  }

 private:
  HW_NOINLINE void lay_out(Arena& l) {
    for (Members* members : {&now_, &next_}) {
      members->rows = {l.take<int64_t>(most_rows_), l.take<int64_t>(most_rows_), 0};
      members->keys = {l.take<int64_t>(most_keys_), l.take<int64_t>(most_keys_), 0};
    }
    result_ = l.take<int64_t>(most_rows_);
    ahead_ = l.take<const char*>(2 * (most_rows_ + most_keys_));
    order_ = l.take<Listed>(std::max(most_rows_, most_keys_));
    seen_ = l.take<Range>(most_rows_);
    self_ = l.take<Range>(most_rows_);
    const int64_t gathered = in_place_ ? 0 : ceil_div(heads_, heads_per_key_) * most_keys_;
    k_copy_ = l.take<T>(gathered * k_.size[3]);
    v_copy_ = l.take<T>(gathered * v_.size[3]);
  }

  int key_head(int head) const { return head / heads_per_key_; }
  int first_key_head() const { return key_head(now_.head); }
  int key_heads() const { return key_head(now_.head + now_.heads - 1) - first_key_head() + 1; }

  // One head stands for all.
  HW_NOINLINE Ref<const void, 4> side_by_side(const Ref<const T, 4>& x, const T* base) const {
    if (in_place_) return x.template as<const void>();
    const int64_t head = heads_ > 1 ? most_keys_ * x.size[3] : 0;
    return {base - first_key_head() * head,
            {x.size[0], most_keys_, x.size[2], x.size[3]},
            {0, x.size[3], head, 1}};
  }

  // The list's tokens, with those that are absent if wanted, by position if it matters.
  HW_NOINLINE void read(const Lists& lists, bool absent, List& to) {
    int64_t count = 0, slot = 0;
    bool sorted = true;
    const auto take = [&](int64_t token) {
      to.token[count] = token;
      to.slot[count] = slot++;
      if (token < 0 && !absent) return;
      sorted &= count == 0 || to.token[count - 1] <= token;
      ++count;
    };
    for (int64_t b = 0; b < lists.entries.size[3]; ++b)
      lists.grid.each_token(lists.entries(next_.batch, next_.head, next_.group, b), take);
    to.count = count;
    if (ordered_ && !sorted) sort(to);
  }

  HW_NOINLINE void add_ahead(const Ref<const T, 4>& x, const List& list, int head) {
    if (!x || x.stride[3] != 1) return;
    for (int64_t row = 0; row < list.count; ++row)
      if (list.token[row] >= 0)
        ahead_[ahead_count_++] =
            reinterpret_cast<const char*>(x.at(next_.batch, list.token[row], head));
  }

  struct Listed {
    int64_t token, slot;
  };
  HW_NOINLINE void sort(List& list) const {
    for (int64_t i = 0; i < list.count; ++i) order_[i] = {list.token[i], list.slot[i]};
    std::sort(order_, order_ + list.count, [](const Listed& a, const Listed& b) {
      return a.token != b.token ? a.token < b.token : a.slot < b.slot;
    });
    for (int64_t i = 0; i < list.count; ++i)
      list.token[i] = order_[i].token, list.slot[i] = order_[i].slot;
  }

  // [key heads, keys, width]: all heads of a token after each other, as they lie in memory.
  HW_NOINLINE void gather(const Ref<const T, 4>& x, T* to) const {
    const int64_t width = x.size[3], bytes = width * static_cast<int64_t>(sizeof(T));
    const int begin = first_key_head(), end = begin + key_heads();
    for (int64_t j = 0; j < key_count(); ++j) {
      if (const int64_t token = key_ahead(j); token >= 0 && x.stride[3] == 1)
        for (int h = begin; h < end; ++h) hw::prefetch(x.at(now_.batch, token, h), bytes);
      for (int h = begin; h < end; ++h) {
        T* row = to + ((h - begin) * most_keys_ + j) * width;
        if (key_token(j) < 0)
          std::fill_n(row, width, T(0.0f));
        else
          softmax::copy_row(row, x.at(now_.batch, key_token(j), h), width, x.stride[3]);
      }
    }
  }

  // Of each row the keys it sees, and those that are the row itself: two walks side by side. Zero
  // keys come first, and every row sees them: no call has a window that begins behind them.
  HW_NOINLINE void find_seen() {
    const int64_t n = key_count(), *key = now_.keys.token;
    int64_t begin = 0, end = 0, self_begin = 0, self_end = 0;
    const auto first_not_below = [&](int64_t from, int64_t token) {
      while (from < n && key[from] < token) ++from;
      return from;
    };
    for (int64_t i = 0; i < rows(); ++i) {
      Range visible = by_position_.visible_keys(row_token(i));
      if (by_position_.left < 0) visible.begin = softmax::kZeroKey;
      const int64_t self = by_position_.diagonal(row_token(i));
      begin = first_not_below(begin, visible.begin);
      end = first_not_below(end, visible.end);
      self_begin = first_not_below(self_begin, self);
      self_end = first_not_below(self_end, self + 1);
      seen_[i] = {begin, std::max(begin, end)};
      self_[i] = self < 0 ? Range{0, 0} : Range{self_begin, self_end};
    }
  }

  const Routing routing_;
  const Ref<const T, 4> q_, k_, v_;
  Ref<const T, 4> o_;  // if rows are written where the token is
  const int heads_per_key_, heads_;
  const bool in_place_;
  const int64_t most_rows_, most_keys_;
  Mask by_position_;
  bool ordered_;  // positions matter
  Buffer memory_;

  struct Members {
    int64_t batch, group;
    int head, heads;  // the first; how many
    List rows, keys;
  };
  Members now_{}, next_{};
  const char** ahead_ = nullptr;  // rows of the next group
  int64_t ahead_count_ = 0, ahead_bytes_ = 0;
  ListSource source_;
  ListSource::WorkItem item_{};  // of any head
  int64_t* result_ = nullptr;    // [rows] where results of a row lie
  Listed* order_ = nullptr;
  Range *seen_ = nullptr, *self_ = nullptr;  // [rows]
  T *k_copy_ = nullptr, *v_copy_ = nullptr;  // [heads, keys, D | Dv]
};

}  // namespace
}  // namespace hw::routing_attention
