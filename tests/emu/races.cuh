// SPDX-License-Identifier: Apache-2.0
// Kernels with one race each, most of which no order of the threads shows, and their sound twins.
#pragma once

#include "core/gpu/mma.cuh"

namespace hw::test {

struct RaceParams {
  float* out;         // [64] for each block
  const float* from;  // [64]
};

// out[t] = the value of the thread a warp away; kSound: with the barrier between.
template <bool kSound>
struct RemovedBarrier {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    s[t] = p.from[t];
    if (kSound) dev::sync_block();
    p.out[t] = s[t ^ 32];
  }
};

// All threads write the same to one place: every order gives the same result.
struct SameValue {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    s[0] = p.from[0];
    dev::sync_block();
    p.out[dev::thread_index()] = s[0];
  }
};

// Each lane adds to what the last one left, in one stretch: 64 in every order.
struct AddsWithoutOrder {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::thread_index() == 0) dev::shared<float>()[0] = 0;
    dev::sync_block();
    dev::shared<float>()[0] += 1;
    dev::sync_block();
    p.out[dev::thread_index()] = dev::shared<float>()[0];
  }
};

// Each thread copies an element and waits for its own copy; it reads that of another thread.
// kSound: with a barrier behind the wait.
template <bool kSound>
struct CopyOfAnother {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    dev::copy_async_4(s + t, p.from + t);
    dev::copy_async_commit();
    if (!kSound) dev::sync_block();  // which a copy that is still under way does not care for
    dev::copy_async_wait<0>();
    if (kSound) dev::sync_block();
    p.out[t] = s[t ^ 32];
  }
};

// Reads its own copy; kSound: behind its wait.
template <bool kSound>
struct CopyNotWaitedFor {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    dev::copy_async_4(s + t, p.from + t);
    dev::copy_async_commit();
    if (kSound) dev::copy_async_wait<0>();
    p.out[t] = s[t];
  }
};

// Two rounds through one stage; kSound: with a barrier between the last reader and the refill.
template <bool kSound>
struct StageRefilled {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    float sum = 0;
    for (int round = 0; round < 2; ++round) {
      dev::copy_async_4(s + t, p.from + t);
      dev::copy_async_commit();
      dev::copy_async_wait<0>();
      dev::sync_block();
      sum += s[t ^ 32];
      if (kSound) dev::sync_block();
    }
    p.out[t] = sum;
  }
};

// Blocks write the same value to one output; kSound: each its own.
template <bool kSound>
struct OneOutput {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    const int t = dev::thread_index();
    p.out[(kSound ? dev::block_index_x() * kThreads : 0) + t] = p.from[t];
  }
};

// A block reads what the one before it may have written.
struct ReadsOtherBlock {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    const int t = dev::thread_index(), b = dev::block_index_x();
    if (b == 0) p.out[t] = p.from[t];
    if (b == 1) p.out[64 + t] = p.out[t];
  }
};

// Warp 0 hands a value to warp 1 through barrier 1; warp 2 reads it as well. kSound: warp 2 waits
// for warp 1 at barrier 2, which makes warp 0's write visible to it too.
template <bool kSound>
struct Relay {
  static constexpr int kThreads = 96;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int w = dev::warp(), l = dev::lane();
    if (w == 0) s[l] = p.from[l];
    if (w <= 1) dev::sync_group(1, 64);
    if (w >= 1) dev::sync_group(kSound ? 2 : 2 + w, kSound ? 64 : 32);
    if (w == 2) p.out[l] = s[l];
  }
};

// out[t] = the neighbour's value, within a warp: a shuffle lies between, or sync_warp.
template <bool kSound>
struct BehindShuffle {
  static constexpr int kThreads = 32;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    s[t] = p.from[t];
    const float largest = dev::warp_max(s[t]);
    if (kSound) dev::sync_warp();
    p.out[t] = s[t ^ 1] + largest;
  }
};

// Reads what a thread has left behind that has exited: no barrier waits for it.
struct ReadsFromExited {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    s[t] = p.from[t];
    if (t == 3) return;
    dev::sync_block();
    p.out[t] = s[3];
  }
};

// Counts by atomics in all blocks; kSound: and nobody reads the count meanwhile.
template <bool kSound>
struct Counts {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    int* count = reinterpret_cast<int*>(p.out);
    if (kSound || dev::thread_index() != 7) dev::atomic_add(count, 1);
    if (!kSound && dev::thread_index() == 7) p.out[1] = static_cast<float>(*count);
  }
};

// Rows of a matrix load that other lanes have written; kSound: behind a warp barrier.
template <bool kSound>
struct MatrixRows {
  static constexpr int kThreads = 32;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    uint32_t* s = dev::shared<uint32_t>();
    const int t = dev::thread_index();
    for (int i = 0; i < 4; ++i) s[32 * i + t] = static_cast<uint32_t>(t);
    if (kSound) dev::sync_warp();
    uint32_t regs[4];
    dev::load_matrix_x4(regs, s + 4 * t);
    p.out[t] = static_cast<float>(regs[0]);
  }
};

// 16-bit elements side by side belong to different threads.
struct Neighbours {
  static constexpr int kThreads = 64;
  using Params = RaceParams;
  HW_DEVICE static void main(const Params& p) {
    uint16_t* s = dev::shared<uint16_t>();
    const int t = dev::thread_index();
    s[t] = static_cast<uint16_t>(t);
    dev::sync_block();
    p.out[t] = static_cast<float>(s[t ^ 32]);
  }
};

}  // namespace hw::test
