// SPDX-License-Identifier: Apache-2.0
// Matrix loads and multiplies against the fragment tables of the PTX ISA, written here element by
// element as that document gives them (index i of a fragment, not register by register).
#include <limits>

#include "buffer.h"
#include "check.h"
#include "fragments.cuh"
#include "orders.h"

namespace hw::test {
namespace {

template <int kMatrices, bool kTransposed>
void check_load_matrix() {
  std::vector<uint16_t> in(kMatrices * 64);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(1000 + i);
  const Buffer<uint16_t> matrices(in);
  const Buffer<uint32_t> out(32 * kMatrices, 0u);
  launch<LoadMatrix<kMatrices, kTransposed>>({}, kMatrices * 128, context(),
                                             {matrices.data(), out.data()});
  const std::vector<uint32_t> got = out.read();
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < kMatrices; ++i) {
      for (int e = 0; e < 2; ++e) {
        int row = lane / 4, column = lane % 4 * 2 + e;
        if (kTransposed) std::swap(row, column);
        const uint16_t value = static_cast<uint16_t>(got[lane * kMatrices + i] >> (16 * e));
        EXPECT(value == in[i * 64 + row * 8 + column], "lane ", lane, " register ", i, " half ", e);
      }
    }
  }
}

TEST(matrix_loads) {
  for_all_orders([] {
    check_load_matrix<4, false>();
    check_load_matrix<4, true>();
    check_load_matrix<2, false>();
    check_load_matrix<2, true>();
  });
}

struct Place {
  int row, column;
};

// Element i of lane's fragment of A, B or D. PTX ISA, "Matrix fragments for mma.m16n8k16 with
// floating point type" and "... mma.m16n8k8".
Place a_place(Format format, int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  if (format == Format::tf32) {
    return {i == 0 || i == 2 ? group : group + 8, i == 0 || i == 1 ? in_group : in_group + 4};
  }
  const bool upper = (0 <= i && i < 2) || (4 <= i && i < 6);
  const int column = in_group * 2 + (i & 1);
  return {upper ? group : group + 8, i < 4 ? column : column + 8};
}

Place b_place(Format format, int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  if (format == Format::tf32) return {i == 0 ? in_group : in_group + 4, group};
  const int row = in_group * 2 + (i & 1);
  return {i < 2 ? row : row + 8, group};
}

Place d_place(int lane, int i) {
  return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)};
}

// Element i of a fragment whose registers start at `regs`, and the bits that say x there.
float element(Format format, const uint32_t* regs, int i) {
  if (format == Format::tf32) return std::bit_cast<float>(regs[i] & 0xffffe000u);
  const uint16_t bits = static_cast<uint16_t>(regs[i / 2] >> (16 * (i % 2)));
  if (format == Format::bf16) return std::bit_cast<float>(uint32_t{bits} << 16);
  f16 x;
  x.bits = bits;
  return x;
}

uint32_t bits_of(Format format, float x) {
  if (format == Format::tf32) return std::bit_cast<uint32_t>(x);
  return format == Format::bf16 ? bf16(x).bits : f16(x).bits;
}

