// SPDX-License-Identifier: Apache-2.0
// Making a Csr (core/gpu/csr.h) on the device: a stable counting sort, a block per list.
//
//   count    every warp counts the values of its piece of the list, a contiguous one
//   scan     over (bucket, warp) in this order: where each warp's items of each bucket begin
//   place    every warp places its piece in order, 32 items at a time; the rank of an item is the
//            number of lanes before its own that have the same value
//
// The result does not depend on the order of the counters' atomic additions.
//
//   make_csr(values, csr, context)     values(b, head, i): int64, item i of a list; values outside
//                                      the buckets are dropped
#pragma once

#include <bit>
#include <cstdint>

#include "core/gpu/csr.h"
#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"
#include "core/math.h"

namespace hw {

// The sum of the threads before this one, and of all. `buffer` [kWarps]; whole block.
struct Scanned {
  int32_t before, all;
};
template <int kWarps>
HW_DEVICE HW_INLINE Scanned scan_block(int32_t own, int32_t* buffer) {
  int32_t up_to = own;  // of this lane and those before
  HW_UNROLL
  for (int n = 1; n < dev::kWarp; n *= 2) {
    const int32_t earlier = dev::shuffle_up(up_to, n);
    if (dev::lane() >= n) up_to += earlier;
  }
  dev::sync_block();  // everyone has read the sums of the scan before
  if (dev::lane() == dev::kWarp - 1) buffer[dev::warp()] = up_to;
  dev::sync_block();
  Scanned s{up_to - own, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < dev::warp()) s.before += buffer[w];
    s.all += buffer[w];
  }
  return s;
}

// The lanes whose value is that of this lane; values of `bits` bits. Whole warp.
HW_DEVICE HW_INLINE uint32_t lanes_alike(uint32_t value, int bits) {
  uint32_t alike = dev::kAllLanes;
  for (int bit = 0; bit < bits; ++bit) {
    const bool one = value >> bit & 1u;
    const uint32_t ones = dev::ballot(one);
    alike &= one ? ones : ~ones;
  }
  return alike;
}

template <class Values>
struct CsrKernel {
  struct Params {
    Values values;
    Csr csr;
  };
  static constexpr int kWarps = kCsrWarps, kThreads = kWarps * dev::kWarp;
  struct Smem {
    int32_t sums[kWarps];
  };

  // What a block sorts, and the piece of it that the warp has: [first, end), `first` + a multiple
  // of 32 for all lanes.
  struct List {
    const Params& p;
    int64_t b, head;
    int32_t *begin, *item, *counts;
    int64_t first, end;

    HW_DEVICE HW_INLINE explicit List(const Params& params) : p(params) {
      const int64_t list = dev::block_index_x();
      b = list / p.csr.heads, head = list % p.csr.heads;
      begin = p.csr.begin_of(list), item = p.csr.items_of(list);
      counts = p.csr.counts + list * p.csr.buckets * kWarps;
      const int64_t piece = ceil_div<int64_t>(p.csr.items, kThreads) * dev::kWarp;
      first = min_of(dev::warp() * piece, p.csr.items), end = min_of(first + piece, p.csr.items);
    }

    // Of item i; `buckets` where it has none.
    HW_DEVICE HW_INLINE int64_t bucket(int64_t i) const {
      const int64_t x = i < end ? p.values(b, head, i) : -1;
      return x >= 0 && x < p.csr.buckets ? x : p.csr.buckets;
    }

    HW_DEVICE HW_INLINE void count() const {
      for (int64_t i = dev::thread_index(); i < p.csr.buckets * kWarps; i += kThreads)
        counts[i] = 0;
      dev::sync_block();
      for (int64_t i = first + dev::lane(); i < end; i += dev::kWarp) {
        const int64_t at = bucket(i);
        if (at < p.csr.buckets) dev::atomic_add(&counts[at * kWarps + dev::warp()], 1);
      }
      dev::sync_block();
    }

    // A thread has a bucket at a time: counts become the places of the warps' first items.
    HW_DEVICE HW_INLINE void scan(Smem& smem) const {
      int32_t before = 0;
      for (int64_t base = 0; base < p.csr.buckets; base += kThreads) {
        const int64_t at = base + dev::thread_index();
        int32_t* own = counts + at * kWarps;
        int32_t sum = 0;
        for (int w = 0; at < p.csr.buckets && w < kWarps; ++w) sum += own[w];
        const Scanned s = scan_block<kWarps>(sum, smem.sums);
        int32_t place = before + s.before;
        before += s.all;
        if (at >= p.csr.buckets) continue;
        begin[at] = place;
        for (int w = 0; w < kWarps; ++w) {
          const int32_t n = own[w];
          own[w] = place;
          place += n;
        }
      }
      if (dev::thread_index() == 0) begin[p.csr.buckets] = before;
      dev::sync_block();
    }

    HW_DEVICE HW_INLINE void place() const {
      const int bits = std::bit_width(static_cast<uint32_t>(p.csr.buckets));
      const uint32_t before = (1u << dev::lane()) - 1u;
      for (int64_t base = first; base < end; base += dev::kWarp) {
        const int64_t i = base + dev::lane(), at = bucket(i);
        const uint32_t alike = lanes_alike(static_cast<uint32_t>(at), bits);
        const bool some = at < p.csr.buckets, last = (alike & ~before) == 1u << dev::lane();
        int32_t* next = counts + (some ? at : 0) * kWarps + dev::warp();
        const int32_t to = some ? *next + std::popcount(alike & before) : 0;
        dev::sync_warp();  // all lanes have read what the last of them moves on
        if (some && last) *next = to + 1;
        if (some) item[to] = static_cast<int32_t>(i);
        dev::sync_warp();  // the last of them has moved it on
      }
    }
  };

  HW_DEVICE static void main(const Params& p) {
    const List list(p);
    list.count();
    list.scan(*dev::shared<Smem>());
    list.place();
  }
};

template <class Values>
void make_csr(const Values& values, const Csr& csr, const Context& context) {
  using Kernel = CsrKernel<Values>;
  launch<Kernel>({csr.lists(), 1, 1}, sizeof(typename Kernel::Smem), context, {values, csr});
}

}  // namespace hw
