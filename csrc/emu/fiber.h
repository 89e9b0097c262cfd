// SPDX-License-Identifier: Apache-2.0
// A fiber: a stack and a place to go on. Switching saves the registers that the calling convention
// makes the callee keep; floating-point control words are shared by all fibers.
//
// Switches are written in assembly for x86-64 and aarch64, because swapcontext() makes a system
// call each time (measured: docs/emulator.md); HW_EMU_UCONTEXT, and other machines, use ucontext.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(HW_EMU_UCONTEXT) && \
    !(defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)))
#define HW_EMU_UCONTEXT
#endif

#if defined(HW_EMU_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define HW_EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HW_EMU_ASAN 1
#endif
#endif
#if !defined(HW_EMU_ASAN)
#define HW_EMU_ASAN 0
#endif

namespace hw::emu {

class Fiber {
 public:
  // The calling host thread itself, as something to switch from and back to.
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Gives the fiber a stack, below which lies an inaccessible page. The first switch to it calls
  // `entry`, which must call entered() first and must never return. `number` tells fibers apart:
  // their stacks start at different offsets, so that they do not compete for the same cache sets.
  void create(void (*entry)(), int number);
  bool created() const { return mapping_ != nullptr; }
  bool on_stack(const void* p) const {
    return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(stack_bottom_) <
           stack_bytes_;
  }

  // Leaves this fiber, which must be the running one, for another; returns when switched back to.
  void switch_to(Fiber& to);
  static void entered();

 private:
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
#if defined(HW_EMU_UCONTEXT)
  ucontext_t context_ = {};
#else
  void* stack_pointer_ = nullptr;
#endif
  // For AddressSanitizer: the bounds of the stack and what it keeps for an inactive one.
  const void* stack_bottom_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace hw::emu
