// SPDX-License-Identifier: Apache-2.0
// Order keys against the comparison of numbers: all 16-bit patterns, and corner cases of the
// others.
#include <cmath>
#include <limits>
#include <vector>

#include "native_test.h"

#include "core/sort_key.h"

namespace {

using hw::sort_key;

// x before y: the smaller, NaN before every number.
template <class T>
bool precedes(T x, T y) {
  const double a = static_cast<double>(static_cast<hw::Accum<T>>(x));
  const double b = static_cast<double>(static_cast<hw::Accum<T>>(y));
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && !std::isnan(b);
  return a < b;
}

template <class T>
void check_all_pairs(const std::vector<T>& values) {
  for (size_t i = 0; i < values.size(); ++i)
    for (size_t j = 0; j < values.size(); ++j)
      EXPECT((sort_key(values[i]) < sort_key(values[j])) == precedes(values[i], values[j]), i,
             " and ", j);
}

// Neighbouring patterns of a 16-bit format, then distant ones.
template <class T>
void check_patterns() {
  std::vector<T> some;
  for (int bits = 0; bits < 65536; ++bits) {
    T x, y;
    x.bits = static_cast<uint16_t>(bits), y.bits = static_cast<uint16_t>(bits + 1);
    EXPECT((sort_key(x) < sort_key(y)) == precedes(x, y), "pattern ", bits);
    if (bits % 509 == 0) some.push_back(x);
  }
  check_all_pairs(some);
}

template <class T>
std::vector<T> corners() {
  using L = std::numeric_limits<T>;
  std::vector<T> v = {
      T(0),     L::denorm_min(), L::min(),      T(0.5), T(1), std::nextafter(T(1), T(2)),
      L::max(), L::infinity(),   L::quiet_NaN()};
  for (size_t i = 0, n = v.size(); i < n; ++i) v.push_back(-v[i]);
  return v;
}

TEST(order_keys) {
  check_patterns<hw::bf16>();
  check_patterns<hw::f16>();
  check_all_pairs(corners<float>());
  check_all_pairs(corners<double>());
  EXPECT(sort_key(0.0f) == sort_key(-0.0f), "zeros");
  EXPECT(sort_key(std::numeric_limits<float>::quiet_NaN()) == 0u, "NaN");
}

}  // namespace
