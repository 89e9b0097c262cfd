// SPDX-License-Identifier: Apache-2.0
// Arena: hands out parts of a workspace one after another. The same lines that lay out arrays count
// what they need: an Arena without memory hands out null pointers.
//
//   Arena arena;  lay_out(arena);                        arena.bytes() is the size
//   Arena arena(call.workspace, name);  lay_out(arena);  checks that it is enough
#pragma once

#include <cstdint>

#include "core/host/call.h"
#include "core/math.h"

namespace hw {

// Throws. Not inline: loops of every instruction set lay out memory, and the function that they
// would share must be the one for every machine (core/cpu/simd.h).
[[noreturn]] void refuse_workspace(const char* operation, int64_t bytes, int64_t expected);

class Arena {
 public:
  Arena() = default;
  // `operation` names it in messages.
  Arena(const Workspace& memory, const char* operation)
      : base_(static_cast<char*>(memory.data)), size_(memory.bytes), operation_(operation) {}

  // `count` elements, aligned to 256 bytes of the workspace.
  template <class T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), 256);
    if (!operation_) return nullptr;
    if (bytes_ > size_) refuse_workspace(operation_, size_, bytes_);
    return reinterpret_cast<T*>(base_ + at);
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* base_ = nullptr;
  int64_t size_ = 0, bytes_ = 0;
  const char* operation_ = nullptr;
};

}  // namespace hw
