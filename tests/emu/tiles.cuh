// SPDX-License-Identifier: Apache-2.0
// Kernels that load tiles and store rows of any width and layout, for test_tile.cpp.
#pragma once

#include "core/gpu/tile.cuh"

namespace hw::test {

// out[row, column] = the tile [32, 32] of what `from` has.
template <int kThreads_>
struct LoadsTile {
  static constexpr int kThreads = kThreads_, kRows = 32, kColumns = 32;
  struct Params {
    Rows<bf16> from;
    bf16* out;  // [32, 32]
  };
  using Smem = Tile<bf16, kRows, kColumns>;

  HW_DEVICE static void main(const Params& p) {
    Smem& tile = *dev::shared<Smem>();
    load_tile<kThreads>(tile, p.from);
    dev::copy_async_commit();
    dev::copy_async_wait<0>();
    dev::sync_block();
    for (int i = dev::thread_index(); i < kRows * kColumns; i += kThreads)
      p.out[i] = tile.unit(i / kColumns, i % kColumns / 8)[i % 8];
  }
};

// Rows of `width` columns of element (row, column) = row 32 + column + 1, as the lanes of a
// fragment [8, 8 kTiles] hold them: lane l has columns 2 (l % 4) + {0, 1, 8, 9, ..} of row l / 4.
// Row 5 does not exist.
template <class Element, int kTiles, bool kPairByPair>
struct StoresRows {
  static constexpr int kThreads = 32, kNowhere = 5;
  struct Params {
    Element* out;  // [8, row_stride]
    int64_t width, row_stride, stride;
    bool paired, whole;
  };

  HW_DEVICE static void main(const Params& p) {
    const int line = dev::lane() / 4, first = dev::lane() % 4 * 2;
    const Ref<Element, 1> row{p.out + line * p.row_stride, {p.width}, {p.stride}};
    float x[kTiles][2];
    for (int j = 0; j < kTiles; ++j)
      for (int i = 0; i < 2; ++i) x[j][i] = static_cast<float>(line * 32 + first + 8 * j + i + 1);
    const bool exists = line != kNowhere;
    if constexpr (kPairByPair)
      for (int j = 0; exists && j < kTiles; ++j)
        store_pair(row, first + 8 * j, p.paired, x[j][0], x[j][1]);
    else
      store_pairs(row, exists, first, Output<Element>{{}, p.paired, p.whole}, x);
  }
};

}  // namespace hw::test
