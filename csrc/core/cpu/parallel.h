// SPDX-License-Identifier: Apache-2.0
// CPU threads: independent tasks on OpenMP, and scratch memory per thread.
//
//   parallel_tasks(count, threads, f)   f(i) for i in [0, count), in any order
//   parallel_walks(count, piece, threads, walk)   the same where a thread knows its next task
//   Scratch                             a bump allocator that each thread keeps between calls
//   Buffer                              memory of one call
//
// Results never depend on which thread runs a task: tasks write disjoint outputs, and sums over
// tasks are made afterwards in index order. An exception in a task is rethrown by the caller.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>

#include <omp.h>

#include "core/math.h"

namespace hw {
namespace {

// f() on each of at most `threads` threads.
template <class F>
inline void on_threads(int threads, const F& f) {
  std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
  {
    try {
      f();
    } catch (...) {
#pragma omp critical(headworks_parallel_failure)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// walk(next) on each thread: next() hands out the numbers [0, count), each once, `piece` neighbours
// at a time to one thread, and then -1. What a thread keeps between tasks is built once, and while
// it works on one it can ask memory for the next.
template <class F>
inline void parallel_walks(int64_t count, int64_t piece, int threads, const F& walk) {
  std::atomic<int64_t> taken{0};
  const auto on_thread = [&] {
    int64_t i = 0, end = 0;
    walk([&]() -> int64_t {
      if (i == end) {
        i = std::min(taken.fetch_add(piece, std::memory_order_relaxed), count);
        end = std::min(i + piece, count);
      }
      return i < end ? i++ : -1;
    });
  };
  const int64_t team = std::min<int64_t>(threads, ceil_div(count, piece));
  if (team <= 1) return on_thread();
  on_threads(static_cast<int>(team), on_thread);
}

template <class F>
inline void parallel_tasks(int64_t count, int threads, const F& f) {
  parallel_walks(count, 1, threads, [&](auto next) {
    for (int64_t i = next(); i >= 0; i = next()) f(i);
  });
}

// Memory of a thread, kept until the thread ends and grown when a call needs more. take() hands out
// 64-byte aligned arrays until the next reset(); reset(bytes) guarantees room for `bytes` in total
// (every take rounds up to 64). Taking more is an error wherever there happens to be room for it.
class Scratch {
 public:
  HW_NOINLINE static Scratch& of_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(base_); }

  HW_NOINLINE void reset(int64_t bytes) {
    used_ = 0, promised_ = bytes;
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
    return reinterpret_cast<T*>(take_bytes(bytes_of<T>(count)));
  }

  template <class T>
  static constexpr int64_t bytes_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  HW_NOINLINE char* take_bytes(int64_t bytes) {
    char* p = base_ + used_;
    used_ += bytes;
    if (used_ > promised_)
      throw std::logic_error("headworks: a loop takes more scratch memory than it planned");
    return p;
  }

  char* base_ = nullptr;
  int64_t capacity_ = 0, promised_ = 0, used_ = 0;
};

// Memory of one call, 64-byte aligned, not initialised.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  HW_NOINLINE void reserve(int64_t bytes) {
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
