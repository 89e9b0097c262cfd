// SPDX-License-Identifier: Apache-2.0
// The seam: everything that kernel code may know of the GPU, together with core/gpu/mma.cuh
// and core/gpu/async_copy.cuh.
//
// Each name has two bodies side by side: the device instruction (named on the right of its comment)
// and the emulator's, chosen by HW_EMULATE. A kernel is a struct
//
//   struct ScanKernel {
//     struct Params { ... };                     trivially copyable, at most 4 KB
//     static constexpr int kThreads = 128;       threads of a block, at most 1024
//     static constexpr int kMinBlocks = 2;       optional: blocks per multiprocessor to aim at
//     HW_DEVICE static void main(const Params& p);
//   };
//   hw::launch<ScanKernel>(Grid{x, y, z}, shared_bytes, context, params);       (core/gpu/launch.h)
//
// Everything named warp-wide must be reached by all lanes of the warp that have not exited, in the
// same place of the source; a shuffle that reads an exited lane gives an unspecified value.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "core/gpu/launch.h"
#include "core/macros.h"

#if !defined(HW_EMULATE) && !defined(__CUDACC__)
#error "core/gpu/device.cuh is for kernels: compile with nvcc, or with -DHW_EMULATE to emulate"
#endif

// In the emulator every operation that can wait carries the place of its call, for its reports.
#if defined(HW_EMULATE)
#include "emu/emulator.h"
#define HW_SITE ::hw::emu::Site site = ::hw::emu::Site::current()
#define HW_AND_SITE , HW_SITE
#define HW_PASS_SITE , site
#else
#define HW_SITE
#define HW_AND_SITE
#define HW_PASS_SITE
#endif

