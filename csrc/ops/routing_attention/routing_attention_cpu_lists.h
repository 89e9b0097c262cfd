// SPDX-License-Identifier: Apache-2.0
// Attention of listed rows to listed keys on the CPU.
//
//   GroupsForward     a task: a group of some query heads, each thread knowing its next one;
//                     results go where they belong, no two tasks write the same
//   GroupsBackward    a task: a key head, all its groups in their order; d_q, d_k and d_v of a
//                     group are added to those of its tokens. Where a batch entry has few heads the
//                     groups are cut into parts with sums of their own, which are added up in
//                     order, and are tasks of their own if there are few in all
//
// No atomics: every sum has one owner and one order.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>

#include "ops/routing_attention/routing_attention_cpu_group.h"
#include "softmax/cpu/backward.h"
#include "softmax/cpu/forward.h"

namespace hw::routing_attention {
namespace {

constexpr int64_t kRowsOfTask = 512;  // groups that a forward thread takes have as many together
constexpr int64_t kFarSlots = 2048;   // rows and keys of longer lists need no prefetches
constexpr int64_t kFewHeads = 8;      // fewer key heads than this: cut the groups into parts

template <class T>
class GroupsForward {
  using Pass = softmax::Forward<T, ListSource, ListScore>;
  using AlongKeys = softmax::AlongKeys<T, ListSource, ListScore>;

 public:
  GroupsForward(const ForwardParams& p, int threads)
      : p_(p),
        threads_(threads),
        groups_(p.groups()),
        heads_(p.query_heads()),
        heads_at_once_(heads_of_task()),
        head_parts_(ceil_div(heads_, heads_at_once_)),
        span_tasks_(p.batch() * heads_ * blocks_of_call() < softmax::kFewTasks &&
                    p.keys.slots() >= 2 * softmax::kSpanTokens),
        in_place_(span_tasks_ || (AlongKeys::reads_anywhere(p.k.as<const T>()) &&
                                  AlongKeys::reads_anywhere(p.v.as<const T>()) &&
                                  AlongKeys::serves(p, std::min<int64_t>(p.rows.slots(), kRows),
                                                    p.keys.slots()))) {}

  void run() {
    parallel_walks(p_.batch() * groups_ * head_parts_, at_once(p_.rows.slots() * heads_at_once_),
                   span_tasks_ ? 1 : threads_, [&](auto next) { walk(next); });
  }

 private:
  // Blocks of rows of a head.
  int64_t blocks_of_call() const { return groups_ * ceil_div<int64_t>(p_.rows.slots(), kRows); }

  // Tasks, or heads, of so many rows that a thread takes at once.
  static int64_t at_once(int64_t rows) {
    return std::max<int64_t>(kRowsOfTask / std::max<int64_t>(rows, 1), 1);
  }

  // Heads that have their lists in common are loaded together: their rows are neighbours in memory.
  int64_t heads_of_task() const {
    const bool common = p_.rows.entries.stride[1] == 0 && p_.keys.entries.stride[1] == 0;
    const int64_t heads = std::min(at_once(p_.rows.slots()), std::max<int64_t>(heads_, 1));
    return common && heads % p_.group() == 0 ? heads : 1;
  }

  // A task: a group of some heads. Those of other heads come next, for their rows lie next.
  void look_up(int64_t task, Group<T>& group) const {
    const int64_t head = task % head_parts_ * heads_at_once_;
    group.look_up(task / head_parts_ / groups_, static_cast<int>(head),
                  static_cast<int>(std::min(heads_at_once_, heads_ - head)),
                  task / head_parts_ % groups_);
  }

  template <class Next>
  HW_NOINLINE void walk(Next next) const {
    Group<T> group(p_, static_cast<int>(heads_at_once_), in_place_);
    // `moves`: the heads whose keys lie in the group's memory change from task to task.
    std::optional<Pass> pass;
    const bool moves = head_parts_ > 1 && heads_at_once_ > 1 && !in_place_;
    int64_t task = next();
    if (task < 0) return;
    look_up(task, group);
    while (task >= 0) {
      group.enter();
      task = next();
      if (task >= 0) look_up(task, group);
      if (!pass || moves) pass.emplace(engine_params(group), threads_, groups_, score_of(p_));
      attend(group, *pass, task >= 0 && p_.rows.slots() + p_.keys.slots() <= kFarSlots);
    }
  }

