// SPDX-License-Identifier: Apache-2.0
// CPU vectors, the small matrix product and the parallel loop against plain loops.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "native_test.h"

#include "core/cpu/matmul.h"
#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "core/cpu/simd_math.h"
#include "core/ref.h"

namespace {

template <class T>
std::vector<T> random_values(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(-1, 1);
  std::vector<T> values(static_cast<size_t>(n));
  for (T& x : values) x = static_cast<T>(uniform(random));
  return values;
}

TEST(ref_indexes_with_any_stride) {
  int data[24];
  for (int i = 0; i < 24; ++i) data[i] = i;
  hw::Ref<int, 3> r{data, {2, 3, 4}, {12, 4, 1}};
  EXPECT(r(1, 2, 3) == 23);
  EXPECT(r.slice(1)(0, 2) == 14);
  hw::Ref<const int, 2> same{data, {5, 4}, {0, 1}};
  EXPECT(same(4, 3) == 3 && same.at(2) == data);
  const hw::Ref<void, 1> absent, present{data, {24}, {1}};
  EXPECT(!absent && present.as<int>()(23) == 23);
}

template <class T>
void check_lanes() {
  constexpr int n = hw::kLanes<T>;
  const auto values = random_values<T>(n * n, 3);
  hw::Vec<T> rows[n];
  for (int i = 0; i < n; ++i) rows[i] = hw::load(values.data() + i * n);
  T total = 0;
  for (int i = 0; i < n; ++i) total += values[static_cast<size_t>(i)];
  EXPECT(hw::sum<T>(rows[0]) == total);
  hw::transpose_square<T>(rows);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) EXPECT(rows[i][j] == values[static_cast<size_t>(j * n + i)]);
}

TEST(vectors_load_sum_and_transpose) {
  check_lanes<float>();
  check_lanes<double>();
}

template <class T>
void check_across() {
  constexpr int n = hw::kLanes<T>;
  using V = hw::Vec<T>;
  const auto values = random_values<T>(n * n, 4);
  hw::Vec<T> sums[n], tops[n];
  for (int i = 0; i < n; ++i) sums[i] = tops[i] = hw::load(values.data() + i * n);
  const V sum = hw::across<T>(sums, [](V a, V b) { return a + b; });
  const V top = hw::across<T>(tops, [](V a, V b) { return hw::larger(a, b); });
  for (int i = 0; i < n; ++i) {
    T want = 0, most = values[static_cast<size_t>(i * n)];
    for (int j = 0; j < n; ++j) {
      const T x = values[static_cast<size_t>(i * n + j)];
      want += x;
      most = x > most ? x : most;
    }
    EXPECT(std::fabs(sum[i] - want) < T(1e-5), i, ": ", sum[i], " want ", want);
    EXPECT(top[i] == most, i, ": ", top[i], " want ", most);
  }
}

TEST(lanes_combine_across_a_square) {
  check_across<float>();
  check_across<double>();
}

template <class T>
void check_larger_and_smaller() {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const hw::Vec<T> one = hw::splat(T(1)), two = hw::splat(T(2)), none = hw::splat(nan);
  EXPECT(hw::larger(one, two)[0] == 2 && hw::larger(two, one)[0] == 2);
  EXPECT(hw::smaller(one, two)[0] == 1 && hw::smaller(two, one)[0] == 1);
  EXPECT(hw::larger(none, one)[0] == 1 && hw::smaller(none, one)[0] == 1);
  EXPECT(std::isnan(hw::larger(one, none)[0]) && std::isnan(hw::smaller(one, none)[0]));
}

TEST(beside_a_nan_the_second_counts) {
  check_larger_and_smaller<float>();
  check_larger_and_smaller<double>();
}

template <class T>
void check_widen_and_narrow() {
  for (const int stride : {1, 3}) {
    for (const int n : {0, 1, 7, 8, 9, 33}) {
      const auto source = random_values<float>(n * stride + 1, 5);
      std::vector<T> narrowed(source.size()), again(source.size());
      std::vector<float> wide(static_cast<size_t>(n) + 1, 7.0f);
      for (size_t i = 0; i < source.size(); ++i) narrowed[i] = static_cast<T>(source[i]);
      hw::widen(wide.data(), narrowed.data(), n, stride);
      EXPECT(wide[static_cast<size_t>(n)] == 7.0f, "one element too many");
      for (int i = 0; i < n; ++i)
        EXPECT(wide[static_cast<size_t>(i)] ==
               static_cast<float>(narrowed[static_cast<size_t>(i * stride)]));
      hw::narrow(again.data(), wide.data(), n, stride);
      for (int i = 0; i < n; ++i)
        EXPECT(static_cast<float>(again[static_cast<size_t>(i * stride)]) ==
               wide[static_cast<size_t>(i)]);
    }
  }
}

TEST(rows_widen_and_narrow) {
  check_widen_and_narrow<float>();
  check_widen_and_narrow<hw::bf16>();
  check_widen_and_narrow<hw::f16>();
}

// NaN, infinities, ties and subnormals come by chance; in whole vectors and behind them.
TEST(rows_are_rounded_to_bf16_as_single_numbers_are) {
  std::mt19937 random(1);
  std::vector<float> wide(100003);
  for (float& x : wide) x = std::bit_cast<float>(static_cast<uint32_t>(random()));
  for (size_t i = 0; i < wide.size(); i += 3)
    wide[i] = std::bit_cast<float>((std::bit_cast<uint32_t>(wide[i]) & 0xffff0000u) | 0x8000u);
  std::vector<hw::bf16> rounded(wide.size());
  hw::narrow(rounded.data(), wide.data(), static_cast<int64_t>(wide.size()));
  for (size_t i = 0; i < wide.size(); ++i)
    EXPECT(rounded[i].bits == hw::bf16(wide[i]).bits, wide[i], " gives ", rounded[i].bits);
}

