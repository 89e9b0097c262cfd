// SPDX-License-Identifier: Apache-2.0
// Swizzled tiles: every element has a place of its own, the 8 rows of a matrix load lie in
// different banks, and detours lead to where their units are. Which rows take vectors and words,
// and what is loaded and stored of those that do and do not.
#include <set>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "tiles.cuh"

#include "core/gpu/vector.h"

namespace hw::test {
namespace {

constexpr int kTestRows = 32, kBanks = 8;  // banks of 16 bytes: 128 bytes are read in one go

template <int kColumns>
void check_swizzle() {
  using T = Tile<bf16, kTestRows, kColumns>;
  alignas(128) static T tile;
  std::set<const bf16*> places;
  for (int row = 0; row < kTestRows; ++row)
    for (int u = 0; u < T::kUnits; ++u) {
      const bf16* at = tile.unit(row, u);
      places.insert(at);
      EXPECT(at >= tile.at && at + 8 <= tile.at + kTestRows * kColumns, "row ", row, " unit ", u);
    }
  EXPECT(places.size() == static_cast<size_t>(kTestRows * T::kUnits), "width ", kColumns);
  for (int row = 0; row < kTestRows; row += 8)
    for (int u = 0; u < T::kUnits; ++u) {
      std::set<ptrdiff_t> banks;
      for (int i = 0; i < 8; ++i) banks.insert((tile.unit(row + i, u) - tile.at) / 8 % kBanks);
      EXPECT(banks.size() == kBanks, "width ", kColumns, " rows from ", row, " unit ", u, ": ",
             banks.size(), " banks");
    }
  for (int row = 0; row < kTestRows; ++row)
    for (int u = 0; u < T::kUnits; ++u)
      EXPECT(dev::by(tile.unit(row, u % 2), T::offset(u - u % 2)) == tile.unit(row, u), "width ",
             kColumns, " row ", row, " unit ", u);
}

TEST(swizzled_tiles) {
  check_swizzle<32>();
  check_swizzle<64>();
  check_swizzle<96>();
  check_swizzle<128>();
  check_swizzle<256>();
}

// ---- Which rows take vectors and words ----------------------------------------------------------

alignas(64) bf16 memory[64];

// [2, 3, 4, 32], every row of it at a multiple of 32 elements.
Ref<const bf16, 4> even_rows() { return {memory, {2, 3, 4, 32}, {3 * 4 * 32, 4 * 32, 32, 1}}; }

template <class Is>
void check_rows_of(const Is& is, int64_t unit) {  // unit: elements
  EXPECT(is(even_rows()));
  for (int64_t off = 1; off < 32; ++off) {
    Ref<const bf16, 4> x = even_rows();
    x.data += off;
    EXPECT(is(x) == (off % unit == 0), "at ", off);
    for (int d = 0; d < 3; ++d) {
      x = even_rows();
      x.stride[d] += off;
      EXPECT(is(x) == (off % unit == 0), "stride ", d, " and ", off);
    }
  }
  Ref<const bf16, 4> x = even_rows();
  x.stride[3] = 2;
  EXPECT(!is(x));
  x.size[3] = 2;
  EXPECT(!is(x));
  x.stride[2] = 1;
  EXPECT(!is(x));
}

TEST(rows_that_are_aligned) {
  for (const int bytes : {4, 16})
    check_rows_of([=](const Ref<const bf16, 4>& x) { return rows_aligned(x, bytes); }, bytes / 2);
  for (int d = 0; d < 3; ++d) {  // whose stride leads nowhere
    Ref<const bf16, 4> x = even_rows();
    x.stride[d] += 1;
    x.size[d] = 2;
    EXPECT(!rows_aligned(x, 4), d);
    x.size[d] = 1;
    EXPECT(rows_aligned(x, 16), d);
  }
  Ref<const bf16, 4> x = even_rows();
  x.size[3] = 1, x.stride[3] = 7;
  EXPECT(rows_aligned(x, 16));
}

TEST(rows_of_whole_units) {
  for (const int64_t width : {1, 4, 7, 8, 12, 24, 32}) {
    Ref<const bf16, 4> x = even_rows();
    x.size[3] = width;
    EXPECT(whole_units(x) == (width % 8 == 0), width);
  }
  for (const int64_t step : {kMaxStep - 7, kMaxStep + 1, -(kMaxStep - 7), -(kMaxStep + 1)}) {
    Ref<const bf16, 4> x = even_rows();
    x.stride[1] = step;
    EXPECT(whole_units(x) == (step <= kMaxStep && step >= -kMaxStep), step);
  }
  Ref<const bf16, 4> x = even_rows();
  x.stride[1] += 4;  // the only row of its tensor: copies of nothing have addresses too
  x.size[1] = 1;
  EXPECT(!whole_units(x));
}

TEST(rows_that_have_vectors) {
  check_rows_of([](const Ref<const bf16, 4>& x) { return has_vectors(x); }, 8);
  for (const int64_t width : {1, 4, 7, 8, 12, 24}) {
    Ref<const bf16, 4> x = even_rows();
    x.size[3] = width;
    EXPECT(has_vectors(x) == (width % 8 == 0), width);
  }
}

// ---- What is loaded and stored ------------------------------------------------------------------

Context context() {
  Context c;
  c.multiprocessors = 1;
  return c;
}

template <int kThreads>
void check_loads(bool wholly) {
  using T = LoadsTile<kThreads>;
  for (const int64_t stride : {32, 33})
    for (const int columns : {1, 2, 7, 8, 9, 17, 31, 32})
      for (const int count : {1, 5, 32}) {
        std::vector<bf16> values(static_cast<size_t>(T::kRows * stride));
        for (size_t i = 0; i < values.size(); ++i) values[i] = bf16(static_cast<float>(i % 251));
        const Buffer<bf16> from(values), out(T::kRows * T::kColumns, bf16(-1.0f));
        const bool aligned = stride % 8 == 0, whole = aligned && columns % 8 == 0 && wholly;
        launch<T>({1, 1, 1}, sizeof(typename T::Smem), context(),
                  {{from.data(), stride, 1, count, columns, aligned, whole}, out.data()});
        const std::vector<bf16> got = out.read();
        for (int r = 0; r < T::kRows; ++r)
          for (int c = 0; c < T::kColumns; ++c) {
            const bool there = r < count && c < columns;
            const float want = there ? static_cast<float>((r * stride + c) % 251) : 0.0f;
            EXPECT(static_cast<float>(got[static_cast<size_t>(r * T::kColumns + c)]) == want,
                   "row ", r, " column ", c, " of ", count, " x ", columns, ", stride ", stride);
          }
      }
}

TEST(tiles_of_rows_of_any_width) {
  for (const bool wholly : {false, true}) {
    check_loads<64>(wholly);
    check_loads<8>(wholly);   // two rows at once
    check_loads<96>(wholly);  // which share the units out unevenly
  }
}

template <class Element, int kTiles, bool kPairByPair>
void check_stores(int64_t row_stride, int64_t stride) {
  using Kernel = StoresRows<Element, kTiles, kPairByPair>;
  for (int64_t width = 0; width <= 8 * kTiles; ++width) {
    if (width * stride > row_stride) continue;
    const Buffer<Element> out(static_cast<size_t>(8 * row_stride), Element(-1.0f));
    const bool paired = row_stride % 2 == 0 && stride == 1;
    const bool whole = row_stride % 8 == 0 && stride == 1 && width % 8 == 0;
    launch<Kernel>({1, 1, 1}, 0, context(), {out.data(), width, row_stride, stride, paired, whole});
    const std::vector<Element> got = out.read();
    for (int64_t i = 0; i < 8 * row_stride; ++i) {
      const int64_t row = i / row_stride, column = i % row_stride / stride;
      const bool there = row != Kernel::kNowhere && i % row_stride % stride == 0 && column < width;
      const float want = there ? static_cast<float>(row * 32 + column + 1) : -1.0f;
      EXPECT(static_cast<float>(got[static_cast<size_t>(i)]) == want, "width ", width, ", strides ",
             row_stride, " and ", stride, ", row ", row, " column ", column);
    }
  }
}

TEST(rows_of_any_width_and_layout) {
  for (const int64_t row_stride : {16, 17, 18, 40})
    for (const int64_t stride : {1, 2}) {
      check_stores<bf16, 2, true>(row_stride, stride);
      check_stores<bf16, 2, false>(row_stride, stride);
      check_stores<bf16, 4, false>(row_stride, stride);
      check_stores<f16, 8, false>(row_stride, stride);
      check_stores<float, 4, false>(row_stride, stride);
    }
}

}  // namespace
}  // namespace hw::test
