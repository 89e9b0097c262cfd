// SPDX-License-Identifier: Apache-2.0
// One small kernel for each primitive of core/gpu/device.cuh and core/gpu/async_copy.cuh; every
// thread writes what it saw to a row of its own.
#pragma once

#include "core/gpu/async_copy.cuh"
#include "core/gpu/device.cuh"

namespace hw::test {

// out[block, thread, :] = thread, lane, warp, block x, y, z, grid x, y, z.
struct Coordinates {
  static constexpr int kThreads = 96, kColumns = 9;
  struct Params {
    int* out;  // [blocks, kThreads, kColumns]
  };
  HW_DEVICE static void main(const Params& p) {
    const int64_t block =
        dev::block_index_x() +
        int64_t{dev::grid_size_x()} *
            (dev::block_index_y() + int64_t{dev::grid_size_y()} * dev::block_index_z());
    int* row = p.out + (block * kThreads + dev::thread_index()) * kColumns;
    row[0] = dev::thread_index();
    row[1] = dev::lane();
    row[2] = dev::warp();
    row[3] = dev::block_index_x();
    row[4] = dev::block_index_y();
    row[5] = dev::block_index_z();
    row[6] = dev::grid_size_x();
    row[7] = dev::grid_size_y();
    row[8] = dev::grid_size_z();
  }
};

// A value of 12 bytes, for shuffles of any size.
struct Triple {
  float x;
  int32_t y;
  uint32_t z;
};

// out[thread, :] = idx, xor, up, down.
template <class T>
struct Shuffles {
  static constexpr int kThreads = 64, kColumns = 4;
  struct Params {
    const T* in;  // [kThreads]
    T* out;       // [kThreads, kColumns]
    int source, mask, shift;
  };
  HW_DEVICE static void main(const Params& p) {
    const T v = p.in[dev::thread_index()];
    T* row = p.out + dev::thread_index() * kColumns;
    row[0] = dev::shuffle(v, dev::lane() + p.source);
    row[1] = dev::shuffle_xor(v, p.mask);
    row[2] = dev::shuffle_up(v, p.shift);
    row[3] = dev::shuffle_down(v, p.shift);
  }
};

// out[thread, :] = ballot, any, all of in[thread] != 0.
template <int kThreads_>
struct Votes {
  static constexpr int kThreads = kThreads_, kColumns = 3;
  struct Params {
    const int* in;  // [kThreads]
    uint32_t* out;  // [kThreads, kColumns]
  };
  HW_DEVICE static void main(const Params& p) {
    const bool yes = p.in[dev::thread_index()] != 0;
    uint32_t* row = p.out + dev::thread_index() * kColumns;
    row[0] = dev::ballot(yes);
    row[1] = dev::any(yes);
    row[2] = dev::all(yes);
  }
};

// out[thread, :] = sum and maximum over groups of 32, 8 and 4 lanes.
template <class T>
struct Reductions {
  static constexpr int kThreads = 64, kColumns = 6;
  struct Params {
    const T* in;  // [kThreads]
    T* out;       // [kThreads, kColumns]
  };
  HW_DEVICE static void main(const Params& p) {
    const T v = p.in[dev::thread_index()];
    T* row = p.out + dev::thread_index() * kColumns;
    row[0] = dev::warp_sum(v);
    row[1] = dev::warp_max(v);
    row[2] = dev::warp_sum<8>(v);
    row[3] = dev::warp_max<8>(v);
    row[4] = dev::warp_sum<4>(v);
    row[5] = dev::warp_max<4>(v);
  }
};

// Odd lanes exit first: out[even thread] = ballot of those left, after barriers of all kinds.
struct ExitedLanes {
  static constexpr int kThreads = 64;
  struct Params {
    uint32_t* out;  // [kThreads]
  };
  HW_DEVICE static void main(const Params& p) {
    if (dev::lane() % 2 == 1) return;
    dev::sync_warp();
    dev::sync_block();
    p.out[dev::thread_index()] = dev::ballot(true);
  }
};

// Warp `index` exits at once: out[other threads] = 1 behind a barrier of the block.
struct ExitedWarp {
  static constexpr int kThreads = 96;
  struct Params {
    uint32_t* out;  // [kThreads]
    int index;
  };
  HW_DEVICE static void main(const Params& p) {
    if (dev::warp() == p.index) return;
    dev::sync_block();
    p.out[dev::thread_index()] = 1;
  }
};

// Reverses the block's values through shared memory: out[i] = in[kThreads - 1 - i], `rounds` times.
struct ReverseBlock {
  static constexpr int kThreads = 128;
  struct Params {
    const float* in;  // [blocks, kThreads]
    float* out;       // [blocks, kThreads]
    int rounds;
  };
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    const int64_t block = dev::block_index_x();
    float v = p.in[block * kThreads + t];
    for (int i = 0; i < p.rounds; ++i) {
      s[t] = v;
      dev::sync_block();
      v = s[kThreads - 1 - t];
      dev::sync_block();
    }
    p.out[block * kThreads + t] = v;
  }
};

