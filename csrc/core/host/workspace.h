// SPDX-License-Identifier: Apache-2.0
// Room: hands out parts of a workspace one after another. The same lines that place arrays count
// what they need: a Room without memory hands out null pointers.
//
//   Room room;  lay_out(room);                   room.bytes() is the size
//   Room room(memory, bytes, operation);  lay_out(room);    checks that it is enough
#pragma once

#include <cstdint>

#include "core/host/call.h"
#include "core/math.h"

namespace hw {

// Throws. Not inline: loops of every instruction set lay out memory, and the function that they
// would share must be the one for every machine (core/cpu/simd.h).
[[noreturn]] void refuse_room(const char* operation, int64_t bytes, int64_t expected);

class Room {
 public:
  Room() = default;
  // `operation` names it in messages.
  Room(void* memory, int64_t bytes, const char* operation)
      : base_(static_cast<char*>(memory)), size_(bytes), operation_(operation) {}
  // The tensor that a caller has handed over.
  Room(const Tensor& memory, const char* operation)
      : Room(memory.data, memory.present() ? memory.numel() * dtype_size(memory.dtype) : 0,
             operation) {}

  // `count` elements, aligned to 256 bytes of the workspace.
  template <class T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), 256);
    if (!operation_) return nullptr;
    if (bytes_ > size_) refuse_room(operation_, size_, bytes_);
    return reinterpret_cast<T*>(base_ + at);
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* base_ = nullptr;
  int64_t size_ = 0, bytes_ = 0;
  const char* operation_ = nullptr;
};

}  // namespace hw
