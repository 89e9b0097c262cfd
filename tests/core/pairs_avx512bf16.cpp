// SPDX-License-Identifier: Apache-2.0
// Checks of core/cpu/bf16_dot.h and of small products of pairs, called by test_pairs.cpp where the
// machine can run them. Nothing here may run before that: no static objects with constructors.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "native_test.h"

#include "core/cpu/matmul.h"
#include "core/cpu/simd_math.h"
#include "core/cpu/transpose.h"

namespace hw::test {
namespace {

constexpr int kLane = kLanes<float>;

std::vector<float> random_floats(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& x : values) x = uniform(random);
  return values;
}

std::vector<bf16> random_bf16(int64_t n, unsigned seed) {
  std::vector<bf16> values;
  for (const float x : random_floats(n, seed)) values.emplace_back(x);
  return values;
}

// Both elements of every lane.
std::vector<bf16> elements(Vec<Bf16Pair> v) {
  std::vector<bf16> all(2 * kLane);
  std::memcpy(all.data(), &v, sizeof v);
  return all;
}

bool same(bf16 a, bf16 b) { return a.bits == b.bits; }

// What the instruction makes of a number: subnormals become 0, NaN any NaN.
void expect_rounded(float x, bf16 got) {
  if (std::isnan(x)) return EXPECT(std::isnan(static_cast<float>(got)), "NaN is lost");
  const bool subnormal = std::fabs(x) < std::numeric_limits<float>::min();
  const bf16 want(subnormal ? std::copysign(0.0f, x) : x);
  EXPECT(same(got, want), x, " gives ", static_cast<float>(got));
}

void expect_both_round(const float (&x)[kLane]) {
  const std::vector<bf16> zipped = elements(zip(load(x), Vec<float>{}));
  const std::vector<bf16> next = elements(neighbours(Vec<float>{}, load(x)));
  for (int i = 0; i < kLane; ++i) {
    expect_rounded(x[i], zipped[static_cast<size_t>(2 * i)]);
    expect_rounded(x[i], next[static_cast<size_t>(kLane + i)]);
  }
}

}  // namespace

void check_rounding_of_pairs() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  // Ties between 1 and its neighbour, and between that and the next: to the even one.
  expect_both_round({1.0f, 1.00390625f, 1.01171875f, -1.00390625f, -1.01171875f, 1.0039063f,
                     1.0039061f, std::nanf(""), -std::nanf("1"), kInfinity, -kInfinity, 3.4e38f,
                     std::numeric_limits<float>::max(), 1e-40f, -0.0f, 0.0f});
  std::mt19937 random(1);
  for (int i = 0; i < 100000; ++i) {
    float x[kLane];
    for (float& e : x) e = std::bit_cast<float>(static_cast<uint32_t>(random()));
    expect_both_round(x);
  }
}

void check_order_of_pairs() {
  const auto x = random_floats(kLane, 1), y = random_floats(kLane, 2);
  const auto zipped = elements(zip(load(x.data()), load(y.data())));
  const auto next = elements(neighbours(load(x.data()), load(y.data())));
  for (size_t i = 0; i < kLane; ++i) {
    EXPECT(same(zipped[2 * i], bf16(x[i])) && same(zipped[2 * i + 1], bf16(y[i])), "lane ", i);
    EXPECT(same(next[i], bf16(x[i])) && same(next[kLane + i], bf16(y[i])), "element ", i);
  }
  const Bf16Pair pair{bf16(3.0f), bf16(-2.0f)};
  const auto copies = elements(splat(pair));
  for (size_t i = 0; i < kLane; ++i)
    EXPECT(same(copies[2 * i], pair.first) && same(copies[2 * i + 1], pair.second), "lane ", i);
}

void check_products_of_pairs() {
  const auto a = random_bf16(2 * kLane, 1), b = random_bf16(2 * kLane, 2);
  const auto c = random_floats(kLane, 3);
  const auto pairs = [](const std::vector<bf16>& x) {
    return load(reinterpret_cast<const Bf16Pair*>(x.data()));
  };
  const Vec<float> got = fma(pairs(a), pairs(b), load(c.data()));
  for (size_t i = 0; i < kLane; ++i) {
    const double want = static_cast<double>(c[i]) + static_cast<double>(a[2 * i]) * b[2 * i] +
                        static_cast<double>(a[2 * i + 1]) * b[2 * i + 1];
    EXPECT(std::fabs(got[i] - want) < 3e-7, "lane ", i, ": ", got[i], " want ", want);
  }
}

