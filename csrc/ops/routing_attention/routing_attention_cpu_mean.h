// SPDX-License-Identifier: Apache-2.0
// By slot: o of tokens from w of slots on the CPU. A task per query head, slots in order.
#pragma once

#include <algorithm>

#include "ops/routing_attention/routing_attention.h"

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"

namespace hw::routing_attention {
namespace {

// o_i = sum of w over the slots of token i / (n_i + eps)
template <class T>
class Mean {
 public:
  using A = Accum<T>;

  Mean(const ForwardParams& p, int threads) : p_(p), threads_(threads) {}

  void run() const {
    parallel_tasks(p_.batch() * p_.query_heads(), threads_, [&](int64_t batch_head) {
      average(batch_head / p_.query_heads(), static_cast<int>(batch_head % p_.query_heads()));
    });
  }

 private:
  HW_NOINLINE void average(int64_t batch, int head) const {
    const Ref<const T, 4> w = p_.w.template as<const T>();
    const Ref<T, 4> o = p_.o.template as<T>();
    const int64_t tokens = p_.q.size[1], width = o.size[3],
                  padded = round_up<int64_t>(width, kLanes<A>);
    Buffer memory;
    memory.reserve((tokens + 1) * (padded + 1) * static_cast<int64_t>(sizeof(A)));
    A* sums = reinterpret_cast<A*>(memory.data());  // [tokens, padded]
    A* row = sums + tokens * padded;                // [padded]
    A* count = row + padded;                        // [tokens]
    std::fill_n(sums, tokens * padded, A(0));
    std::fill_n(count, tokens, A(0));
    const int64_t slots = p_.rows.slots();
    for (int64_t s = 0; s < p_.groups() * slots; ++s) {
      const int64_t token = p_.rows.token(batch, head, s / slots, s % slots);
      if (token < 0) continue;
      widen(row, w.at(batch, s, head), width, w.stride[3]);
      A* sum = sums + token * padded;
      for (int64_t d = 0; d < padded; d += kLanes<A>) store(sum + d, load(sum + d) + load(row + d));
      count[token] += 1;
    }
    for (int64_t i = 0; i < tokens; ++i) {
      A* sum = sums + i * padded;
      const A share = count[i] > 0 ? 1 / (count[i] + static_cast<A>(p_.mean_eps)) : A(0);
      for (int64_t d = 0; d < padded; d += kLanes<A>) store(sum + d, load(sum + d) * share);
      narrow(o.at(batch, i, head), sum, width, o.stride[3]);
    }
  }

  const ForwardParams& p_;
  const int threads_;
};

}  // namespace
}  // namespace hw::routing_attention
