// SPDX-License-Identifier: Apache-2.0
// Rows of mixture-of-heads attention on CUDA: a block has a head of a batch entry, 256 tokens at a
// time, a thread one of them; those that chose the head go to memory in their order.
#pragma once

#include "ops/moh_route/moh_route.h"

#include "core/gpu/block_rank.cuh"
#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"

namespace hw::moh_route::simt {

template <class Element>
struct RowsKernel {
  static constexpr int kThreads = 256;

  using Params = ForwardParams;

  struct Smem {
    unsigned votes[kThreads / dev::kWarp];
  };

  HW_DEVICE static void main(const Params& p) {
    Smem& smem = *dev::shared<Smem>();
    const auto gate = p.gate.template as<const Element>();
    const int64_t b = dev::block_index_x() / p.heads(), head = dev::block_index_x() % p.heads();
    int64_t listed = 0;  // of the tokens before
    for (int64_t begin = 0; begin < p.tokens(); begin += kThreads) {
      const int64_t t = begin + dev::thread_index();
      const bool chosen = t < p.tokens() && gate(b, t, head) != Element(0);
      const dev::BlockRank rank = dev::block_rank<kThreads>(chosen, smem.votes);
      if (chosen) p.rows(b, head, listed + rank.before) = t;
      listed += rank.all;
    }
    for (int64_t i = listed + dev::thread_index(); i < p.tokens(); i += kThreads)
      p.rows(b, head, i) = -1;
  }
};

template <class Element>
void forward(const ForwardParams& p, const Call& call) {
  using Kernel = RowsKernel<Element>;
  if (p.batch() * p.heads() == 0) return;
  launch<Kernel>({p.batch() * p.heads(), 1, 1}, sizeof(typename Kernel::Smem), call.context, p);
}

}  // namespace hw::moh_route::simt

namespace hw::moh_route {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& forward = simt::forward<Element>;
};

}  // namespace hw::moh_route
