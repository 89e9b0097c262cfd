// SPDX-License-Identifier: Apache-2.0
// Memory that kernels can use, in the emulator and on a device, and the context to launch in.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "core/gpu/device.cuh"

namespace hw::test {

// A copy of `values` in the kernels' memory, of the exact size.
template <class T>
class Buffer {
 public:
  explicit Buffer(const std::vector<T>& values) : size_(values.size()) {
    const size_t bytes = size_ * sizeof(T);
#if defined(HW_EMULATE)
    data_ = static_cast<T*>(::operator new(bytes, std::align_val_t{64}));
    if (bytes != 0) std::memcpy(static_cast<void*>(data_), values.data(), bytes);
#else
    require(cudaMalloc(&data_, bytes == 0 ? 1 : bytes));
    require(cudaMemcpy(data_, values.data(), bytes, cudaMemcpyHostToDevice));
#endif
  }
  Buffer(size_t size, T fill) : Buffer(std::vector<T>(size, fill)) {}
  ~Buffer() {
#if defined(HW_EMULATE)
    ::operator delete(data_, std::align_val_t{64});
#else
    static_cast<void>(cudaFree(data_));
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }

  // Waits for the kernels before it.
  std::vector<T> read() const {
    std::vector<T> values(size_);
    const size_t bytes = size_ * sizeof(T);
#if defined(HW_EMULATE)
    if (bytes != 0) std::memcpy(static_cast<void*>(values.data()), data_, bytes);
#else
    require(cudaMemcpy(values.data(), data_, bytes, cudaMemcpyDeviceToHost));
#endif
    return values;
  }

 private:
#if !defined(HW_EMULATE)
  static void require(cudaError_t status) {
    check(status == cudaSuccess, ErrorKind::runtime, cudaGetErrorString(status));
  }
#endif
  T* data_ = nullptr;
  size_t size_;
};

// Numbers for tests: a fixed sequence for each seed.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 2654435761u + 12345u) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  // Evenly in (-1, 1).
  float uniform() { return static_cast<float>(bits()) * 0x1p-30f - 1.0f; }
  // A small integer, exact in every float format: -4 .. 4.
  float integer() { return static_cast<float>(bits() % 9u) - 4.0f; }

 private:
  uint64_t state_;
};

inline Context context(int num_threads = 1) {
  Context c;
  c.num_threads = num_threads;
  return c;
}

}  // namespace hw::test
