// SPDX-License-Identifier: Apache-2.0
// How an image is cut into regions: which numbers make a grid, and the tokens of every region.
#include <vector>

#include "native_test.h"

#include "core/regions.h"

namespace {

using hw::RegionGrid;

constexpr int64_t kMost = int64_t{1} << 31;

RegionGrid grid(int64_t columns, int64_t height, int64_t width, int64_t rows_of_image,
                int64_t columns_of_image) {
  return {columns, height, width, rows_of_image, columns_of_image};
}

// Token (y, x) by hand: token t of region (r, c) is (r height + t / width, c width + t % width).
int64_t by_hand(const RegionGrid& g, int64_t region, int64_t t) {
  const int64_t y = region / g.columns * g.height + t / g.width;
  const int64_t x = region % g.columns * g.width + t % g.width;
  const bool there = y < g.rows_of_image && x < g.columns_of_image;
  return there ? y * g.columns_of_image + x : -1;
}

}  // namespace

TEST(regions_of_an_image) {
  for (const RegionGrid& g : {grid(3, 2, 3, 5, 7), grid(2, 1, 4, 3, 5), grid(4, 3, 1, 4, 4),
                              grid(6, 1, 1, 1, 6), grid(1, 1, 1, 1, 1), grid(2, 2, 2, 2, 4)}) {
    const int64_t tokens = g.rows_of_image * g.columns_of_image;
    EXPECT(g.within(tokens) && g.size() == g.height * g.width);
    EXPECT(g.count() == g.columns * ((g.rows_of_image + g.height - 1) / g.height));
    EXPECT(g.single() == (g.height == 1 && g.width == 1));
    std::vector<int> seen(static_cast<size_t>(tokens));
    for (int64_t region = 0; region < g.count(); ++region) {
      std::vector<int64_t> in_turn;
      g.each_token(region, [&](int64_t token) { in_turn.push_back(token); });
      EXPECT(static_cast<int64_t>(in_turn.size()) == g.size());
      for (int64_t t = 0; t < g.size(); ++t) {
        const int64_t token = g.token(region, t);
        EXPECT(token == by_hand(g, region, t) && token == in_turn[static_cast<size_t>(t)], region,
               " ", t, ": ", token);
        const int short_token = g.token_in(static_cast<int>(region), static_cast<int>(t), -2);
        EXPECT(short_token == (token < 0 ? -2 : static_cast<int>(token)), region, " ", t);
        if (token >= 0) ++seen[static_cast<size_t>(token)];
      }
    }
    for (int64_t token = 0; token < tokens; ++token)
      EXPECT(seen[static_cast<size_t>(token)] == 1, "token ", token);
  }
}

TEST(regions_of_one_token_may_leave_columns_out) {
  const RegionGrid g = grid(2, 1, 1, 2, 3);
  for (int64_t region = 0; region < 4; ++region)
    EXPECT(g.token(region, 0) == by_hand(g, region, 0));
}

TEST(regions_that_are_not_there_have_no_token) {
  for (const RegionGrid& g : {grid(3, 2, 3, 5, 7), grid(6, 1, 1, 1, 6)})
    for (const int64_t region : {int64_t{-1}, g.columns * g.rows_of_image, kMost}) {
      EXPECT(g.token(region, 0) == -1, "region ", region);
      g.each_token(region, [&](int64_t token) { EXPECT(token == -1, "region ", region); });
    }
}

TEST(regions_of_an_image_without_tokens) {
  EXPECT(grid(3, 1, 1, 0, 3).token(0, 0) == -1 && grid(1, 2, 2, 0, 2).token(0, 0) == -1);
}

TEST(regions_are_refused) {
  EXPECT(!grid(0, 1, 1, 2, 2).within(4) && !grid(2, 0, 1, 2, 2).within(4));
  EXPECT(!grid(2, 1, 0, 2, 2).within(4) && !grid(2, 1, 1, -1, 2).within(-2));
  EXPECT(!grid(2, 1, 1, 2, -1).within(-2) && !grid(2, 1, 1, -2, -2).within(4));
  EXPECT(!grid(2, 1, 1, 2, 2).within(3) && !grid(2, 1, 1, 2, 2).within(6));
  EXPECT(!grid(2, 1, 1, 2, 2).within(5) && grid(2, 1, 1, 2, 2).within(4));
  // Images without tokens, of one row or column.
  EXPECT(grid(1, 1, 1, 0, 3).within(0) && !grid(1, 1, 1, 0, 3).within(1));
  EXPECT(grid(1, 1, 1, 3, 0).within(0) && !grid(1, 1, 1, 3, 0).within(1));
  EXPECT(grid(1, 2, 1, 4, 1).within(4) && grid(1, 1, 4, 1, 4).within(4));
}

TEST(regions_whose_products_overflow_are_refused) {
  EXPECT(grid(1, kMost, 1, 1, 1).within(1) && !grid(1, kMost + 1, 1, 1, 1).within(1));
  EXPECT(grid(1, 1, kMost, 1, 1).within(1) && !grid(1, 1, kMost + 1, 1, 1).within(1));
  EXPECT(grid(1, kMost / 2, 2, 1, 1).within(1) && !grid(1, kMost / 2, 4, 1, 1).within(1));
  for (const int shift : {24, 31, 40}) {  // 2^64 and more
    const int64_t one = int64_t{1} << shift, other = int64_t{1} << 40;
    EXPECT(!grid(1, one, other, 1, 1).within(1) && !grid(1, other, one, 1, 1).within(1));
  }
  EXPECT(grid(1, 1, 1, kMost, 1).within(kMost) && !grid(1, 1, 1, kMost + 1, 1).within(kMost + 1));
  // More columns of regions only for a sequence of tokens.
  const int64_t many = kMost + 1;
  EXPECT(grid(many, 1, 1, 1, many).within(many) && grid(kMost, 1, 1, 2, 2).within(4));
  EXPECT(!grid(many, 1, 1, 2, 2).within(4) && !grid(many, 1, 1, 1, 2).within(2));
  EXPECT(!grid(many, 1, 1, 2, many).within(2 * many));
}
