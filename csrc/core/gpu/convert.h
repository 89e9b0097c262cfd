// SPDX-License-Identifier: Apache-2.0
// Conversions between float and the 16-bit formats by the device's instructions: round to nearest
// even, NaN stays NaN. core/dtype.h has the same in integers, for the host.
#pragma once

#include <cstdint>

#include "core/macros.h"

#if defined(__CUDA_ARCH__)
namespace hw::dev {

#if __CUDA_ARCH__ >= 800
HW_DEVICE HW_INLINE uint16_t bf16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

HW_DEVICE HW_INLINE uint16_t f16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

HW_DEVICE HW_INLINE float float_of_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

}  // namespace hw::dev
#endif
