// SPDX-License-Identifier: Apache-2.0
// Loads of one tile after the other: what a thread copies next is a fixed step away from what it
// has copied, so that addresses are made once per walk instead of once per tile.
//
//   UnitStream      rows in global memory -> tiles: where the thread's first unit of the next is
//   load_next       the next tile of a stream
//   NumberStream    numbers of several arrays -> shared memory, side by side
#pragma once

#include <cstdint>

#include "core/gpu/tile.cuh"

namespace hw {

template <int kRows, int kUnits, int kThreads, class Element>
struct UnitStream {
  const Element* from = nullptr;

  UnitStream() = default;
  // rows: those of the first tile
  HW_DEVICE HW_INLINE explicit UnitStream(const Rows<Element>& rows)
      : from(rows.origin + (dev::thread_index() / kUnits * rows.row +
                            dev::thread_index() % kUnits * 8 * rows.column)) {}
};

// The next tile of a stream of x, of which `count` rows exist; rows(): the same, if not of whole
// units.
template <int kThreads, class Element, int kRows, int kColumns, class Of>
HW_DEVICE HW_INLINE void load_next(Tile<Element, kRows, kColumns>& tile,
                                   UnitStream<kRows, kColumns / 8, kThreads, Element>& stream,
                                   const Input<Element>& x, int count, const Of& rows) {
  if constexpr (kSharedEvenly<kRows, kColumns / 8, kThreads>) {
    if (x.whole) {
      const int row = static_cast<int>(x.ref.stride[1]), columns = static_cast<int>(x.ref.size[3]);
      load_whole_units<kRows, kColumns / 8, kThreads>(
          stream.from, row, columns, count, [&](int r, int u) { return tile.unit(r, u); });
      stream.from += kRows * row;
      return;
    }
  }
  load_tile<kThreads>(tile, rows());
}

// Numbers from[i step]; null: zeros.
struct NumberArray {
  const float* from = nullptr;
  int64_t step = 0;
};

// Numbers of kArrays arrays, kCount of each at a time, number i of array n to to[i kPitch + n
// kBetween]. A thread keeps its array and its place in it.
template <int kArrays, int kCount, int kPitch, int kBetween, int kThreads>
struct NumberStream {
  static constexpr int kAll = kArrays * kCount, kRounds = (kAll + kThreads - 1) / kThreads;
  const float* from[kRounds] = {};
  int64_t step[kRounds] = {};

  // array(n): the numbers of array n from the first one on, and their distance; null: zeros.
  template <class Array>
  HW_DEVICE HW_INLINE void start(const Array& array) {
    HW_UNROLL
    for (int k = 0; k < kRounds; ++k) {
      const int n = dev::thread_index() + k * kThreads;
      const NumberArray all = n < kAll ? array(n / kCount) : NumberArray{};
      step[k] = all.step;
      from[k] = all.from + n % kCount * all.step;
    }
  }

  // Starts loading the next numbers, of which `count` exist; zeros beyond.
  HW_DEVICE HW_INLINE void load(float* to, int count) {
    HW_UNROLL
    for (int k = 0; k < kRounds; ++k) {
      const int n = dev::thread_index() + k * kThreads;
      if (kAll % kThreads != 0 && n >= kAll) continue;
      const int i = n % kCount;
      dev::copy_async_4(to + (i * kPitch + n / kCount * kBetween), from[k],
                        from[k] && i < count ? 4 : 0);
      from[k] += kCount * step[k];
    }
  }
};

}  // namespace hw
