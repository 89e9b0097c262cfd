// SPDX-License-Identifier: Apache-2.0
// The bias table of windows on CUDA: to the bias of a window, and the gradient back.
//
//   ExpandKernel   bias[h, i, j] = t[h, bin(i, j)]                  a thread: an element
//   FoldKernel     d_t[h, b] = sum over parts and pairs of bin b    a warp: a bin
//
// Pairs of the bin (a, c), a rows and c columns apart, are found from their upper left corner:
// there are (wy - a) (wx - c) of it, and at each up to four pairs, i and j exchanged and mirrored;
// none where the window is smaller than the table's.
#pragma once

#include "ops/window_attention/window_attention_simt_layout.h"

#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"

namespace hw::window_attention {

template <class Element>
struct ExpandKernel {
  static constexpr int kThreads = 256;
  struct Params {
    Ref<const Element, 2> table;  // [Hq, M]
    Element* bias;                // [Hq, N, N]
    int slots, width, table_width;
    int64_t count;
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t n = static_cast<int64_t>(dev::block_index_x()) * kThreads + dev::thread_index();
    if (n >= p.count) return;
    const int64_t row = n / p.slots, head = row / p.slots;
    const int i = static_cast<int>(row % p.slots), j = static_cast<int>(n % p.slots);
    p.bias[n] = p.table(head, bin(i, j, p.width, p.table_width));
  }
};

template <class A>
struct FoldKernel {
  static constexpr int kWarps = 4, kThreads = kWarps * dev::kWarp;
  struct Params {
    const A* d_bias;    // [P, Hq, N, N]
    Ref<A, 2> d_table;  // [Hq, M]
    int height, width;  // of a window
    int table_width;
    int64_t parts;
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t at = static_cast<int64_t>(dev::block_index_x()) * kWarps + dev::warp();
    const int64_t heads = p.d_table.size[0], bins = p.d_table.size[1], head = at / bins;
    if (head >= heads) return;
    const int64_t b = at % bins, a_of_table = b / p.table_width, c_of_table = b % p.table_width;
    const int a = static_cast<int>(min_of<int64_t>(a_of_table, p.height));
    const int c = static_cast<int>(min_of<int64_t>(c_of_table, p.width));
    const int slots = p.height * p.width;
    const int columns = p.width - c, corners = (p.height - a) * columns;
    A sum = 0;
    for (int64_t part = 0; part < p.parts; ++part) {
      const A* of = p.d_bias + (part * heads + head) * slots * slots;
      for (int n = dev::lane(); n < corners; n += dev::kWarp) {
        const int first = n / columns * p.width + n % columns;
        const int down = a * p.width;
        sum += pair(of, slots, first, first + down + c, b != 0);
        if (a != 0 && c != 0) sum += pair(of, slots, first + c, first + down, true);
      }
    }
    sum = dev::warp_sum<dev::kWarp>(sum);
    if (dev::lane() == 0) p.d_table(head, b) = sum;
  }

 private:
  // Both ways; only once where a slot meets itself.
  HW_DEVICE HW_INLINE static A pair(const A* of, int64_t slots, int64_t i, int64_t j, bool two) {
    const A one = of[i * slots + j];
    return two ? one + of[j * slots + i] : one;
  }
};

// The bias that the engine reads; nothing without a table.
template <class Element, class Params>
void expand_table(const Params& p, Element* bias, const Context& context) {
  if (!p.bias_table) return;
  const int64_t slots = p.grid.size(), count = p.bias_table.size[0] * slots * slots;
  using Kernel = ExpandKernel<Element>;
  const typename Kernel::Params of{p.bias_table.template as<const Element>(),
                                   bias,
                                   static_cast<int>(slots),
                                   static_cast<int>(p.grid.width),
                                   static_cast<int>(p.table_width),
                                   count};
  launch<Kernel>({ceil_div<int64_t>(count, Kernel::kThreads), 1, 1}, 0, context, of);
}

// The gradient of the table from the parts of that of the bias.
template <class A>
void fold_table(const BackwardParams& p, const A* d_bias, const Context& context) {
  using Kernel = FoldKernel<A>;
  const typename Kernel::Params of{d_bias,
                                   p.d_bias_table.as<A>(),
                                   static_cast<int>(p.grid.height),
                                   static_cast<int>(p.grid.width),
                                   static_cast<int>(p.table_width),
                                   sizes_of(p).parts};
  launch<Kernel>({ceil_div<int64_t>(p.query_heads() * p.bins, Kernel::kWarps), 1, 1}, 0, context,
                 of);
}

}  // namespace hw::window_attention
