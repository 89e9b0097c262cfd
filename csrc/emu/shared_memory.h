// SPDX-License-Identifier: Apache-2.0
// The dynamic shared memory of a block. Under AddressSanitizer it is an allocation of the exact
// size, so that an access beyond either end is reported at its source line; otherwise guard bytes
// on both sides show, when the block ends, that something was written there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "emu/fiber.h"

namespace hw::emu {

class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory() { release(); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // `bytes` of fresh memory, every byte of it (and of the guards) equal to `poison`.
  void reset(size_t bytes, uint8_t poison) {
    if (allocation_ == nullptr || bytes != bytes_) {
      release();
      allocation_ = static_cast<uint8_t*>(::operator new(bytes + 2 * kGuard, kAlignment));
      bytes_ = bytes;
    }
    poison_ = poison;
    std::memset(allocation_, poison, bytes_ + 2 * kGuard);
  }

  uint8_t* base() const { return allocation_ + kGuard; }
  size_t bytes() const { return bytes_; }

  bool contains(const void* p, size_t n) const {
    const auto at = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(base());
    return at >= begin && n <= bytes_ && at - begin <= bytes_ - n;
  }

  // Offset from base() of the first guard byte that was changed; 0 if none (0 is no guard byte,
  // unless the block has no shared memory at all, where the byte at 0 is reported as 1).
  ptrdiff_t damage() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (allocation_[i] != poison_) return static_cast<ptrdiff_t>(i) - kGuardOffset;
    }
    for (size_t i = bytes_; i < bytes_ + kGuard; ++i) {
      if (base()[i] != poison_) return i > 0 ? static_cast<ptrdiff_t>(i) : 1;
    }
    return 0;
  }

 private:
  void release() {
    if (allocation_ != nullptr) ::operator delete(allocation_, kAlignment);
    allocation_ = nullptr;
  }

  static constexpr std::align_val_t kAlignment{128};
  static constexpr size_t kGuard = HW_EMU_ASAN ? 0 : 1024;
  static constexpr ptrdiff_t kGuardOffset = static_cast<ptrdiff_t>(kGuard);

  uint8_t* allocation_ = nullptr;
  size_t bytes_ = 0;
  uint8_t poison_ = 0xff;
};

}  // namespace hw::emu
