// SPDX-License-Identifier: Apache-2.0
// What code compiled with -fsanitize=thread calls, in place of ThreadSanitizer's run-time library:
// every access to memory comes here first. Why not that library: docs/emulator.md, "Races".
#include "emu/engine.h"

#if HW_EMU_RACES

namespace hw::emu {
namespace {

// Outside kernels nothing is looked at; a thread's own stack and what the emulator tells it belong
// to it alone.
inline void note(const volatile void* p, size_t bytes, AccessKind kind, const void* from) {
  if (current == nullptr) return;
  const Thread& thread = *static_cast<const Thread*>(current);
  const void* const at = const_cast<const void*>(p);
  if (thread.fiber.on_stack(at) || thread.engine->owns(at)) return;
  thread.engine->races()->access(thread.index, at, bytes, kind, from);
}

}  // namespace
}  // namespace hw::emu

using hw::emu::AccessKind;
using hw::emu::note;

// The compiler declares these itself.
#define HW_HOOK extern "C" __attribute__((visibility("default"), used))

#define HW_ACCESS(kind, bytes)                                     \
  HW_HOOK void __tsan_##kind##bytes(void* p) {                     \
    note(p, bytes, AccessKind::kind, __builtin_return_address(0)); \
  }                                                                \
  HW_HOOK void __tsan_unaligned_##kind##bytes(void* p) {           \
    note(p, bytes, AccessKind::kind, __builtin_return_address(0)); \
  }
#define HW_ACCESSES(kind)                                          \
  HW_ACCESS(kind, 1)                                               \
  HW_ACCESS(kind, 2)                                               \
  HW_ACCESS(kind, 4)                                               \
  HW_ACCESS(kind, 8)                                               \
  HW_ACCESS(kind, 16)                                              \
  HW_HOOK void __tsan_##kind##_range(void* p, size_t bytes) {      \
    note(p, bytes, AccessKind::kind, __builtin_return_address(0)); \
  }
HW_ACCESSES(read)
HW_ACCESSES(write)

HW_HOOK void __tsan_init() {}
HW_HOOK void __tsan_func_entry(void*) {}
HW_HOOK void __tsan_func_exit() {}
HW_HOOK void __tsan_vptr_update(void*, void*) {}
HW_HOOK void __tsan_vptr_read(void*) {}

#define HW_ATOMIC(bits, Type)                                                   \
  HW_HOOK Type __tsan_atomic##bits##_load(const volatile Type* p, int) {        \
    note(p, bits / 8, AccessKind::update, __builtin_return_address(0));         \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                \
  }                                                                             \
  HW_HOOK Type __tsan_atomic##bits##_fetch_add(volatile Type* p, Type v, int) { \
    note(p, bits / 8, AccessKind::update, __builtin_return_address(0));         \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                          \
  }
HW_ATOMIC(8, unsigned char)
HW_ATOMIC(32, unsigned int)
HW_ATOMIC(64, unsigned long)

#endif