  // The group's rows; `more`: the next group's are prefetched on the way.
  HW_NOINLINE void attend(const Group<T>& group, Pass& pass, bool more) const {
    const int64_t blocks = ceil_div<int64_t>(group.rows(), kRows), all = group.heads() * blocks;
    for (int h = 0; h < group.heads(); ++h) {
      const int head = group.first_head() + h;
      if (p_.by_slot && group.rows() < p_.rows.slots())
        clear_slots(group.batch(), head, group.number());
      for (int64_t b = 0; b < blocks && !span_tasks_; ++b)
        pass.run_block(group.block(b * kRows, head),
                       more ? group.prefetches(h * blocks + b, all) : Prefetches{});
    }
    if (!span_tasks_ || all == 0) return;
    const auto block = [&](int64_t i) {
      return group.block(i % blocks * kRows, group.first_head() + static_cast<int>(i / blocks));
    };
    pass.run_blocks(all, pass.spans_of(block(0)), block);
  }

  HW_NOINLINE softmax::ForwardParams engine_params(const Group<T>& group) const {
    softmax::ForwardParams e = p_;
    e.k = group.keys();
    e.v = group.values();
    if (p_.by_slot) e.o = p_.w, e.w = {};
    return e;
  }

  // Slots without token are rows without weight.
  HW_NOINLINE void clear_slots(int64_t batch, int head, int64_t group) const {
    const Ref<T, 4> w = p_.w.template as<T>();
    const Ref<Accum<T>, 3> row = p_.row.template as<Accum<T>>();
    const Ref<Accum<T>, 3> rest = p_.rest.template as<Accum<T>>();
    const int64_t slots = p_.rows.slots();
    for (int64_t s = group * slots; s < (group + 1) * slots; ++s) {
      for (int64_t d = 0; d < w.size[3]; ++d) w(batch, s, head, d) = T(0.0f);
      if (row) row(batch, head, s) = softmax::kInfinity<Accum<T>>;
      if (rest) rest(batch, head, s) = 0;
    }
  }

  const ForwardParams& p_;
  const int threads_;
  const int64_t groups_, heads_, heads_at_once_, head_parts_;
  const bool span_tasks_;  // of the keys of a group, for there are few other tasks
  const bool in_place_;    // keys are read where they lie
};

// ---- Backward -----------------------------------------------------------------------------------

// A head of a gradient [B, S, heads, width] that a task adds to: rows of whole vectors in `base`,
// or where they lie if that will do.
template <class T>
class TokenSums {
 public:
  using A = Accum<T>;

  // `base` is used if there is one; of in_place(to) none is needed. `given`: of each token, whether
  // anything was added; between begin() and end() its row is not there before.
  TokenSums(const Ref<void, 4>& to, int64_t batch, int head, A* base, bool* given)
      : to_(to.as<T>()),
        batch_(batch),
        head_(head),
        padded_(padded(to)),
        sums_(base),
        given_(given) {
    at_ = base;
    ld_ = padded_;
    if constexpr (std::is_same_v<T, A>)
      if (base == nullptr) at_ = to_.at(batch, 0, head), ld_ = to_.stride[1];
  }

  static bool in_place(const Ref<void, 4>& to) {
    return std::is_same_v<T, A> && to.stride[3] == 1 && padded(to) == to.size[3];
  }
  static int64_t padded(const Ref<void, 4>& to) { return round_up<int64_t>(to.size[3], kLanes<A>); }
  static int64_t sums_size(const Ref<void, 4>& to) { return to.size[1] * padded(to); }

