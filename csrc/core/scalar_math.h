// SPDX-License-Identifier: Apache-2.0
// Elementary functions of one number, under the names that core/cpu/simd_math.h gives to vectors,
// so that a functor serves kernels and CPU loops alike. NaN stays NaN.
#pragma once

#include <cmath>
#include <concepts>

#include "core/macros.h"

namespace hw {

HW_HOST_DEVICE HW_INLINE float exp_of(float x) { return expf(x); }
HW_HOST_DEVICE HW_INLINE double exp_of(double x) { return exp(x); }
HW_HOST_DEVICE HW_INLINE float tanh_of(float x) { return tanhf(x); }
HW_HOST_DEVICE HW_INLINE double tanh_of(double x) { return tanh(x); }
HW_HOST_DEVICE HW_INLINE float abs_of(float x) { return fabsf(x); }
HW_HOST_DEVICE HW_INLINE double abs_of(double x) { return fabs(x); }

// -1, 0, 1
template <std::floating_point T>
HW_HOST_DEVICE HW_INLINE T sign_of(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
}

// max(x, 0), and its derivative
template <std::floating_point T>
HW_HOST_DEVICE HW_INLINE T positive_of(T x) {
  return x < T(0) ? T(0) : x;
}
template <std::floating_point T>
HW_HOST_DEVICE HW_INLINE T step_of(T x) {
  return x > T(0) ? T(1) : T(0);
}

// 1 / (1 + e^-x)
template <std::floating_point T>
HW_HOST_DEVICE HW_INLINE T sigmoid_of(T x) {
  return T(1) / (T(1) + exp_of(-x));
}

}  // namespace hw
