// SPDX-License-Identifier: Apache-2.0
// Attention of listed rows to all keys on the CPU: the engine's passes over rows of lists.
#pragma once

#include <algorithm>

#include "ops/routing_attention/routing_attention_cpu_source.h"
#include "softmax/cpu/backward.h"
#include "softmax/cpu/forward.h"

namespace hw::routing_attention {
namespace {

constexpr int64_t kTokensOfTask = 64;      // where rows are cleared
constexpr int64_t kCachedBytes = 4 << 20;  // a larger tensor is out of L2 before it is read

// The lists of a call, absent slots left out, by position.
class SortedRows {
 public:
  template <class Params>
  SortedRows(const Params& p, int threads)
      : heads_(p.query_heads()),
        most_(p.rows.slots()),
        batch_(p.batch()),
        tokens_(p.q.size[1]),
        threads_(threads) {
    const int64_t batch_heads = batch_ * heads_;
    rows_.reserve((batch_heads * most_ + batch_heads) * static_cast<int64_t>(sizeof(int64_t)));
    counts_ = reinterpret_cast<int64_t*>(rows_.data()) + batch_heads * most_;
    parallel_tasks(batch_heads, threads, [&](int64_t batch_head) {
      int64_t* rows = reinterpret_cast<int64_t*>(rows_.data()) + batch_head * most_;
      int64_t n = 0;
      const auto take = [&](int64_t token) {
        if (token >= 0) rows[n++] = token;
      };
      for (int64_t i = 0; i < p.rows.entries.size[3]; ++i)
        p.rows.grid.each_token(p.rows.entries(batch_head / heads_, batch_head % heads_, 0, i),
                               take);
      if (!std::is_sorted(rows, rows + n)) std::sort(rows, rows + n);
      counts_[batch_head] = n;
    });
  }

  ListSource source() const {
    return {reinterpret_cast<const int64_t*>(rows_.data()), counts_, most_, heads_, false};
  }

  // f(batch, token, head) for all rows that no list names. The heads of a token lie together: token
  // by token, memory is written in its order.
  template <class F>
  void each_other_row(F f) const {
    const ListSource all = source();
    const int64_t parts = ceil_div(tokens_, kTokensOfTask);
    parallel_tasks(batch_ * parts, threads_, [&](int64_t task) {
      const int64_t b = task / parts, begin = task % parts * kTokensOfTask;
      const int64_t end = std::min(begin + kTokensOfTask, tokens_);
      Scratch& scratch = Scratch::of_thread();
      scratch.reset(2 * Scratch::bytes_of<const int64_t*>(heads_));
      const int64_t** next = scratch.take<const int64_t*>(heads_);
      const int64_t** last = scratch.take<const int64_t*>(heads_);
      for (int h = 0; h < heads_; ++h) {
        last[h] = all.rows_of(b, h) + all.count(b, h);
        next[h] = std::lower_bound(all.rows_of(b, h), last[h], begin);
      }
      for (int64_t token = begin; token < end; ++token)
        for (int h = 0; h < heads_; ++h)
          if (next[h] != last[h] && *next[h] == token)
            ++next[h];
          else
            f(b, token, h);
      finish_past_caches();
    });
  }

 private:
  const int heads_;
  const int64_t most_, batch_, tokens_;
  const int threads_;
  Buffer rows_;
  int64_t* counts_;
};

// Zeros in row (b, i, h) of x, if x is there. A tensor that no cache keeps is written past them.
template <class T>
HW_NOINLINE void clear_row(const Ref<void, 4>& x, int64_t b, int64_t i, int head) {
  if (!x) return;
  T* row = x.as<T>().at(b, i, head);
  const int64_t all = x.size[0] * x.size[1] * x.size[2] * x.size[3];
  if (x.stride[3] != 1)
    for (int64_t d = 0; d < x.size[3]; ++d) row[d * x.stride[3]] = T{};
  else if (all < kCachedBytes / static_cast<int64_t>(sizeof(T)))
    std::fill_n(row, x.size[3], T{});
  else
    clear_past_caches(row, x.size[3] * static_cast<int64_t>(sizeof(T)));
}

template <class T>
class RowsForward {
 public:
  using A = Accum<T>;

  RowsForward(const ForwardParams& p, int threads)
      : p_(p), sorted_(p, threads), pass_(p, threads, sorted_.source(), score_of(p)) {}

  void run() {
    sorted_.each_other_row([&](int64_t b, int64_t i, int head) { clear(b, i, head); });
    pass_.run();
  }

 private:
  // A row without weight.
  HW_NOINLINE void clear(int64_t b, int64_t i, int head) const {
    clear_row<T>(p_.o, b, i, head);
    clear_row<T>(p_.w, b, i, head);
    if (p_.row) p_.row.template as<A>()(b, head, i) = softmax::kInfinity<A>;
    for (const Ref<void, 3>* x : {&p_.rest, &p_.entropy, &p_.p_max, &p_.sq_norm})
      if (*x) x->template as<A>()(b, head, i) = 0;
  }

  const ForwardParams& p_;
  const SortedRows sorted_;
  softmax::Forward<T, ListSource, ListScore> pass_;
};

template <class T>
class RowsBackward {
 public:
  RowsBackward(const BackwardParams& p, int threads)
      : p_(p),
        threads_(threads),
        sorted_(p, threads),
        pass_(p, threads, sorted_.source(), score_of(p)) {}

  void run() {
    sorted_.each_other_row([&](int64_t b, int64_t i, int head) {
      clear_row<T>(p_.d_q, b, i, head);
      if (p_.d_row_temperature) p_.d_row_temperature.template as<Accum<T>>()(b, i, head) = 0;
    });
    pass_.run();
    if (softmax::shares_bias(p_)) add_bias();
  }

 private:
  void add_bias() {
    softmax::BackwardParams all = p_;
    all.max_q = p_.q.size[1];
    softmax::SharedBias<T, ListSource, ListScore>(all, threads_, sorted_.source(), score_of(p_))
        .run();
  }

  const BackwardParams& p_;
  const int threads_;
  const SortedRows sorted_;
  softmax::Backward<T, ListSource, ListScore> pass_;
};

}  // namespace
}  // namespace hw::routing_attention
