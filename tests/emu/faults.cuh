// SPDX-License-Identifier: Apache-2.0
// Kernels with one fault each, which the emulator has to report.
#pragma once

#include "core/gpu/mma.cuh"
#include "core/gpu/vector.h"

namespace hw::test {

// One pointer is all that these kernels need.
struct FaultParams {
  float* out;
  int index;  // where the fault happens, for those that can choose
};

// out[t] = what shared memory holds that nobody has written.
struct ReadsUnwritten {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    p.out[dev::thread_index()] = dev::shared<float>()[dev::thread_index()];
  }
};

// out[block, t] = what a local array holds that nobody has written.
struct ReadsUnwrittenLocals {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    float local[8];
    leave_alone(local);
    p.out[dev::block_index_x() * kThreads + dev::thread_index()] = local[p.index];
    fill(local);
  }

 private:
  // To the compiler it may write.
  [[gnu::noinline]] static void leave_alone(float* x) { asm volatile("" : : "r"(x) : "memory"); }
  // What the next thread would find there.
  static void fill(float* x) {
    for (int i = 0; i < 8; ++i) x[i] = 1.0f;
    leave_alone(x);
  }
};

// The same in each block, which leaves numbers behind for the next.
struct LeavesNumbers {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    p.out[dev::block_index_x() * kThreads + dev::thread_index()] = s[dev::thread_index()];
    s[dev::thread_index()] = 1.0f;
  }
};

// out[t] = what thread t + 32 has copied; that thread ends without waiting for its copy.
struct CopyWithoutWait {
  static constexpr int kThreads = 64;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    if (t >= 32) {
      dev::copy_async_4(s + t, p.out + t);
      dev::copy_async_commit();
    }
    dev::sync_block();
    if (t < 32) p.out[t] = s[t + 32];
  }
};

// out[t] = what shared memory holds after a wait that has nothing to wait for.
struct WaitsForNothing {
  static constexpr int kThreads = 64;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    dev::copy_async_wait<0>();
    dev::sync_block();
    p.out[dev::thread_index()] = dev::shared<float>()[dev::thread_index()];
  }
};

// out[t] = t' of the neighbour `index` threads on, without a barrier in between.
struct MissingBlockBarrier {
  static constexpr int kThreads = 128;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    s[t] = static_cast<float>(t);
    p.out[t] = s[(t + p.index) % kThreads];
  }
};

// out[t] = t ^ 1, with a block barrier but no warp barrier before the second exchange.
struct MissingWarpBarrier {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    s[t] = static_cast<float>(t);
    dev::sync_block();
    const float v = s[t ^ 1];
    s[t] = v;
    p.out[t] = v;
  }
};

// Half of a warp exchanges, the other half waits for the block.
struct DivergentOperation {
  static constexpr int kThreads = 64;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::thread_index() < 48)
      dev::sync_block();
    else
      p.out[dev::thread_index()] = dev::shuffle(1.0f, 0);
  }
};

// The same operation in both branches.
struct DivergentPlace {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params&) {
    if (dev::lane() < 16) {
      dev::sync_warp();
    } else {
      dev::sync_warp();
    }
  }
};

// Warps of a block wait for each other at different places.
struct DivergentBlock {
  static constexpr int kThreads = 64;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params&) {
    if (dev::warp() == 0) {
      dev::sync_block();
    } else {
      dev::sync_block();
    }
  }
};

// Lane `index` takes one round more than the others.
struct UnevenLoop {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    float v = 0;
    for (int i = 0; i < 3 + (dev::lane() == p.index); ++i) v += dev::shuffle_xor(v, 1);
    dev::sync_block();
    p.out[dev::lane()] = v;
  }
};

// Two warps meet at a barrier but do not agree on how many are to come.
struct GroupCountMismatch {
  static constexpr int kThreads = 96;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params&) { dev::sync_group(3, dev::warp() == 0 ? 64 : 96); }
};

