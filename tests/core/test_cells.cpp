// SPDX-License-Identifier: Apache-2.0
// How an image is cut into cells: which numbers make one, and the tokens of every cell.
#include <vector>

#include "native_test.h"

#include "core/regions.h"

namespace {

using hw::RegionGrid;

constexpr int64_t kMost = int64_t{1} << 31;

RegionGrid cells(int64_t columns, int64_t height, int64_t width, int64_t rows_of_image,
                 int64_t columns_of_image) {
  return {columns, height, width, rows_of_image, columns_of_image};
}

// Token (y, x) by hand: place t of cell (r, c) is (r height + t / width, c width + t % width).
int64_t by_hand(const RegionGrid& c, int64_t block, int64_t t) {
  const int64_t y = block / c.columns * c.height + t / c.width;
  const int64_t x = block % c.columns * c.width + t % c.width;
  const bool there = y < c.rows_of_image && x < c.columns_of_image;
  return there ? y * c.columns_of_image + x : -1;
}

}  // namespace

TEST(cells_of_an_image) {
  for (const RegionGrid& c : {cells(3, 2, 3, 5, 7), cells(2, 1, 4, 3, 5), cells(4, 3, 1, 4, 4),
                              cells(6, 1, 1, 1, 6), cells(1, 1, 1, 1, 1), cells(2, 2, 2, 2, 4)}) {
    const int64_t tokens = c.rows_of_image * c.columns_of_image;
    EXPECT(c.within(tokens) && c.size() == c.height * c.width);
    EXPECT(c.count() == c.columns * ((c.rows_of_image + c.height - 1) / c.height));
    EXPECT(c.single() == (c.height == 1 && c.width == 1));
    std::vector<int> seen(static_cast<size_t>(tokens));
    for (int64_t block = 0; block < c.count(); ++block) {
      std::vector<int64_t> in_turn;
      c.each_token(block, [&](int64_t token) { in_turn.push_back(token); });
      EXPECT(static_cast<int64_t>(in_turn.size()) == c.size());
      for (int64_t t = 0; t < c.size(); ++t) {
        const int64_t token = c.token(block, t);
        EXPECT(token == by_hand(c, block, t) && token == in_turn[static_cast<size_t>(t)], block,
               " ", t, ": ", token);
        if (token >= 0) ++seen[static_cast<size_t>(token)];
      }
    }
    for (int64_t token = 0; token < tokens; ++token)
      EXPECT(seen[static_cast<size_t>(token)] == 1, "token ", token);
  }
}

TEST(cells_of_one_token_may_leave_columns_out) {
  const RegionGrid c = cells(2, 1, 1, 2, 3);
  for (int64_t block = 0; block < 4; ++block) EXPECT(c.token(block, 0) == by_hand(c, block, 0));
}

TEST(cells_that_are_not_there_have_no_token) {
  for (const RegionGrid& c : {cells(3, 2, 3, 5, 7), cells(6, 1, 1, 1, 6)})
    for (const int64_t block : {int64_t{-1}, c.columns * c.rows_of_image, kMost}) {
      EXPECT(c.token(block, 0) == -1, "block ", block);
      c.each_token(block, [&](int64_t token) { EXPECT(token == -1, "block ", block); });
    }
}

TEST(cells_of_an_image_without_tokens) {
  EXPECT(cells(3, 1, 1, 0, 3).token(0, 0) == -1 && cells(1, 2, 2, 0, 2).token(0, 0) == -1);
}

TEST(cells_are_refused) {
  EXPECT(!cells(0, 1, 1, 2, 2).within(4) && !cells(2, 0, 1, 2, 2).within(4));
  EXPECT(!cells(2, 1, 0, 2, 2).within(4) && !cells(2, 1, 1, -1, 2).within(-2));
  EXPECT(!cells(2, 1, 1, 2, -1).within(-2) && !cells(2, 1, 1, -2, -2).within(4));
  EXPECT(!cells(2, 1, 1, 2, 2).within(3) && !cells(2, 1, 1, 2, 2).within(6));
  EXPECT(!cells(2, 1, 1, 2, 2).within(5) && cells(2, 1, 1, 2, 2).within(4));
  // Images without tokens, of one row or column.
  EXPECT(cells(1, 1, 1, 0, 3).within(0) && !cells(1, 1, 1, 0, 3).within(1));
  EXPECT(cells(1, 1, 1, 3, 0).within(0) && !cells(1, 1, 1, 3, 0).within(1));
  EXPECT(cells(1, 2, 1, 4, 1).within(4) && cells(1, 1, 4, 1, 4).within(4));
}

TEST(cells_whose_products_overflow_are_refused) {
  EXPECT(cells(1, kMost, 1, 1, 1).within(1) && !cells(1, kMost + 1, 1, 1, 1).within(1));
  EXPECT(cells(1, 1, kMost, 1, 1).within(1) && !cells(1, 1, kMost + 1, 1, 1).within(1));
  EXPECT(cells(1, kMost / 2, 2, 1, 1).within(1) && !cells(1, kMost / 2, 4, 1, 1).within(1));
  for (const int shift : {24, 31, 40}) {  // 2^64 and more
    const int64_t one = int64_t{1} << shift, other = int64_t{1} << 40;
    EXPECT(!cells(1, one, other, 1, 1).within(1) && !cells(1, other, one, 1, 1).within(1));
  }
  EXPECT(cells(1, 1, 1, kMost, 1).within(kMost) && !cells(1, 1, 1, kMost + 1, 1).within(kMost + 1));
  // More columns of cells only for a sequence of tokens.
  const int64_t many = kMost + 1;
  EXPECT(cells(many, 1, 1, 1, many).within(many) && cells(kMost, 1, 1, 2, 2).within(4));
  EXPECT(!cells(many, 1, 1, 2, 2).within(4) && !cells(many, 1, 1, 1, 2).within(2));
  EXPECT(!cells(many, 1, 1, 2, many).within(2 * many));
}
