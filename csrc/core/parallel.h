// SPDX-License-Identifier: Apache-2.0
// CPU threads: independent tasks on OpenMP, and scratch memory per thread.
//
//   parallel_tasks(count, threads, f)   f(i) for i in [0, count), in any order
//   Scratch                             a bump allocator that each thread keeps between calls
//   Buffer                              memory of one call
//
// Results never depend on which thread runs a task: tasks write disjoint outputs, and sums over
// tasks are made afterwards in index order. An exception in a task is rethrown by the caller.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

#include <omp.h>

namespace hw {
namespace {

template <class F>
inline void parallel_tasks(int64_t count, int threads, const F& f) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::exception_ptr failure;
  const int team = static_cast<int>(count < threads ? count : threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t i = 0; i < count; ++i) {
    try {
      f(i);
    } catch (...) {
#pragma omp critical(headworks_parallel_failure)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// Memory of a thread, kept until the thread ends and grown when a call needs more. take() hands out
// 64-byte aligned arrays until the next reset(); reset(bytes) guarantees room for `bytes` in total
// (every take rounds up to 64).
class Scratch {
 public:
  static Scratch& of_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(base_); }

  void reset(int64_t bytes) {
    used_ = 0;
    if (bytes <= capacity_) return;
    std::free(base_);
    capacity_ = (bytes + 4095) / 4096 * 4096;
    base_ = static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(capacity_)));
    if (base_ == nullptr) {
      capacity_ = 0;
      throw std::bad_alloc();
    }
  }

  template <class T>
  T* take(int64_t count) {
    char* p = base_ + used_;
    used_ += bytes_of<T>(count);
    if (used_ > capacity_) throw std::bad_alloc();
    return reinterpret_cast<T*>(p);
  }

  template <class T>
  static constexpr int64_t bytes_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* base_ = nullptr;
  int64_t capacity_ = 0, used_ = 0;
};

// Memory of one call, 64-byte aligned, not initialised.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void reserve(int64_t bytes) {
    std::free(data_);
    data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
    if (data_ == nullptr && bytes > 0) throw std::bad_alloc();
  }
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
};

}  // namespace
}  // namespace hw