  void begin() { std::fill_n(given_, to_.size[1], false); }
  HW_NOINLINE void end() {
    for (int64_t i = 0; i < to_.size[1]; ++i)
      if (!given_[i]) std::fill_n(at_ + i * ld_, padded_, A(0));
  }
  // Of a token, if it is one.
  void prefetch(int64_t token) const {
    if (token >= 0)
      hw::prefetch<true>(at_ + token * ld_, padded_ * static_cast<int64_t>(sizeof(A)));
  }
  // Row += factor times x.
  void add(int64_t token, const A* x, A factor = A(1)) {
    A* sum = at_ + token * ld_;
    if (given_[token])
      for (int64_t d = 0; d < padded_; d += kLanes<A>)
        store(sum + d, fma(load(x + d), splat(factor), load(sum + d)));
    else
      for (int64_t d = 0; d < padded_; d += kLanes<A>) store(sum + d, load(x + d) * factor);
    given_[token] = true;
  }
  // All rows += those of another, both after end().
  HW_NOINLINE void add(const TokenSums& part) const {
    for (int64_t i = 0; i < to_.size[1]; ++i)
      for (int64_t d = 0; d < padded_; d += kLanes<A>) {
        A* sum = at_ + i * ld_ + d;
        store(sum, load(sum) + load(part.at_ + i * part.ld_ + d));
      }
  }
  A* row(int64_t token) const { return at_ + token * ld_; }  // [padded]
  // Rows to where they belong.
  HW_NOINLINE void write() const {
    for (int64_t i = 0; sums_ != nullptr && i < to_.size[1]; ++i)
      narrow(to_.at(batch_, i, head_), at_ + i * ld_, to_.size[3], to_.stride[3]);
  }

 private:
  const Ref<T, 4> to_;
  const int64_t batch_;
  const int head_;
  const int64_t padded_;
  A* const sums_;
  bool* const given_;  // [S]
  A* at_;
  int64_t ld_;
};

template <class T>
class GroupsBackward {
 public:
  using A = Accum<T>;

  GroupsBackward(const BackwardParams& p, int threads)
      : p_(p),
        threads_(threads),
        heads_(p.key_heads()),
        group_(p.group()),
        groups_(p.groups()),
        batch_heads_(p.batch() * heads_) {
    if (heads_ > 0 && heads_ < kFewHeads)
      parts_ = std::max<int64_t>(1, std::min(ceil_div<int64_t>(kFewHeads, heads_), groups_));
    split_ = parts_ > 1 && batch_heads_ < kFewHeads;
    in_place_ = !split_ && TokenSums<T>::in_place(p.d_q) && TokenSums<T>::in_place(p.d_k) &&
                TokenSums<T>::in_place(p.d_v);
  }

  void run() {
    if (!split_) {
      parallel_tasks(batch_heads_, threads_, [&](int64_t batch_head) { work(batch_head); });
      return;
    }
    memory_.reserve(batch_heads_ * parts_ * sums_size() * static_cast<int64_t>(sizeof(A)));
    parallel_tasks(batch_heads_ * parts_, threads_, [&](int64_t task) {
      A* base = reinterpret_cast<A*>(memory_.data()) + task * this->sums_size();
      add_groups(task / parts_, task % parts_, base);
    });
    parallel_tasks(batch_heads_, threads_, [&](int64_t batch_head) { add_parts(batch_head); });
  }

 private:
  // Sums of a task: d_k, d_v, d_q of the query heads that share the key head.
  struct Sums {
    TokenSums<T> d_k, d_v;
    GroupsBackward* pass;
    int64_t batch_head;
    A* d_q_sums;
    bool* given;  // [S], those of d_q

    TokenSums<T> d_q(int h) const {
      const Ref<void, 4>& to = pass->p_.d_q;
      A* base = d_q_sums == nullptr ? nullptr : d_q_sums + h * TokenSums<T>::sums_size(to);
      const int64_t head = batch_head % pass->heads_ * pass->group_ + h;
      return {to, batch_head / pass->heads_, static_cast<int>(head), base, given};
    }
  };

  int64_t sums_size() const {
    return TokenSums<T>::sums_size(p_.d_k) + TokenSums<T>::sums_size(p_.d_v) +
           group_ * TokenSums<T>::sums_size(p_.d_q);
  }

  // `given`: memory for marks of the tokens, [2 Sk + Sq]; null for what has come to its end.
  HW_NOINLINE Sums sums_of(int64_t batch_head, A* base, bool* given) {
    const int64_t batch = batch_head / heads_;
    const int head = static_cast<int>(batch_head % heads_);
    A* d_v = base == nullptr ? nullptr : base + TokenSums<T>::sums_size(p_.d_k);
    A* d_q = base == nullptr ? nullptr : d_v + TokenSums<T>::sums_size(p_.d_v);
    bool *of_d_v = given, *of_d_q = given;
    if (given != nullptr) of_d_v += p_.k.size[1], of_d_q += 2 * p_.k.size[1];
    return {{p_.d_k, batch, head, base, given},
            {p_.d_v, batch, head, d_v, of_d_v},
            this,
            batch_head,
            d_q,
            of_d_q};
  }