namespace hw::dev {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- Where am I -------------------------------------------------------------------------------

// Thread of the block, 0 .. kThreads - 1.                                                  %tid.x
HW_DEVICE HW_INLINE int thread_index() {
#if defined(HW_EMULATE)
  return emu::current->index;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// Block of the grid.                                                                      %ctaid
HW_DEVICE HW_INLINE int block_index_x() {
#if defined(HW_EMULATE)
  return emu::current->block->index[0];
#else
  return static_cast<int>(blockIdx.x);
#endif
}
HW_DEVICE HW_INLINE int block_index_y() {
#if defined(HW_EMULATE)
  return emu::current->block->index[1];
#else
  return static_cast<int>(blockIdx.y);
#endif
}
HW_DEVICE HW_INLINE int block_index_z() {
#if defined(HW_EMULATE)
  return emu::current->block->index[2];
#else
  return static_cast<int>(blockIdx.z);
#endif
}

// Blocks of the grid.                                                                    %nctaid
HW_DEVICE HW_INLINE int grid_size_x() {
#if defined(HW_EMULATE)
  return emu::current->block->grid[0];
#else
  return static_cast<int>(gridDim.x);
#endif
}
HW_DEVICE HW_INLINE int grid_size_y() {
#if defined(HW_EMULATE)
  return emu::current->block->grid[1];
#else
  return static_cast<int>(gridDim.y);
#endif
}
HW_DEVICE HW_INLINE int grid_size_z() {
#if defined(HW_EMULATE)
  return emu::current->block->grid[2];
#else
  return static_cast<int>(gridDim.z);
#endif
}

// Lane of the warp, 0 .. 31, and warp of the block.
HW_DEVICE HW_INLINE int lane() { return thread_index() % kWarp; }
HW_DEVICE HW_INLINE int warp() { return thread_index() / kWarp; }

// The block's dynamic shared memory, 128-byte aligned; every call gives the same address. Its
// content is unspecified at the start of a block (the emulator poisons it).       extern __shared__
template <class T>
HW_DEVICE HW_INLINE T* shared(HW_SITE) {
  static_assert(alignof(T) <= 128, "dynamic shared memory is 128-byte aligned");
#if defined(HW_EMULATE)
  return static_cast<T*>(emu::shared(sizeof(T), site));
#else
  extern __shared__ __align__(128) unsigned char hw_dynamic_shared[];
  return reinterpret_cast<T*>(hw_dynamic_shared);
#endif
}

// ---- Barriers: execution and memory order among the threads that meet ---------------------------

// All threads of the block that have not exited.                                      bar.sync 0
HW_DEVICE HW_INLINE void sync_block(HW_SITE) {
#if defined(HW_EMULATE)
  emu::sync_block(site);
#else
  __syncthreads();
#endif
}

// All lanes of the warp that have not exited.                                      bar.warp.sync
HW_DEVICE HW_INLINE void sync_warp(HW_SITE) {
#if defined(HW_EMULATE)
  emu::sync_warp(site);
#else
  __syncwarp();
#endif
}

// Named barrier `id` (1 .. 15) of `threads` threads, whole warps; the warps may wait for it at
// different places of the source.                                            bar.sync id, threads
HW_DEVICE HW_INLINE void sync_group(int id, int threads HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::sync_group(id, threads, site);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- Exchange within a warp ---------------------------------------------------------------------

#if !defined(HW_EMULATE)
// A value of any size, moved 32 bits at a time.
template <class T, class Move>
HW_DEVICE HW_INLINE T by_words(const T& v, Move move) {
  constexpr int kWords = (static_cast<int>(sizeof(T)) + 3) / 4;
  uint32_t word[kWords] = {};
  memcpy(word, &v, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) word[i] = move(word[i]);
  T result;
  memcpy(&result, word, sizeof(T));
  return result;
}
#endif

// The value of lane `source` (modulo 32).                                          shfl.sync.idx
template <class T>
HW_DEVICE HW_INLINE T shuffle(T v, int source HW_AND_SITE) {
  static_assert(std::is_trivially_copyable_v<T>, "shuffle moves plain values");
#if defined(HW_EMULATE)
  emu::shuffle(emu::kShuffle, &v, sizeof(T), source & (kWarp - 1), site);
  return v;
#else
  return by_words(v, [=](uint32_t w) { return __shfl_sync(kAllLanes, w, source); });
#endif
}

// The value of lane (own ^ mask).                                                 shfl.sync.bfly
template <class T>
HW_DEVICE HW_INLINE T shuffle_xor(T v, int mask HW_AND_SITE) {
  static_assert(std::is_trivially_copyable_v<T>, "shuffle moves plain values");
#if defined(HW_EMULATE)
  emu::shuffle(emu::kShuffleXor, &v, sizeof(T), (lane() ^ mask) & (kWarp - 1), site);
  return v;
#else
  return by_words(v, [=](uint32_t w) { return __shfl_xor_sync(kAllLanes, w, mask); });
#endif
}

// The value of lane (own - n); the first n lanes keep their own.                    shfl.sync.up
template <class T>
HW_DEVICE HW_INLINE T shuffle_up(T v, int n HW_AND_SITE) {
  static_assert(std::is_trivially_copyable_v<T>, "shuffle moves plain values");
#if defined(HW_EMULATE)
  emu::shuffle(emu::kShuffleUp, &v, sizeof(T), lane() < n ? lane() : lane() - n, site);
  return v;
#else
  return by_words(v, [=](uint32_t w) { return __shfl_up_sync(kAllLanes, w, n); });
#endif
}

// The value of lane (own + n); the last n lanes keep their own.                   shfl.sync.down
template <class T>
HW_DEVICE HW_INLINE T shuffle_down(T v, int n HW_AND_SITE) {
  static_assert(std::is_trivially_copyable_v<T>, "shuffle moves plain values");
#if defined(HW_EMULATE)
  emu::shuffle(emu::kShuffleDown, &v, sizeof(T), lane() + n >= kWarp ? lane() : lane() + n, site);
  return v;
#else
  return by_words(v, [=](uint32_t w) { return __shfl_down_sync(kAllLanes, w, n); });
#endif
}

// Bit i: lane i has not exited and its predicate holds.                         vote.sync.ballot
HW_DEVICE HW_INLINE uint32_t ballot(bool predicate HW_AND_SITE) {
#if defined(HW_EMULATE)
  return emu::ballot(emu::kBallot, predicate, site).yes;
#else
  return __ballot_sync(kAllLanes, predicate);
#endif
}

// Whether the predicate holds in any lane, in all lanes that have not exited.   vote.sync.any, all
HW_DEVICE HW_INLINE bool any(bool predicate HW_AND_SITE) {
#if defined(HW_EMULATE)
  return emu::ballot(emu::kAny, predicate, site).yes != 0;
#else
  return __any_sync(kAllLanes, predicate) != 0;
#endif
}
HW_DEVICE HW_INLINE bool all(bool predicate HW_AND_SITE) {
#if defined(HW_EMULATE)
  const emu::Votes votes = emu::ballot(emu::kAll, predicate, site);
  return votes.yes == votes.voted;
#else
  return __all_sync(kAllLanes, predicate) != 0;
#endif
}

// The larger value; of a number and a NaN the number.                          max.f32 and others
template <class T>
HW_DEVICE HW_INLINE T larger(T a, T b) {
  if constexpr (std::is_same_v<T, float>) return fmaxf(a, b);
  if constexpr (std::is_same_v<T, double>) return fmax(a, b);
  return a > b ? a : b;
}

// Sum and maximum over aligned groups of kLanes lanes (32: the warp, 4: a row of an mma fragment);
// every lane of the group gets the same bits.
template <int kLanes = kWarp, class T>
HW_DEVICE HW_INLINE T warp_sum(T v HW_AND_SITE) {
  static_assert(kLanes >= 1 && kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0, "a power of two");
  HW_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v = v + shuffle_xor(v, mask HW_PASS_SITE);
  return v;
}
template <int kLanes = kWarp, class T>
HW_DEVICE HW_INLINE T warp_max(T v HW_AND_SITE) {
  static_assert(kLanes >= 1 && kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0, "a power of two");
  HW_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v = larger(v, shuffle_xor(v, mask HW_PASS_SITE));
  return v;
}

// ---- Atomics, on shared or global memory: returns the value before ------------------------------

// Integers only (int, unsigned, unsigned long long): float atomics are not deterministic.  atom.add
template <class T>
HW_DEVICE HW_INLINE T atomic_add(T* address, T value) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || std::is_same_v<T, unsigned long long>),
                "atomic_add takes int, unsigned or unsigned long long");
#if defined(HW_EMULATE)
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
#else
  return atomicAdd(address, value);
#endif
}

