// SPDX-License-Identifier: Apache-2.0
// Element types of tensors, and the 16-bit formats as plain host+device structs.
//
//   f64, f32    IEEE binary64, binary32
//   bf16        8 exponent bits, 7 mantissa bits; the upper half of a binary32
//   f16         IEEE binary16
//   Accum<T>    the type in which T is accumulated: double for double, float otherwise
#pragma once

#include <bit>
#include <cstdint>

#include "core/gpu/convert.h"
#include "core/macros.h"

namespace hw {

enum class DType : int32_t { f64 = 0, f32 = 1, bf16 = 2, f16 = 3, i64 = 4, i32 = 5, u8 = 6 };

constexpr const char* dtype_name(DType t) {
  switch (t) {
    case DType::f64: return "float64";
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::i64: return "int64";
    case DType::i32: return "int32";
    case DType::u8: return "uint8";
  }
  return "unknown";
}

constexpr int dtype_size(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::u8: return 1;
  }
  return 0;
}

// bfloat16: conversion from float rounds to nearest even and keeps NaN a NaN. On the device both
// formats use the conversion instructions, which do the same.
struct bf16 {
  uint16_t bits;

  bf16() = default;
  HW_HOST_DEVICE explicit bf16(float x) : bits(round(x)) {}
  HW_HOST_DEVICE operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }

 private:
  HW_HOST_DEVICE static uint16_t round(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return dev::bf16_bits(x);
#else
    const uint32_t u = std::bit_cast<uint32_t>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x0040u);
    return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
  }
};

// IEEE half: conversions are exact in one direction and round to nearest even in the other,
// subnormals, infinities and NaN included.
struct f16 {
  uint16_t bits;

  f16() = default;
  HW_HOST_DEVICE explicit f16(float x) : bits(round(x)) {}
  HW_HOST_DEVICE operator float() const { return widen(bits); }

 private:
  HW_HOST_DEVICE static uint16_t round(float x) {
#if defined(__CUDA_ARCH__)
    return dev::f16_bits(x);
#else
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (a >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and above
    if (a < 0x38800000u) {                                               // subnormal half
      if (a < 0x33000000u) return static_cast<uint16_t>(sign);           // below 2^-25
      const uint32_t shift = 126u - (a >> 23);                           // 14 .. 24
      const uint32_t m = (a & 0x007fffffu) | 0x00800000u;
      const uint32_t q = m >> shift, rest = m & ((1u << shift) - 1u), half = 1u << (shift - 1u);
      return static_cast<uint16_t>(sign | (q + (rest > half || (rest == half && (q & 1u)))));
    }
    const uint32_t r = a + 0xfffu + ((a >> 13) & 1u);  // may carry into the exponent, up to inf
    return static_cast<uint16_t>(sign | ((r - 0x38000000u) >> 13));
#endif
  }
  HW_HOST_DEVICE static float widen(uint16_t h) {
#if defined(__CUDA_ARCH__)
    return dev::float_of_f16(h);
#else
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t e = (h >> 10) & 0x1fu, m = h & 0x3ffu;
    if (e == 31) return std::bit_cast<float>(sign | 0x7f800000u | (m << 13));
    if (e != 0) return std::bit_cast<float>(sign | ((e + 112u) << 23) | (m << 13));
    const float magnitude = static_cast<float>(m) * 5.9604644775390625e-8f;  // m * 2^-24
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
#endif
  }
};

template <class T>
struct AccumOf {
  using type = float;
};
template <>
struct AccumOf<double> {
  using type = double;
};
template <class T>
using Accum = typename AccumOf<T>::type;

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::f16;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::i64;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::i32;
};

}  // namespace hw