  // A key head whose parts are worked on one after another.
  void work(int64_t batch_head) {
    Buffer memory;
    const int64_t copies = (in_place_ ? 0 : 1) + (parts_ > 1 ? 1 : 0);
    if (copies > 0) memory.reserve(copies * sums_size() * static_cast<int64_t>(sizeof(A)));
    A* base = in_place_ ? nullptr : reinterpret_cast<A*>(memory.data());
    A* more = reinterpret_cast<A*>(memory.data()) + (in_place_ ? 0 : this->sums_size());
    const Sums whole = add_groups(batch_head, 0, base);
    for (int64_t part = 1; part < parts_; ++part) add(whole, add_groups(batch_head, part, more));
    write(whole);
  }

  // Sums over a part of the groups, complete.
  HW_NOINLINE Sums add_groups(int64_t batch_head, int64_t part, A* base) {
    Buffer marks;
    marks.reserve(2 * p_.k.size[1] + p_.q.size[1]);
    Sums sums = sums_of(batch_head, base, reinterpret_cast<bool*>(marks.data()));
    sums.d_k.begin();
    sums.d_v.begin();
    Groups groups(*this);
    for (int h = 0; h < group_; ++h) {
      TokenSums<T> d_q = sums.d_q(h);
      d_q.begin();
      const int head = static_cast<int>(batch_head % heads_) * group_ + h;
      for (int64_t g = groups_ * part / parts_; g < groups_ * (part + 1) / parts_; ++g)
        groups.add(batch_head / heads_, head, g, d_q, sums.d_k, sums.d_v);
      d_q.end();
    }
    sums.d_k.end();
    sums.d_v.end();
    return sums_of(batch_head, base, nullptr);
  }

  HW_NOINLINE void add_parts(int64_t batch_head) {
    A* part_sums = reinterpret_cast<A*>(memory_.data()) + batch_head * parts_ * sums_size();
    const Sums whole = sums_of(batch_head, part_sums, nullptr);
    for (int64_t part = 1; part < parts_; ++part)
      add(whole, sums_of(batch_head, part_sums + part * sums_size(), nullptr));
    write(whole);
  }

  void add(const Sums& whole, const Sums& part) const {
    whole.d_k.add(part.d_k);
    whole.d_v.add(part.d_v);
    for (int h = 0; h < group_; ++h) whole.d_q(h).add(part.d_q(h));
  }

  void write(const Sums& sums) const {
    sums.d_k.write();
    sums.d_v.write();
    for (int h = 0; h < group_; ++h) {
      const TokenSums<T> d_q = sums.d_q(h);
      if (p_.row_temperature)
        apply_temperature(d_q, sums.batch_head / heads_,
                          static_cast<int>(sums.batch_head % heads_) * group_ + h);
      d_q.write();
    }
  }

  // From d_q without tau: d_tau_i = <d_q_i, q_i>, then d_q_i times tau_i.
  HW_NOINLINE void apply_temperature(const TokenSums<T>& d_q, int64_t batch, int head) const {
    const Ref<const T, 4> q = p_.q.template as<const T>();
    const Ref<const A, 3> tau = p_.row_temperature.template as<const A>();
    const Ref<A, 3> d_tau = p_.d_row_temperature.template as<A>();
    const int width = p_.dim();
    Buffer memory;
    memory.reserve(width * static_cast<int64_t>(sizeof(A)));
    A* row = reinterpret_cast<A*>(memory.data());
    for (int64_t i = 0; i < q.size[1]; ++i) {
      A* sum = d_q.row(i);
      if (d_tau) {
        widen(row, q.at(batch, i, head), width, q.stride[3]);
        d_tau(batch, i, head) = inner_product(sum, row, width);
      }
      for (int d = 0; d < width; ++d) sum[d] *= tau(batch, i, head);
    }
  }

  // The walk over groups, and the gradients of one group's keys.
  class Groups {
    using Gradients = softmax::BlockGradients<T, ListSource, ListScore>;