void check_rows_of_pairs() {
  for (const int stride : {1, 3})
    for (const bool one : {false, true})
      for (int n = 0; n < 70; ++n) {
        // Rows that end where their memory ends, so that a sanitizer sees one element too many.
        const auto x = random_bf16(n ? (n - 1) * stride + 1 : 0, 1);
        const auto y = random_bf16(n ? (n - 1) * stride + 1 : 0, 2);
        const auto padded = static_cast<size_t>(round_up(n, kLane));
        const Bf16Pair mark{bf16(7.0f), bf16(7.0f)};
        std::vector<Bf16Pair> to(padded + 1, mark);
        zip_rows(to.data(), x.data(), one ? nullptr : y.data(), n, stride);
        EXPECT(same(to[padded].first, mark.first), "a pair too many at n = ", n);
        for (size_t i = 0; i < padded; ++i) {
          const bool inside = i < static_cast<size_t>(n);
          const bf16 zero(0.0f), first = inside ? x[i * static_cast<size_t>(stride)] : zero;
          const bf16 second = inside && !one ? y[i * static_cast<size_t>(stride)] : zero;
          EXPECT(same(to[i].first, first) && same(to[i].second, second), "n = ", n, ", i = ", i);
        }
      }
}

void check_transposed_pairs() {
  for (const int rows : {1, 16, 37})
    for (const int columns : {1, 15, 33}) {
      const auto from = random_bf16(2 * rows * columns, 5);
      const auto* pairs = reinterpret_cast<const Bf16Pair*>(from.data());
      std::vector<Bf16Pair> to(static_cast<size_t>(columns * (rows + 2)));
      transpose(pairs, columns, rows, columns, to.data(), rows + 2);
      clear_columns(to.data(), rows + 2, columns, rows, rows + 2);
      for (int j = 0; j < columns; ++j)
        for (int i = 0; i < rows + 2; ++i) {
          const Bf16Pair zero{}, want = i < rows ? pairs[i * columns + j] : zero;
          const Bf16Pair got = to[static_cast<size_t>(j * (rows + 2) + i)];
          EXPECT(same(got.first, want.first) && same(got.second, want.second), j, ",", i);
        }
    }
}

namespace {

// k pairs; `a` is [m, k] or its transpose.
template <bool kAccumulate, class Factors>
void check_matrices(int m, int n, int k, bool transposed_a, const float* factor, Factors factors) {
  const int ldb = round_up(n, kLane), lda = (transposed_a ? m : k) + 1;
  const auto a = random_bf16(2 * (transposed_a ? k : m) * lda, 1);
  const auto b = random_bf16(2 * k * ldb, 2);
  const auto before = random_floats(m * ldb, 4);
  auto c = before;
  const auto* pairs_a = reinterpret_cast<const Bf16Pair*>(a.data());
  const auto* pairs_b = reinterpret_cast<const Bf16Pair*>(b.data());
  multiply<kAccumulate>(m, ldb, k,
                        transposed_a ? transposed(pairs_a, lda) : row_major(pairs_a, lda), pairs_b,
                        ldb, c.data(), ldb, factors);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < ldb; ++j) {
      const auto at = static_cast<size_t>(i * ldb + j);
      double want = kAccumulate ? before[at] : 0.0;
      for (int p = 0; p < k; ++p) {
        const Bf16Pair x = pairs_a[transposed_a ? p * lda + i : i * lda + p];
        const Bf16Pair y = pairs_b[p * ldb + j];
        want += static_cast<double>(x.first) * y.first + static_cast<double>(x.second) * y.second;
      }
      want *= factor ? factor[j] : 1.0;
      EXPECT(std::fabs(c[at] - want) <= (k + 1) * 1e-6, m, "x", n, "x", k, " at ", i, ",", j, ": ",
             c[at], " want ", want);
    }
}

}  // namespace

void check_matrices_of_pairs() {
  const auto factor = random_floats(128, 6);
  for (const int m : {1, 5, 6, 13, 64})
    for (const int n : {1, 16, 40, 64, 112})
      for (const int k : {0, 1, 8, 33})
        for (const bool transposed_a : {false, true}) {
          check_matrices<false>(m, n, k, transposed_a, nullptr, NoFactors{});
          check_matrices<true>(m, n, k, transposed_a, nullptr, NoFactors{});
          check_matrices<false>(m, n, k, transposed_a, factor.data(), LaneFactors{factor.data()});
        }
}

void check_coarse_exponentials() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto of = [](float x) { return exp_coarse(splat(x))[kLane - 1]; };
  for (float x = -86; x < 88; x += 0.0173f) {
    const double want = std::exp(static_cast<double>(x));
    EXPECT(std::fabs(of(x) / want - 1) <= 3.5e-6 + 1e-7 * std::fabs(x), x, " gives ", of(x));
  }
  EXPECT(of(0) == 1);
  for (const float x : {-150.0f, -1e7f, -3e38f, -kInfinity})
    EXPECT(of(x) == 0, x, " gives ", of(x));
  for (const float x : {89.0f, 1e7f, kInfinity}) EXPECT(of(x) == kInfinity, x, " gives ", of(x));
  EXPECT(std::isnan(of(std::nanf(""))), "NaN is lost");
}

}  // namespace hw::test
