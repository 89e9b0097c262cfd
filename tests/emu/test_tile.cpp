// SPDX-License-Identifier: Apache-2.0
// Swizzled tiles: every element has a place of its own, the 8 rows of a matrix load lie in different
// banks, and detours lead to where their units are.
#include <set>

#include "check.h"

#include "core/tile.h"

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
      EXPECT(dev::by(tile.unit(row, u % 2), T::detour(u - u % 2)) == tile.unit(row, u), "width ",
             kColumns, " row ", row, " unit ", u);
}

TEST(swizzled_tiles) {
  check_swizzle<32>();
  check_swizzle<64>();
  check_swizzle<96>();
  check_swizzle<128>();
  check_swizzle<256>();
}

}  // namespace
}  // namespace hw::test