// The same within warps: out[i] = in[i ^ 31].
struct ReverseWarp {
  static constexpr int kThreads = 64;
  struct Params {
    const float* in;  // [kThreads]
    float* out;       // [kThreads]
  };
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    s[t] = p.in[t];
    dev::sync_warp();
    p.out[t] = s[t ^ 31];
  }
};

// Two groups of two warps work side by side with a barrier each, a different number of times, then
// the whole block adds up: out[t] = sum over i < kRounds(group) of in[neighbour of t] + i.
struct Groups {
  static constexpr int kThreads = 128, kGroup = 64;
  struct Params {
    const float* in;  // [kThreads]
    float* out;       // [kThreads]
    int rounds;       // of group 0; group 1 does twice as many
  };
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index(), group = t / kGroup;
    const int neighbour = group * kGroup + (t + 33) % kGroup;
    float sum = 0;
    for (int i = 0; i < p.rounds * (group + 1); ++i) {
      s[t] = p.in[t] + static_cast<float>(i);
      dev::sync_group(1 + group, kGroup);
      sum += s[neighbour];
      dev::sync_group(1 + group, kGroup);
    }
    s[t] = sum;
    dev::sync_block();
    p.out[t] = s[t] + s[(t + kGroup) % kThreads];
  }
};

// Warp 0 produces, warp 1 consumes, with a barrier for "full" and one for "free".
struct ProducerConsumer {
  static constexpr int kThreads = 64, kSteps = 5;
  struct Params {
    const float* in;  // [kSteps, 32]
    float* out;       // [kSteps, 32], reversed within each step
  };
  HW_DEVICE static void main(const Params& p) {
    float* s = dev::shared<float>();
    for (int i = 0; i < kSteps; ++i) {
      if (dev::warp() == 0) {
        s[dev::lane()] = p.in[i * 32 + dev::lane()];
        dev::sync_group(1, kThreads);
        dev::sync_group(2, kThreads);
      } else {
        dev::sync_group(1, kThreads);
        p.out[i * 32 + dev::lane()] = s[31 - dev::lane()];
        dev::sync_group(2, kThreads);
      }
    }
  }
};

// Every thread takes a ticket from a counter in global and one in shared memory.
struct Tickets {
  static constexpr int kThreads = 64;
  struct Params {
    int* counter;                  // [1]
    unsigned long long* counter8;  // [1]
    int* global_ticket;            // [blocks, kThreads]
    unsigned* shared_ticket;       // [blocks, kThreads]
  };
  HW_DEVICE static void main(const Params& p) {
    unsigned* s = dev::shared<unsigned>();
    if (dev::thread_index() == 0) *s = 0;
    dev::sync_block();
    const int64_t at = int64_t{dev::block_index_x()} * kThreads + dev::thread_index();
    p.global_ticket[at] = dev::atomic_add(p.counter, 1);
    p.shared_ticket[at] = dev::atomic_add(s, 1u);
    dev::atomic_add(p.counter8, 3000000000ull);
  }
};

