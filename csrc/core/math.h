// SPDX-License-Identifier: Apache-2.0
// Integer helpers shared by host and device code.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace hw {

template <class T>
HW_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
HW_HOST_DEVICE constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

template <class T>
HW_HOST_DEVICE constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
HW_HOST_DEVICE constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}

}  // namespace hw