// Three warps are expected, two come.
struct GroupTooFew {
  static constexpr int kThreads = 96;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params&) {
    if (dev::warp() < 2) dev::sync_group(1, 96);
  }
};

// Each warp waits for the other at a barrier of its own.
struct CrossedGroups {
  static constexpr int kThreads = 64;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params&) {
    if (dev::warp() == 0) {
      dev::sync_group(1, 64);
      dev::sync_group(2, 64);
    } else {
      dev::sync_group(2, 64);
      dev::sync_group(1, 64);
    }
  }
};

// Warp 1 waits for the block, warp 0 for a group that warp 1 belongs to.
struct GroupAgainstBlock {
  static constexpr int kThreads = 64;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params&) {
    if (dev::warp() == 0) dev::sync_group(1, 64);
    dev::sync_block();
  }
};

struct GroupNumber {
  static constexpr int kThreads = 64;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) { dev::sync_group(p.index, 64); }
};

struct GroupThreads {
  static constexpr int kThreads = 64;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) { dev::sync_group(1, p.index); }
};

// A multiply that lane 7 no longer takes part in.
struct MultiplyWithoutLane {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::lane() == 7) return;
    const uint32_t a[4] = {}, b[2] = {};
    float d[4] = {};
    dev::mma_bf16(d, a, b);
    p.out[dev::lane()] = d[0];
  }
};

// out[t] = the value of lane 0, which has exited.
struct ShuffleFromExited {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::lane() == 0) return;
    p.out[dev::lane()] = dev::shuffle(1.0f, 0);
  }
};

// A struct in shared memory that is larger than what the launch gives.
struct SharedTooSmall {
  static constexpr int kThreads = 32;
  struct Stage {
    float values[64];
  };
  using Params = FaultParams;
  HW_DEVICE static void main(const Params&) { dev::shared<Stage>()->values[0] = 0; }
};

// Writes, or reads, element `index` of shared memory.
struct SharedWrite {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::thread_index() == 5) dev::shared<float>()[p.index] = 1.0f;
  }
};
struct SharedRead {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::thread_index() == 5) p.out[0] = dev::shared<float>()[p.index];
  }
};

// Writes element `index` of global memory.
struct GlobalWrite {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::thread_index() == 5) p.out[p.index] = 1.0f;
  }
};

// Copies 16 bytes from element `index` of global memory; it has not landed when the kernel ends.
struct CopyFrom {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::thread_index() != 5) return;
    dev::copy_async_16(dev::shared<float>(), p.out + p.index);
    dev::copy_async_commit();
  }
};

// Copies 16 bytes to byte `index` of shared memory; `kValid` of them are valid.
template <int kValid>
struct CopyTo {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::thread_index() == 5) {
      dev::copy_async_16(dev::shared<unsigned char>() + p.index, p.out, kValid);
    }
  }
};

// Matrix rows at byte `index` of shared memory.
struct LoadMatrixAt {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    uint32_t regs[4];
    dev::load_matrix_x4(regs, dev::shared<unsigned char>() + p.index);
    p.out[0] = static_cast<float>(regs[0]);
  }
};

// Vectors that are read from, and stored to, an address that is only 4-byte aligned.
template <bool kStores>
struct MisalignedVector {
  static constexpr int kThreads = 32;
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::thread_index() != 0) return;
    float* at = p.out + p.index;
    if constexpr (kStores)
      store_vector(at, Vec<float, 4>{{1, 2, 3, 4}});
    else
      p.out[0] = load_vector<4>(at).v[0];
  }
};

// A 16-byte store of another kind to such an address.
struct MisalignedStore {
  static constexpr int kThreads = 32;
  struct alignas(16) Four {
    float x, y, z, w;
  };
  using Params = FaultParams;
  HW_DEVICE static void main(const Params& p) {
    if (dev::thread_index() == 5) *reinterpret_cast<Four*>(p.out + p.index) = {1, 2, 3, 4};
  }
};

}  // namespace hw::test
