// SPDX-License-Identifier: Apache-2.0
// Function qualifiers that let one header serve nvcc, the emulator and the CPU code.
//
//   HW_HOST_DEVICE   callable on both sides
//   HW_DEVICE        device code; in the emulator build an ordinary host function
//   HW_INLINE        forced inlining, for the innermost primitives
//   HW_NOINLINE      one copy of a step that takes much longer than its call: CPU code is compiled
//                    for several instruction sets, and each copy costs the one who installs it
#pragma once

#if defined(__CUDACC__)
#define HW_HOST_DEVICE __host__ __device__
#define HW_DEVICE __device__
#define HW_INLINE __forceinline__
#else
#define HW_HOST_DEVICE
#define HW_DEVICE
#if defined(HW_COVERAGE)  // gcov keeps apart what is a function of its own
#define HW_INLINE inline
#else
#define HW_INLINE inline __attribute__((always_inline))
#endif
#define HW_NOINLINE __attribute__((noinline))
#endif

#if defined(__CUDACC__)
#define HW_UNROLL _Pragma("unroll")
#else
#define HW_UNROLL _Pragma("GCC unroll 32")
#endif

// Unrolls the following loop of a kernel n times; ordinary compilers decide for themselves.
#if defined(__CUDA_ARCH__)
#define HW_PRAGMA(text) _Pragma(#text)
#define HW_UNROLL_BY(n) HW_PRAGMA(unroll n)
#else
#define HW_UNROLL_BY(n)
#endif
