// SPDX-License-Identifier: Apache-2.0
// The 16-bit formats against definitions that share nothing with them: values from sign, exponent
// and mantissa by ldexp, rounding by searching the two neighbours.
#include <cmath>
#include <cstdint>
#include <random>

#include "native_test.h"

#include "core/dtype.h"

namespace {

// The value of 16 bits with `exponent` exponent bits.
double value_of(uint16_t bits, int exponent) {
  const int mantissa = 15 - exponent, bias = (1 << (exponent - 1)) - 1;
  const int e = (bits >> mantissa) & ((1 << exponent) - 1), m = bits & ((1 << mantissa) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (e == (1 << exponent) - 1) return m ? NAN : sign * INFINITY;
  if (e == 0) return sign * std::ldexp(m, 1 - bias - mantissa);
  return sign * std::ldexp(m + (1 << mantissa), e - bias - mantissa);
}

template <class Half, int kExponent>
void check_widening() {
  for (int i = 0; i < 65536; ++i) {
    Half h;
    h.bits = static_cast<uint16_t>(i);
    const double want = value_of(h.bits, kExponent), got = static_cast<float>(h);
    EXPECT((std::isnan(want) && std::isnan(got)) || want == got, i, " gives ", got, ", want ",
           want);
  }
}

// |x - round(x)| must be smallest; a tie goes to the even neighbour.
template <class Half, int kExponent>
void check_rounding(float x) {
  const uint16_t bits = Half(x).bits;
  const double rounded = value_of(bits, kExponent);
  if (std::isnan(x)) {
    EXPECT(std::isnan(rounded));
    return;
  }
  EXPECT(std::signbit(x) == ((bits & 0x8000) != 0), x);
  const uint16_t magnitude = bits & 0x7fff;
  const uint16_t infinity = static_cast<uint16_t>(((1 << kExponent) - 1) << (15 - kExponent));
  // Beyond the largest finite value the format goes on as if with one more exponent.
  const auto real = [&](int m) {
    if (m < infinity) return value_of(static_cast<uint16_t>(m), kExponent);
    const double top = value_of(static_cast<uint16_t>(infinity - 1), kExponent);
    return 2 * top - value_of(static_cast<uint16_t>(infinity - 2), kExponent);
  };
  const double a = std::fabs(static_cast<double>(x));
  if (magnitude == infinity && a >= real(infinity)) return;
  const double error = std::fabs(a - real(magnitude));
  for (const int other : {magnitude - 1, magnitude + 1}) {
    if (other < 0 || other > infinity) continue;
    const double theirs = std::fabs(a - real(other));
    EXPECT(error < theirs || (error == theirs && magnitude % 2 == 0), x, " gives ", rounded);
  }
}

template <class Half, int kExponent>
void check_roundings() {
  std::mt19937 random(1);
  for (int i = 0; i < 2000000; ++i)
    check_rounding<Half, kExponent>(std::bit_cast<float>(static_cast<uint32_t>(random())));
  for (const float x : {INFINITY, -INFINITY})
    EXPECT(value_of(Half(x).bits, kExponent) == static_cast<double>(x));
  // Every value, every midpoint and their neighbours.
  for (int i = 0; i < 32768; ++i) {
    const double low = value_of(static_cast<uint16_t>(i), kExponent);
    const double high = value_of(static_cast<uint16_t>(i + 1), kExponent);
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    const float middle = static_cast<float>((low + high) / 2);
    for (const float x : {static_cast<float>(low), middle, std::nextafter(middle, 0.0f),
                          std::nextafter(middle, INFINITY)}) {
      check_rounding<Half, kExponent>(x);
      check_rounding<Half, kExponent>(-x);
    }
  }
}

TEST(bf16_widens_exactly) { check_widening<hw::bf16, 8>(); }
TEST(f16_widens_exactly) { check_widening<hw::f16, 5>(); }
TEST(bf16_rounds_to_nearest_even) { check_roundings<hw::bf16, 8>(); }
TEST(f16_rounds_to_nearest_even) { check_roundings<hw::f16, 5>(); }

}  // namespace
