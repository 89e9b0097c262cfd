// SPDX-License-Identifier: Apache-2.0
#include "emu/fiber.h"

#include <cstdint>

#include <sys/mman.h>
#include <unistd.h>

#include "core/error.h"

#if HW_EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(HW_EMU_UCONTEXT)

// hw_emu_switch(void** save, void* load): pushes the callee-saved registers, stores the stack
// pointer at *save, continues on the stack `load` that an earlier call has saved.
extern "C" void hw_emu_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .globl hw_emu_switch
  .hidden hw_emu_switch
  .type hw_emu_switch, @function
hw_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size hw_emu_switch, . - hw_emu_switch
)");
// From the saved stack pointer up: six registers, the address to go on at, and its return address.
constexpr int kFrameWords = 8, kEntryWord = 6;
#else
asm(R"(
  .text
  .p2align 4
  .globl hw_emu_switch
  .hidden hw_emu_switch
  .type hw_emu_switch, %function
hw_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size hw_emu_switch, . - hw_emu_switch
)");
// Twelve integer registers, of which the last is the address to go on at, and eight others.
constexpr int kFrameWords = 20, kEntryWord = 11;
#endif

#endif  // !HW_EMU_UCONTEXT

namespace hw::emu {
namespace {

constexpr size_t kStackBytes = (HW_EMU_ASAN ? 256 : 128) * 1024;
// Consecutive stacks start this many bytes apart within a page and a half; a multiple of 64.
constexpr size_t kColours = 32, kColourBytes = 192;

#if HW_EMU_ASAN
thread_local Fiber* leaving = nullptr;
#endif

}  // namespace

void Fiber::create(void (*entry)(), int number) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  mapping_bytes_ = kStackBytes + page;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) mapping_ = nullptr;
  check(mapping_ != nullptr && mprotect(mapping_, page, PROT_NONE) == 0, ErrorKind::runtime,
        "emulator: no memory for the stack of thread ", number);
  char* bottom = static_cast<char*>(mapping_) + page;
  stack_bottom_ = bottom;
  stack_bytes_ = kStackBytes - (static_cast<size_t>(number) % kColours) * kColourBytes;
#if defined(HW_EMU_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = bottom;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // A fresh mapping is zero: so are the registers that the first switch will load.
  void** frame = reinterpret_cast<void**>(bottom + stack_bytes_) - kFrameWords;
  frame[kEntryWord] = reinterpret_cast<void*>(entry);
  stack_pointer_ = frame;
#endif
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
#if HW_EMU_ASAN
  ASAN_UNPOISON_MEMORY_REGION(mapping_, mapping_bytes_);
#endif
  munmap(mapping_, mapping_bytes_);
}

void Fiber::switch_to(Fiber& to) {
#if HW_EMU_ASAN
  leaving = this;
  __sanitizer_start_switch_fiber(&fake_stack_, to.stack_bottom_, to.stack_bytes_);
#endif
#if defined(HW_EMU_UCONTEXT)
  swapcontext(&context_, &to.context_);
#else
  hw_emu_switch(&stack_pointer_, to.stack_pointer_);
#endif
#if HW_EMU_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &leaving->stack_bottom_, &leaving->stack_bytes_);
#endif
}

void Fiber::entered() {
#if HW_EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &leaving->stack_bottom_, &leaving->stack_bytes_);
#endif
}

}  // namespace hw::emu