   public:
    HW_NOINLINE explicit Groups(const GroupsBackward& pass)
        : p_(pass.p_),
          group_(p_),
          padded_(TokenSums<T>::padded(p_.d_k)),
          padded_values_(TokenSums<T>::padded(p_.d_v)),
          engine_(engine_params()),
          factor_(p_.factor.template as<const A>()),
          gradients_(engine_, score_of(p_)) {}

    HW_NOINLINE void add(int64_t batch, int head, int64_t g, TokenSums<T>& d_q, TokenSums<T>& d_k,
                         TokenSums<T>& d_v) {
      group_.load(batch, head, g);
      const int64_t keys = group_.key_count();
      if (group_.rows() == 0 || keys == 0) return;
      const A scale = static_cast<A>(p_.scale);
      if (p_.by_slot) find_deltas(batch, head);
      std::fill_n(d_k_, keys * padded_, A(0));
      std::fill_n(d_v_, keys * padded_values_, A(0));
      const softmax::KeySums<A> sums{d_k_, d_v_, padded_, padded_values_, false};
      for (int64_t begin = 0; begin < group_.rows(); begin += kRows) {
        const Block block = group_.block(begin, head);
        gradients_.add(block, {0, keys}, sums);
        for (int i = 0; i < block.count(); ++i) {
          d_q.prefetch(group_.row_ahead(begin + i));
          d_q.add(block.token(i), gradients_.d_q() + i * padded_, scale);
        }
      }
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t token = group_.key_token(j);
        d_k.prefetch(group_.key_ahead(j));
        d_v.prefetch(group_.key_ahead(j));
        if (token < 0) continue;
        d_k.add(token, d_k_ + j * padded_);
        d_v.add(token, d_v_ + j * padded_values_);
      }
    }

   private:
    // What the walk reads; and memory for it in scratch memory.
    HW_NOINLINE softmax::BackwardParams engine_params() {
      const int64_t keys = p_.keys.slots(), slots = p_.groups() * p_.rows.slots();
      const int64_t deltas = p_.by_slot ? slots : 0;
      memory_.reserve((keys * (padded_ + padded_values_) + deltas + 2 * padded_values_) *
                      static_cast<int64_t>(sizeof(A)));
      d_k_ = reinterpret_cast<A*>(memory_.data());
      d_v_ = d_k_ + keys * padded_;
      rows_ = d_v_ + keys * padded_values_;
      delta_ = rows_ + 2 * padded_values_;
      softmax::BackwardParams e = p_;
      e.k = group_.keys();
      e.v = group_.values();
      if (p_.by_slot) {
        e.delta.data = delta_;  // of any batch entry and head
        e.delta.stride[2] = 1;
      }
      Scratch::of_thread().reset(Gradients::bytes(e));
      return e;
    }

    // D of the group's slots.
    HW_NOINLINE void find_deltas(int64_t batch, int head) {
      const Ref<const T, 4> d_w = p_.d_w.template as<const T>(), w = p_.slots.as<const T>();
      const int width = p_.value_dim();
      A *x = rows_, *y = rows_ + padded_values_;  // [Dv]
      const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
      for (int64_t i = 0; i < group_.rows(); ++i) {
        if (const int64_t token = group_.row_ahead(i); token >= 0)
          hw::prefetch(d_w.at(batch, token, head), bytes);
        widen(x, d_w.at(batch, group_.row_token(i), head), width, d_w.stride[3]);
        widen(y, w.at(batch, group_.result(i), head), width, w.stride[3]);
        const A factor = factor_ ? factor_(batch, group_.row_token(i), head) : A(1);
        delta_[group_.result(i)] = factor * inner_product(x, y, width);
      }
    }

    const BackwardParams& p_;
    Group<T> group_;
    const int64_t padded_, padded_values_;
    Buffer memory_;
    A *d_k_, *d_v_, *rows_;  // of the group's keys [Wk, padded]; two rows of values
    A* delta_;               // [G Wq], by slot
    const softmax::BackwardParams engine_;
    const Ref<const A, 3> factor_;
    Gradients gradients_;
  };

  const BackwardParams& p_;
  const int threads_;
  const int heads_, group_;  // key heads; query heads that share one
  const int64_t groups_, batch_heads_;
  int64_t parts_ = 1;
  bool split_ = false;  // parts are tasks of their own
  bool in_place_;
  Buffer memory_;  // sums of the parts of all tasks, if there are parts
};

}  // namespace
}  // namespace hw::routing_attention