// ---- Fast maths: about 2 ulp, subnormal arguments and results are zero --------------------------

// 2^x                                                                         ex2.approx.ftz.f32
HW_DEVICE HW_INLINE float exp2_fast(float x) {
#if defined(HW_EMULATE)
  return emu::flush(std::exp2(emu::flush(x)));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x                                                                       rcp.approx.ftz.f32
HW_DEVICE HW_INLINE float rcp_fast(float x) {
#if defined(HW_EMULATE)
  return emu::flush(emu::divide(1.0f, emu::flush(x)));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / sqrt(x)                                                               rsqrt.approx.ftz.f32
HW_DEVICE HW_INLINE float rsqrt_fast(float x) {
#if defined(HW_EMULATE)
  return emu::flush(emu::divide(1.0f, std::sqrt(emu::flush(x))));
#else
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2(x)                                                                     lg2.approx.ftz.f32
HW_DEVICE HW_INLINE float log2_fast(float x) {
#if defined(HW_EMULATE)
  return emu::flush(std::log2(emu::flush(x)));
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// ---- Packing: two 16-bit elements in a word, `lo` in the lower half, rounded to nearest even ----

// cvt.rn.bf16x2.f32
HW_DEVICE HW_INLINE uint32_t pack_bf16(float lo, float hi) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
#else
  return static_cast<uint32_t>(bf16(lo).bits) | static_cast<uint32_t>(bf16(hi).bits) << 16;
#endif
}

// cvt.rn.f16x2.f32
HW_DEVICE HW_INLINE uint32_t pack_f16(float lo, float hi) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
#else
  return static_cast<uint32_t>(f16(lo).bits) | static_cast<uint32_t>(f16(hi).bits) << 16;
#endif
}

// The same for Element = bf16 or f16.
template <class Element>
HW_DEVICE HW_INLINE uint32_t pack(float lo, float hi) {
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, f16>, "16-bit elements");
  if constexpr (std::is_same_v<Element, bf16>)
    return pack_bf16(lo, hi);
  else
    return pack_f16(lo, hi);
}

}  // namespace hw::dev
