// SPDX-License-Identifier: Apache-2.0
// Attention of listed rows to all keys on the CPU: blocks of the engine whose rows come from a list.
#pragma once

#include <algorithm>

#include "ops/attention/attention_cpu_backward.h"
#include "ops/attention/attention_cpu_forward.h"
#include "ops/routing_attention/routing_attention.h"

namespace hw::routing_attention {
namespace {

using attention::Block;
using attention::kRows;

// The lists of a call, absent slots left out, by position.
class SortedRows {
 public:
  template <class Params>
  SortedRows(const Params& p, int threads) : heads_(p.query_heads()), most_(p.rows.slots()) {
    const int64_t pairs = p.batch() * heads_;
    rows_.reserve((pairs * most_ + pairs) * static_cast<int64_t>(sizeof(int64_t)));
    counts_ = reinterpret_cast<int64_t*>(rows_.data()) + pairs * most_;
    parallel_tasks(pairs, threads, [&](int64_t pair) {
      int64_t* rows = reinterpret_cast<int64_t*>(rows_.data()) + pair * most_;
      int64_t n = 0;
      for (int64_t i = 0; i < most_; ++i) {
        const int64_t token = p.rows.token(pair / heads_, pair % heads_, 0, i);
        if (token >= 0) rows[n++] = token;
      }
      if (!std::is_sorted(rows, rows + n)) std::sort(rows, rows + n);
      counts_[pair] = n;
    });
  }

  attention::RowLists lists() const {
    return {reinterpret_cast<const int64_t*>(rows_.data()), counts_, most_, heads_};
  }

 private:
  const int heads_;
  const int64_t most_;
  Buffer rows_;
  int64_t* counts_;
};

template <class T>
class RowsForward {
 public:
  RowsForward(const ForwardParams& p, int threads)
      : p_(p), threads_(threads), sorted_(p, threads), pass_(p) {}

  void run() {
    const int64_t heads = p_.query_heads(), blocks = ceil_div<int64_t>(p_.rows.slots(), kRows);
    const attention::RowLists lists = sorted_.lists();
    parallel_tasks(p_.batch() * heads * blocks, threads_, [&](int64_t task) {
      const int64_t batch = task / blocks / heads;
      const int head = static_cast<int>(task / blocks % heads);
      const int64_t count = lists.count(batch, head);
      const int64_t begin = (blocks - 1 - task % blocks) * kRows;  // the last rows see most keys
      if (begin >= count) return;
      const attention::Sequence at = sequence(p_, batch);
      pass_.run_block({at,
                       mask_of(p_, at),
                       head,
                       {begin, std::min<int64_t>(begin + kRows, count)},
                       lists.of(batch, head)});
    });
  }

 private:
  const ForwardParams& p_;
  const int threads_;
  const SortedRows sorted_;
  attention::Forward<T> pass_;
};

template <class T>
class RowsBackward {
 public:
  RowsBackward(const BackwardParams& p, int threads)
      : sorted_(p, threads), lists_(sorted_.lists()), pass_(p, threads, &lists_) {}

  void run() { pass_.run(); }

 private:
  const SortedRows sorted_;
  const attention::RowLists lists_;
  attention::Backward<T> pass_;
};

}  // namespace
}  // namespace hw::routing_attention
