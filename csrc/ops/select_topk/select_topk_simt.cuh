// SPDX-License-Identifier: Apache-2.0
// Selection of the k largest on CUDA: a block per row, every dtype, sm_75 and later.
//
//   digits of 8 bits from the top   a histogram of the keys that share the digits found so far; one
//                                   warp finds the bin of the k-th largest
//   the row once more, in order     256 scores at a time; votes of the warps give every selected
//                                   score its rank
//   rank (if asked for)             rank = number of selected that come before
//
// Counters are integers, so atomic additions in any order give the same bins. Scores are read again
// in every pass: rows of routing scores stay in L2.
#pragma once

#include "ops/select_topk/select_topk.h"

#include "core/gpu/block_rank.cuh"
#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"
#include "core/host/workspace.h"
#include "core/sort_key.h"

namespace hw::select_topk::simt {

inline constexpr int kDigitBits = 8, kBins = 1 << kDigitBits;

template <class Element>
struct SelectKernel {
  using Key = SortKey<Element>;
  static constexpr int kThreads = 256, kWarps = kThreads / dev::kWarp;
  static constexpr int kBits = 8 * static_cast<int>(sizeof(Key));

  struct Params {
    ForwardParams f;
    int64_t* selected;  // [R, k] in the order of the row, before ranking; null: straight to index
  };

  struct Smem {
    unsigned bins[kBins];
    unsigned equal[kWarps], taken[kWarps];  // votes of the warps
    Key prefix;                             // of the k-th largest: the digits found so far
    int64_t wanted;                         // how many of the keys with this prefix are selected
  };

  struct Block {
    const ForwardParams& f;
    Smem& smem;
    Ref<const Element, 2> score;
    int64_t row;

    HW_DEVICE HW_INLINE Key key(int64_t i) const { return sort_key(score(row, i)); }

    // The key of the k-th largest, and how many of its equals are selected.
    HW_DEVICE HW_INLINE Threshold<Key> threshold() const {
      if (dev::thread_index() == 0) smem.prefix = 0, smem.wanted = f.k();
      HW_UNROLL_BY(1)
      for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
        for (int b = dev::thread_index(); b < kBins; b += kThreads) smem.bins[b] = 0;
        dev::sync_block();
        for (int64_t i = dev::thread_index(); i < f.count(); i += kThreads) {
          const Key x = key(i);
          if (upper(x, shift) == smem.prefix)
            dev::atomic_add(&smem.bins[static_cast<int>(x >> shift) & (kBins - 1)], 1u);
        }
        dev::sync_block();
        if (dev::warp() == 0) find_bin();
        dev::sync_block();
      }
      return {smem.prefix, smem.wanted};
    }

    // The digits above that at `shift`.
    HW_DEVICE static HW_INLINE Key upper(Key x, int shift) {
      return shift + kDigitBits >= kBits ? Key{0} : static_cast<Key>(x >> (shift + kDigitBits));
    }

    // Appends the digit of the k-th largest to the prefix. One warp, a lane has 8 bins, the first
    // lane the uppermost ones.
    HW_DEVICE HW_INLINE void find_bin() const {
      constexpr int kOwn = kBins / dev::kWarp;
      const int first = kBins - 1 - dev::lane() * kOwn;
      int64_t own = 0;
      for (int b = 0; b < kOwn; ++b) own += smem.bins[first - b];
      int64_t up_to = own;  // of this lane and those before
      HW_UNROLL
      for (int n = 1; n < dev::kWarp; n *= 2) {
        const int64_t before = dev::shuffle_up(up_to, n);
        if (dev::lane() >= n) up_to += before;
      }
      int64_t wanted = smem.wanted - (up_to - own);
      dev::sync_warp();
      if (wanted <= 0 || wanted > own) return;  // the bin is another lane's
      int bin = first;
      while (smem.bins[bin] < wanted) wanted -= smem.bins[bin--];
      smem.prefix = static_cast<Key>((smem.prefix << kDigitBits) | static_cast<unsigned>(bin));
      smem.wanted = wanted;
    }

    // Selected indices in the order of the row.
    HW_DEVICE HW_INLINE void take(const Threshold<Key>& t, int64_t* to, int64_t step) const {
      int64_t equals = 0, count = 0;  // before this piece of the row
      for (int64_t begin = 0; begin < f.count() && count < f.k(); begin += kThreads) {
        const int64_t i = begin + dev::thread_index();
        const Key x = i < f.count() ? key(i) : Key{0};
        const bool equal = i < f.count() && x == t.key;
        const dev::BlockRank e = dev::block_rank<kThreads>(equal, smem.equal);
        const bool takes = i < f.count() && (equal ? equals + e.before < t.ties : x > t.key);
        const dev::BlockRank s = dev::block_rank<kThreads>(takes, smem.taken);
        if (takes) to[(count + s.before) * step] = i;
        equals += e.all;
        count += s.all;
      }
    }

    // From the order of the row to (-key, index).
    HW_DEVICE HW_INLINE void rank(const int64_t* selected) const {
      const int64_t k = f.k();
      for (int64_t j = dev::thread_index(); j < k; j += kThreads) {
        const Key own = key(selected[j]);
        int64_t before = 0;
        for (int64_t m = 0; m < k; ++m) {
          const Key other = key(selected[m]);
          before += other > own || (other == own && m < j);
        }
        f.index(row, before) = selected[j];
      }
    }
  };

  HW_DEVICE static void main(const Params& p) {
    const Block block{p.f, *dev::shared<Smem>(), p.f.score.template as<const Element>(),
                      dev::block_index_x()};
    const Threshold<Key> t = block.threshold();
    if (!p.selected) return block.take(t, p.f.index.at(block.row, 0), p.f.index.stride[1]);
    int64_t* selected = p.selected + block.row * p.f.k();
    block.take(t, selected, 1);
    dev::sync_block();
    block.rank(selected);
  }
};

template <class Element>
void forward(const ForwardParams& f, const Call& call) {
  if (f.k() == 0) return;
  Arena arena(call.workspace, "select_topk");
  int64_t* selected = f.keep_order ? nullptr : arena.take<int64_t>(f.rows() * f.k());
  using Kernel = SelectKernel<Element>;
  launch<Kernel>({f.rows(), 1, 1}, sizeof(typename Kernel::Smem), call.context, {f, selected});
}

}  // namespace hw::select_topk::simt

namespace hw::select_topk {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& forward = simt::forward<Element>;
};

}  // namespace hw::select_topk