template <class T, bool kAccumulate>
void check_product(int m, int n, int k, bool transposed) {
  const int ldb = hw::round_up(n, hw::kLanes<T>), lda = (transposed ? m : k) + 1;
  const auto a = random_values<T>((transposed ? k : m) * lda, 1), b = random_values<T>(k * ldb, 2);
  const auto before = random_values<T>(m * ldb, 4);
  auto c = before, of_pointers = before;
  const auto left = transposed ? hw::transposed(a.data(), lda) : hw::row_major(a.data(), lda);
  hw::multiply<kAccumulate>(m, ldb, k, left, b.data(), ldb, c.data(), ldb);
  std::vector<const T*> rows;
  for (int p = 0; p < k; ++p) rows.push_back(b.data() + p * ldb);
  hw::multiply<kAccumulate>(m, ldb, k, left, hw::RowPointers<T>{rows.data()}, of_pointers.data(),
                            ldb);
  EXPECT(of_pointers == c, m, "x", n, "x", k, ": rows by pointers give something else");
  const double bound = (k + 1) * 4.0 * (sizeof(T) == 4 ? 6e-8 : 1.2e-16);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < ldb; ++j) {
      double want = kAccumulate ? static_cast<double>(before[static_cast<size_t>(i * ldb + j)]) : 0;
      for (int p = 0; p < k; ++p)
        want +=
            static_cast<double>(a[static_cast<size_t>(transposed ? p * lda + i : i * lda + p)]) *
            b[static_cast<size_t>(p * ldb + j)];
      const double got = c[static_cast<size_t>(i * ldb + j)];
      EXPECT(std::fabs(got - want) <= bound, m, "x", n, "x", k, " at ", i, ",", j, ": ", got,
             " want ", want);
    }
}

TEST(small_products_match_plain_loops) {
  for (const int m : {1, 2, 5, 6, 7, 13, 64})
    for (const int n : {1, 8, 16, 24, 60, 112})
      for (const int k : {0, 1, 16, 65})
        for (const bool transposed : {false, true}) {
          check_product<float, false>(m, n, k, transposed);
          check_product<float, true>(m, n, k, transposed);
          check_product<double, true>(m, n, k, transposed);
        }
}

TEST(memory_is_cleared_past_the_caches) {
  for (const int64_t offset : {0, 16, 7})
    for (const int64_t bytes : {0, 5, 64, 200, 512}) {
      alignas(64) char memory[1024];
      std::fill_n(memory, sizeof memory, 'x');
      hw::clear_past_caches(memory + 64 + offset, bytes);
      hw::finish_past_caches();
      for (int64_t i = 0; i < 1024; ++i) {
        const bool inside = i >= 64 + offset && i < 64 + offset + bytes;
        EXPECT(memory[i] == (inside ? '\0' : 'x'), offset, " ", bytes, " at ", i);
      }
    }
}

TEST(parallel_tasks_runs_each_task_once) {
  for (const int threads : {1, 2, 3}) {
    std::vector<std::atomic<int>> runs(101);
    hw::parallel_tasks(101, threads, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
    for (const auto& n : runs) EXPECT(n == 1);
  }
}

TEST(parallel_walks_hand_out_each_number_once) {
  for (const int threads : {1, 2, 3})
    for (const int64_t piece : {1, 4, 200}) {
      std::vector<std::atomic<int>> runs(101);
      std::atomic<int> out_of_order{0};
      hw::parallel_walks(101, piece, threads, [&](auto next) {
        int64_t last = -1;
        for (int64_t i = next(); i >= 0; last = i, i = next()) {
          ++runs[static_cast<size_t>(i)];
          if (i <= last || (i % piece != 0 && i != last + 1)) ++out_of_order;
        }
        if (next() != -1) ++out_of_order;
      });
      for (const auto& n : runs) EXPECT(n == 1);
      EXPECT(out_of_order == 0);
    }
  hw::parallel_walks(0, 4, 2, [&](auto next) { EXPECT(next() == -1); });
}

TEST(parallel_walks_hand_on_exceptions) {
  bool caught = false;
  try {
    hw::parallel_walks(8, 1, 2, [](auto next) {
      for (int64_t i = next(); i >= 0; i = next())
        hw::check(i != 5, hw::ErrorKind::value, "number ", i);
    });
  } catch (const hw::Error& e) {
    caught = std::string(e.what()) == "number 5";
  }
  EXPECT(caught);
}

TEST(parallel_tasks_hands_on_exceptions) {
  for (const int threads : {1, 2}) {
    bool caught = false;
    try {
      hw::parallel_tasks(8, threads,
                         [](int64_t i) { hw::check(i != 5, hw::ErrorKind::value, "task ", i); });
    } catch (const hw::Error& e) {
      caught = e.kind() == hw::ErrorKind::value && std::string(e.what()) == "task 5";
    }
    EXPECT(caught);
  }
}

TEST(scratch_is_aligned_and_bounded) {
  hw::Scratch scratch;
  scratch.reset(hw::Scratch::bytes_of<float>(3) + hw::Scratch::bytes_of<double>(9));
  float* a = scratch.take<float>(3);
  double* b = scratch.take<double>(9);
  EXPECT(reinterpret_cast<uintptr_t>(a) % 64 == 0 && reinterpret_cast<uintptr_t>(b) % 64 == 0);
  EXPECT(reinterpret_cast<char*>(b) - reinterpret_cast<char*>(a) == 64);
}

}  // namespace
