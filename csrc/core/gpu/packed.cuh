// SPDX-License-Identifier: Apache-2.0
// Arithmetic on packed words: two 16-bit elements, the first in the lower half.
//
//   unpack<Element>(word)      both elements as floats, exact
//   multiply_bf16(a, b)        elementwise product, each rounded once to nearest even
#pragma once

#include "core/gpu/device.cuh"

namespace hw::dev {

struct Two {
  float lo, hi;
};

template <class Element>
HW_DEVICE HW_INLINE Two unpack(uint32_t word) {
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, f16>, "16-bit elements");
  if constexpr (std::is_same_v<Element, bf16>) {
    return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
  } else {
#if defined(__CUDA_ARCH__)
    Two two;  // cvt.f32.f16
    asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
        : "=f"(two.lo), "=f"(two.hi)
        : "r"(word));
    return two;
#else
    const f16 lo = std::bit_cast<f16>(static_cast<uint16_t>(word));
    const f16 hi = std::bit_cast<f16>(static_cast<uint16_t>(word >> 16));
    return {static_cast<float>(lo), static_cast<float>(hi)};
#endif
  }
}

// fma.rn.bf16x2 with -0 added: a plain product, which sm_80 has no instruction for
HW_DEVICE HW_INLINE uint32_t multiply_bf16(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(0x80008000u));
  return word;
#else
  const Two x = unpack<bf16>(a), y = unpack<bf16>(b);
  return pack_bf16(x.lo * y.lo, x.hi * y.hi);
#endif
}

}  // namespace hw::dev