template <Format kFormat>
void check_multiply(uint64_t seed, float scale) {
  constexpr int kPer = kFormat == Format::tf32 ? 1 : 2, kK = 8 * kPer;
  Numbers numbers(seed);
  std::vector<uint32_t> a(32 * 4), b(32 * 2);
  std::vector<float> d(32 * 4);
  const auto word = [&] {
    const uint32_t lo = bits_of(kFormat, numbers.uniform() * scale);
    return kPer == 1 ? lo : lo | bits_of(kFormat, numbers.uniform() * scale) << 16;
  };
  for (uint32_t& w : a) w = word();
  for (uint32_t& w : b) w = word();
  for (float& x : d) x = numbers.uniform();

  double full_a[16][kK], full_b[kK][8], sum[16][8], magnitude[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4 * kPer; ++i) {
      const Place at = a_place(kFormat, lane, i);
      full_a[at.row][at.column] = element(kFormat, &a[lane * 4], i);
    }
    for (int i = 0; i < 2 * kPer; ++i) {
      const Place at = b_place(kFormat, lane, i);
      full_b[at.row][at.column] = element(kFormat, &b[lane * 2], i);
    }
    for (int i = 0; i < 4; ++i) {
      const Place at = d_place(lane, i);
      sum[at.row][at.column] = d[lane * 4 + i];
      magnitude[at.row][at.column] = std::fabs(d[lane * 4 + i]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < kK; ++k) {
        sum[m][n] += full_a[m][k] * full_b[k][n];
        magnitude[m][n] += std::fabs(full_a[m][k] * full_b[k][n]);
      }
    }
  }

  const Buffer<uint32_t> da(a), db(b);
  const Buffer<float> dd(d);
  launch<Multiply<kFormat>>({}, 0, context(), {da.data(), db.data(), dd.data()});
  const std::vector<float> got = dd.read();
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place at = d_place(lane, i);
      expect_near(got[lane * 4 + i], sum[at.row][at.column], magnitude[at.row][at.column] * 4e-6,
                  concat("row ", at.row, " column ", at.column));
    }
  }
}

TEST(multiplies) {
  for_all_orders([] {
    for (uint64_t seed : {1, 2}) {
      check_multiply<Format::bf16>(seed, 1.0f);
      check_multiply<Format::f16>(seed, 1.0f);
      check_multiply<Format::f16>(seed, 3e-5f);  // subnormal halves
      check_multiply<Format::tf32>(seed, 1.0f);  // with low bits, which must not count
    }
  });
}

// One infinity or NaN in A spoils exactly its row.
TEST(multiply_carries_infinity_and_nan) {
  std::vector<uint32_t> a(32 * 4, 0u), b(32 * 2, 0x3c003c00u);  // b = 1
  a[0 * 4 + 0] = 0x00007c00u;                                   // row 0: inf
  a[4 * 4 + 1] = 0x7e000000u;                                   // row 9: NaN
  const Buffer<uint32_t> da(a), db(b);
  const Buffer<float> dd(32 * 4, 0.0f);
  launch<Multiply<Format::f16>>({}, 0, context(), {da.data(), db.data(), dd.data()});
  const std::vector<float> got = dd.read();
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = d_place(lane, i).row;
      const float want = row == 0   ? std::numeric_limits<float>::infinity()
                         : row == 9 ? std::nanf("")
                                    : 0.0f;
      expect_near(got[lane * 4 + i], want, 0, concat("row ", row));
    }
  }
}

TEST(rounding_to_tf32) {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> in = {0.0f, -0.0f, 1.0f, inf, -inf};
  const float half = 0x1p-11f;  // half of tf32's last place at 1
  for (float x : {1.0f + half, 1.0f + half - 0x1p-23f, -1.0f - half, 1.0f + 3 * half}) {
    in.push_back(x);
  }
  Numbers numbers(8);
  while (in.size() < 32) in.push_back(numbers.uniform());
  const Buffer<float> values(in);
  const Buffer<uint32_t> out(32, 0u);
  launch<RoundToTf32>({}, 0, context(), {values.data(), out.data()});
  const std::vector<uint32_t> got = out.read();
  for (int t = 0; t < 32; ++t) {
    double want = in[t];
    if (std::isfinite(want) && want != 0) {
      int exponent = 0;
      std::frexp(want, &exponent);
      const double place = std::ldexp(1.0, exponent - 11);
      want = std::copysign(std::floor(std::fabs(want) / place + 0.5) * place, want);
    }
    const float value = std::bit_cast<float>(got[t]);
    EXPECT(value == want && std::signbit(value) == std::signbit(want), in[t], " gave ", value);
  }
}

}  // namespace
}  // namespace hw::test
