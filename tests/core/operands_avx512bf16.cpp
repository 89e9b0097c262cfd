// SPDX-License-Identifier: Apache-2.0
// Operands of attention made of pairs: every element where it belongs, and zeros, not what lies
// there, where an odd count leaves half a pair. Called by test_pairs.cpp.
#include <limits>
#include <vector>

#include "native_test.h"
#include "softmax/cpu/operands.h"

namespace hw::test {
namespace {

using namespace softmax;

// Something that bf16 holds exactly and that tells its place.
float value(int i, int j) { return static_cast<float>(i % 8 * 32 + j % 32 + 1); }

// The element at (i, j) of a matrix, 0 outside.
float inside(int i, int j, int rows, int columns) {
  return i < rows && j < columns ? value(i, j) : 0.0f;
}

void expect_pair(Bf16Pair got, float first, float second, const char* what, int i, int j) {
  EXPECT(got.first == first && got.second == second, what, " at ", i, ",", j, ": ",
         static_cast<float>(got.first), ",", static_cast<float>(got.second), " want ", first, ",",
         second);
}

// Room that something was in before.
std::vector<Bf16Pair> used_room(int64_t count) {
  const bf16 nan(std::numeric_limits<float>::quiet_NaN());
  return std::vector<Bf16Pair>(static_cast<size_t>(count), Bf16Pair{nan, nan});
}

Bf16Pair at(const Operand<Bf16Pair>& a, int i, int p) { return a.data[i * a.row + p * a.col]; }

void check_tile(int n, int rows) {
  std::vector<float> tile(kTile, std::numeric_limits<float>::quiet_NaN()), two(kRows, 2.0f);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < rows; ++i) tile[static_cast<size_t>(j * kRows + i)] = value(j, i);
  std::vector<Bf16Pair> buffer = used_room(kTile / 2);
  const int width = round_up(rows, kLanes<float>);
  const Bf16Pair* keys = pairs_over_keys(tile.data(), n, width, buffer.data());
  for (int p = 0; p < steps<Bf16Pair>(n); ++p)
    for (int i = 0; i < rows; ++i)
      expect_pair(keys[p * kRows + i], value(2 * p, i), inside(2 * p + 1, i, n, rows), "keys", p,
                  i);
  const auto a =
      pairs_over_rows(tile.data(), n, rows, LaneFactors<float>{two.data()}, buffer.data());
  for (int j = 0; j < n; ++j)
    for (int p = 0; p < steps<Bf16Pair>(rows); ++p)
      expect_pair(at(a, j, p), 2 * value(j, 2 * p), 2 * inside(j, 2 * p + 1, n, rows), "rows", j,
                  p);
}

// Rows [1, 1 + n) of the second of two heads, amid NaN.
struct Tensor {
  std::vector<bf16> memory;
  Ref<const bf16, 4> x;

  Tensor(int n, int width, int stride, int gap) {
    const int head = width * stride + gap, row = 2 * head + gap;
    memory.assign(static_cast<size_t>((n + 2) * row),
                  bf16(std::numeric_limits<float>::quiet_NaN()));
    x = {memory.data(), {1, n + 1, 2, width}, {(n + 1) * row, row, head, stride}};
    for (int i = 0; i < n; ++i)
      for (int d = 0; d < width; ++d)
        memory[static_cast<size_t>((i + 1) * row + head + d * stride)] = bf16(value(i, d));
  }
};

void check_rows(int n, int width, int stride, int gap) {
  const Tensor t(n, width, stride, gap);
  std::vector<Bf16Pair> buffer = used_room(operand_size<bf16>(n, width));
  const Rows<bf16> rows{t.x, 0, 1, n, 1, buffer.data()};
  const auto a = over_width(rows);
  for (int i = 0; i < n; ++i)
    for (int p = 0; p < steps<Bf16Pair>(width); ++p)
      expect_pair(at(a, i, p), value(i, 2 * p), inside(i, 2 * p + 1, n, width), "width", i, p);
  const int padded = round_up(width, kLanes<float>);
  const auto [data, ld] = over_rows(rows);
  for (int p = 0; p < steps<Bf16Pair>(n); ++p)
    for (int d = 0; d < padded; ++d)
      expect_pair(data[p * ld + d], inside(2 * p, d, n, width), inside(2 * p + 1, d, n, width),
                  "rows in vectors", p, d);
  const auto b = over_rows_transposed(rows);
  for (int d = 0; d < width; ++d)
    for (int p = 0; p < steps<Bf16Pair>(n); ++p)
      expect_pair(at(b, d, p), value(2 * p, d), inside(2 * p + 1, d, n, width), "rows", d, p);
}

void check_block(int n, int width, int stride, int gap) {
  const Tensor t(n, width, stride, gap);
  Scratch::of_thread().reset(BlockRows<bf16>::bytes(width));
  BlockRows<bf16> rows(width);
  const DenseSource source;
  const Block<DenseSource> block{&source, {{0, 1, n, 0, 0}, {}, 1, 1}, {0, n}};
  const int lanes = round_up(n, kLanes<float>);
  rows.load(t.x, block, lanes);
  EXPECT(rows.any());
  const Bf16Pair* columns = rows.over_width();
  for (int p = 0; p < steps<Bf16Pair>(width); ++p)
    for (int i = 0; i < lanes; ++i)
      expect_pair(columns[p * kRows + i], inside(i, 2 * p, n, width),
                  inside(i, 2 * p + 1, n, width), "block over the width", p, i);
  const Bf16Pair* zipped = rows.over_rows();
  for (int p = 0; p < steps<Bf16Pair>(n); ++p)
    for (int d = 0; d < rows.padded(); ++d)
      expect_pair(zipped[p * rows.padded() + d], inside(2 * p, d, n, width),
                  inside(2 * p + 1, d, n, width), "block over rows", p, d);
}

}  // namespace

void check_operands_of_pairs() {
  for (const int n : {1, 2, 5, 63, 64}) {
    for (const int rows : {1, 7, 16, 33, 48, 63, 64}) check_tile(n, rows);
    for (const int width : {1, 5, 8, 16, 33})
      for (const int stride : {1, 2})
        for (const int gap : {0, 1}) {
          check_rows(n, width, stride, gap);
          check_block(n, width, stride, gap);
        }
  }
}

}  // namespace hw::test