// out[thread, :] = exp2, rcp, rsqrt, log2 of in[thread].
struct FastMaths {
  static constexpr int kThreads = 32, kColumns = 4;
  struct Params {
    const float* in;  // [kThreads]
    float* out;       // [kThreads, kColumns]
  };
  HW_DEVICE static void main(const Params& p) {
    const float x = p.in[dev::thread_index()];
    float* row = p.out + dev::thread_index() * kColumns;
    row[0] = dev::exp2_fast(x);
    row[1] = dev::rcp_fast(x);
    row[2] = dev::rsqrt_fast(x);
    row[3] = dev::log2_fast(x);
  }
};

// out[thread, :] = the pair (in[2t], in[2t + 1]) packed as bf16 and as f16.
struct Packing {
  static constexpr int kThreads = 32, kColumns = 2;
  struct Params {
    const float* in;  // [kThreads, 2]
    uint32_t* out;    // [kThreads, kColumns]
  };
  HW_DEVICE static void main(const Params& p) {
    const float lo = p.in[2 * dev::thread_index()], hi = p.in[2 * dev::thread_index() + 1];
    p.out[kColumns * dev::thread_index()] = dev::pack<bf16>(lo, hi);
    p.out[kColumns * dev::thread_index() + 1] = dev::pack<f16>(lo, hi);
  }
};

// Thread t copies its 4, 8 or 16 bytes, of which t % (kBytes + 1) are valid, and reads them back.
template <int kBytes>
struct ValidBytes {
  static constexpr int kThreads = 64;
  struct Params {
    const unsigned char* in;  // [kThreads, kBytes]
    unsigned char* out;       // [kThreads, kBytes]
  };
  HW_DEVICE static void main(const Params& p) {
    unsigned char* s = dev::shared<unsigned char>() + dev::thread_index() * kBytes;
    const int at = dev::thread_index() * kBytes, valid = dev::thread_index() % (kBytes + 1);
    const unsigned char* from = valid == 0 ? nullptr : p.in + at;
    if constexpr (kBytes == 16) dev::copy_async_16(s, from, valid);
    if constexpr (kBytes == 8) dev::copy_async_8(s, from, valid);
    if constexpr (kBytes == 4) dev::copy_async_4(s, from, valid);
    dev::copy_async_commit();
    dev::copy_async_wait<0>();
    for (int i = 0; i < kBytes; ++i) p.out[at + i] = s[i];
  }
};

// Three groups of copies; out[thread, w, group] = what the group's slot holds after wait<w>, for
// w = 3 (nothing has to have landed), 2, 1, 0; slots start at -1.
struct CopyGroups {
  static constexpr int kThreads = 32, kGroups = 3, kWaits = 4;
  struct Params {
    const int* in;  // [kThreads, kGroups]
    int* out;       // [kThreads, kWaits, kGroups]
  };
  HW_DEVICE static void main(const Params& p) {
    const int t = dev::thread_index();
    int* s = dev::shared<int>() + t * kGroups;
    for (int i = 0; i < kGroups; ++i) s[i] = -1;
    for (int i = 0; i < kGroups; ++i) {
      dev::copy_async_4(s + i, p.in + t * kGroups + i);
      dev::copy_async_commit();
    }
    int* row = p.out + t * kWaits * kGroups;
    dev::copy_async_wait<3>();
    for (int i = 0; i < kGroups; ++i) row[i] = s[i];
    dev::copy_async_wait<2>();
    for (int i = 0; i < kGroups; ++i) row[kGroups + i] = s[i];
    dev::copy_async_wait<1>();
    for (int i = 0; i < kGroups; ++i) row[2 * kGroups + i] = s[i];
    dev::copy_async_wait<0>();
    for (int i = 0; i < kGroups; ++i) row[3 * kGroups + i] = s[i];
  }
};

}  // namespace hw::test
