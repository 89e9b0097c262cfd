// SPDX-License-Identifier: Apache-2.0
// Tensor-core primitives of a warp: matrix loads from shared memory and matrix multiply-accumulate.
//
//   D[16, 8] += A[16, K] B[K, 8]      K = 16 for bf16 and f16, 8 for tf32;  D in fp32
//
// Who holds what, with g = lane / 4 (0 .. 7) and t = lane % 4; an index pair is (row, column), and
// 16-bit registers hold two elements, the lower index in the lower half:
//
//   D   d[0], d[1] = (g, 2t + 0, 1)            d[2], d[3] = (g + 8, 2t + 0, 1)
//   16-bit  A   a[0] = (g, 2t + 0, 1)          a[1] = (g + 8, 2t + 0, 1)
//               a[2] = (g, 2t + 8, 9)          a[3] = (g + 8, 2t + 8, 9)
//           B   b[0] = (2t + 0, 1; g)          b[1] = (2t + 8, 9; g)
//   tf32    A   a[0] = (g, t)                  a[1] = (g + 8, t)
//               a[2] = (g, t + 4)              a[3] = (g + 8, t + 4)
//           B   b[0] = (t, g)                  b[1] = (t + 4, g)
//
// Matrix loads: M_i, i = 0 .. 3, are 8x8 matrices of 16-bit elements whose row r (16 bytes,
// aligned) is at the address given by lane 8 i + r. regs[i] then holds of M_i
//   plain        (g, 2t + 0, 1)     so that M_0 .. M_3 = A's quarters (top left, bottom left, top
//                                   right, bottom right) of a row-major A give a[0 .. 3], and the
//                                   rows of B^T (stored [N, K]) give b
//   transposed   (2t + 0, 1; g)     so that the rows of B (stored [K, N]) give b
#pragma once

#include "core/gpu/async_copy.cuh"
#include "core/gpu/device.cuh"

namespace hw::dev {

// A row's address that differs from another one by constants: bits `flip` of it exclusive-ored,
// then `shift` bytes. A few rows of a swizzled tile thus share one register.
struct AddressOffset {
  int flip = 0, shift = 0;
};

#if defined(HW_EMULATE)
inline const void* by(const void* row, AddressOffset offset) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(row) ^ static_cast<uintptr_t>(offset.flip);
  return reinterpret_cast<const void*>(at + static_cast<uintptr_t>(offset.shift));
}
#else
HW_DEVICE HW_INLINE uint32_t by(const void* row, AddressOffset offset) {
  return (shared_address(row) ^ static_cast<uint32_t>(offset.flip)) +
         static_cast<uint32_t>(offset.shift);
}
#endif

// Four matrices; every lane gives a row.                      ldmatrix.sync.aligned.m8n8.x4 (sm_75)
HW_DEVICE HW_INLINE void load_matrix_x4(
    uint32_t regs[4], const void* row, AddressOffset offset = {} HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::load_matrix(emu::kLoadMatrixX4, regs, by(row, offset), site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(regs[0]), "=r"(regs[1]), "=r"(regs[2]), "=r"(regs[3])
               : "r"(by(row, offset))
               : "memory");
#endif
}

// The same, each matrix transposed.
HW_DEVICE HW_INLINE void load_matrix_x4_transposed(
    uint32_t regs[4], const void* row, AddressOffset offset = {} HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::load_matrix(emu::kLoadMatrixX4Transposed, regs, by(row, offset), site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(regs[0]), "=r"(regs[1]), "=r"(regs[2]), "=r"(regs[3])
               : "r"(by(row, offset))
               : "memory");
#endif
}

// Two matrices; lanes 0 .. 15 give a row, the others any valid one.   ldmatrix.sync.aligned.m8n8.x2
HW_DEVICE HW_INLINE void load_matrix_x2(uint32_t regs[2], const void* row HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::load_matrix(emu::kLoadMatrixX2, regs, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(regs[0]), "=r"(regs[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

HW_DEVICE HW_INLINE void load_matrix_x2_transposed(uint32_t regs[2], const void* row HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::load_matrix(emu::kLoadMatrixX2Transposed, regs, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(regs[0]), "=r"(regs[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// d += a b                              mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 (sm_80)
HW_DEVICE HW_INLINE void mma_bf16(float d[4], const uint32_t a[4],
                                  const uint32_t b[2] HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::mma(emu::kMmaBf16, d, a, b, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// d += a b                                mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 (sm_80)
HW_DEVICE HW_INLINE void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2] HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::mma(emu::kMmaF16, d, a, b, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// The same for Element = bf16 or f16.
template <class Element>
HW_DEVICE HW_INLINE void mma_16x8x16(float d[4], const uint32_t a[4],
                                     const uint32_t b[2] HW_AND_SITE) {
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, f16>, "16-bit elements");
  if constexpr (std::is_same_v<Element, bf16>)
    mma_bf16(d, a, b HW_PASS_SITE);
  else
    mma_f16(d, a, b HW_PASS_SITE);
}

// x rounded to tf32 (10 mantissa bits, ties away from zero), as a float's bits.   cvt.rna.tf32.f32
HW_DEVICE HW_INLINE uint32_t to_tf32(float x) {
#if defined(HW_EMULATE)
  return emu::round_to_tf32(x);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  __trap();
  return 0;
#endif
}

// d += a b, K = 8; of each input the hardware ignores the lower 13 bits, so round with to_tf32.
//                                        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 (sm_80)
HW_DEVICE HW_INLINE void mma_tf32(float d[4], const uint32_t a[4],
                                  const uint32_t b[2] HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::mma(emu::kMmaTf32, d, a, b, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

}  // namespace hw::dev
