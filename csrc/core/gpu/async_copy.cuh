// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory.                          cp.async (sm_80)
//
//   copy_async_16(to, from, valid)   starts copying 16 bytes, of which the first `valid` are read
//                                    and the others are zero; with valid = 0 nothing is read
//   copy_async_commit()              closes the calling thread's group of copies (may be empty)
//   copy_async_wait<N>()             waits until all but the N latest closed groups have landed
//
// Both addresses are aligned to the size of the copy. Groups belong to a thread: what others have
// copied is visible after they have waited and a barrier has been passed. Until the wait returns,
// the destination may hold the old or the new content: it must be neither read nor written, which
// is why a stage is refilled only after a barrier behind its last reader.
#pragma once

#include "core/gpu/device.cuh"

namespace hw::dev {

#if !defined(HW_EMULATE)
// The 32-bit address of generic pointer `p` into shared memory.
HW_DEVICE HW_INLINE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// cp.async.cg.shared.global 16
HW_DEVICE HW_INLINE void copy_async_16(void* to, const void* from, int valid = 16 HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::copy_async(to, from, 16, valid, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
#else
  __trap();
#endif
}

// cp.async.ca.shared.global 8
HW_DEVICE HW_INLINE void copy_async_8(void* to, const void* from, int valid = 8 HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::copy_async(to, from, 8, valid, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
#else
  __trap();
#endif
}

// cp.async.ca.shared.global 4
HW_DEVICE HW_INLINE void copy_async_4(void* to, const void* from, int valid = 4 HW_AND_SITE) {
#if defined(HW_EMULATE)
  emu::copy_async(to, from, 4, valid, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
#else
  __trap();
#endif
}

// cp.async.commit_group
HW_DEVICE HW_INLINE void copy_async_commit() {
#if defined(HW_EMULATE)
  emu::copy_async_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  __trap();
#endif
}

// cp.async.wait_group N
template <int N>
HW_DEVICE HW_INLINE void copy_async_wait() {
  static_assert(N >= 0, "the number of groups that may still be under way");
#if defined(HW_EMULATE)
  emu::copy_async_wait(N);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  __trap();
#endif
}

}  // namespace hw::dev
