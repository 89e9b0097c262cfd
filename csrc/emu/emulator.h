// SPDX-License-Identifier: Apache-2.0
// The emulator: executes kernel structs on the host. See docs/emulator.md.
//
// Each thread of a block is a fiber with a stack of its own; blocks run one after another, or
// several at a time on `workers` host threads. This header is what core/gpu/device.cuh, mma.cuh and
// async_copy.cuh call; tests use configure() and scoped configurations.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

namespace hw::emu {

// The place of a call in kernel code.
using Site = std::source_location;

// ---- Configuration: process-wide, read at the start of every launch -----------------------------

// Which runnable thread goes next, and which block. A warp runs as far as it can before another one
// goes on, which is the largest skew that the barriers allow.
enum class Order : int {
  forward = 0,   // lowest warp and lane first, blocks in order
  reverse = 1,   // highest first
  shuffled = 2,  // drawn anew by the seed at every switch; warps are also interrupted at random
};

// When an asynchronous copy reads its source and writes its destination.
enum class Copies : int {
  late = 0,   // at the wait that covers it: catches a wait that is missing or one group short
  early = 1,  // when it is issued: catches a stage that is refilled before its last reader is done
  mixed = 2,  // each one early or late, drawn by the seed
};

// Whether accesses to memory are compared; in a build for it (preset `races`), otherwise no effect.
enum class RaceCheck : int {
  on = 0,  // what warps do together (shuffles, votes, mma, ldmatrix) orders memory as barriers do
  strict = 1,  // only barriers do: sync_block, sync_group, sync_warp
  off = 2,
};

struct Config {
  uint64_t seed = 0;
  Order order = Order::forward;
  Copies copies = Copies::late;
  // Byte that fills shared memory at the start of a block, the stack of a thread at its start, and
  // values read from exited lanes.
  // 0xff is a NaN in every float format; 0x7f is a huge number in bf16 and fp32, which a maximum
  // does not swallow.
  uint8_t poison = 0xff;
  RaceCheck races = RaceCheck::on;
};

void configure(const Config& config);
Config config();

// Applies a configuration for the life of the object.
class ScopedConfig {
 public:
  explicit ScopedConfig(const Config& config) : before_(emu::config()) { configure(config); }
  ~ScopedConfig() { configure(before_); }
  ScopedConfig(const ScopedConfig&) = delete;
  ScopedConfig& operator=(const ScopedConfig&) = delete;

 private:
  Config before_;
};

// ---- Launch -------------------------------------------------------------------------------------

struct Launch {
  std::string kernel;
  int grid[3] = {1, 1, 1};
  int threads = 1;
  int shared_bytes = 0;
  int workers = 1;  // host threads to spread the blocks over
  const void* params = nullptr;
  size_t params_bytes = 0;
  void (*main)(const void* params) = nullptr;
};

// Runs all blocks. Throws what a kernel threw, or Error(runtime) for a fault that the emulator
// found; all other threads of the block have then been unwound.
void run(const Launch& launch);

// ---- The running thread -------------------------------------------------------------------------

struct BlockInfo {
  int index[3];
  int grid[3];
};

struct ThreadInfo {
  int index;  // in the block
  const BlockInfo* block;
};

// Of the host thread; null outside kernels.
extern constinit thread_local ThreadInfo* current __attribute__((tls_model("initial-exec")));

// ---- Bodies of the seam: each is described at its name in core/ ---------------------------------

void* shared(size_t size, Site site);

void sync_block(Site site);
void sync_warp(Site site);
void sync_group(int id, int threads, Site site);

// An operation that a whole warp executes at once. Every lane hands in its own arguments (on its
// stack) and waits; the lane that arrives last executes the operation for all of them.
struct WarpOperation {
  const char* name;
  bool needs_all_lanes;  // undefined on hardware once a lane has exited
  // arguments[lane] for the lanes in `live`; the others are null.
  void (*execute)(void* const* arguments, uint32_t live);
};

extern const WarpOperation kShuffle, kShuffleXor, kShuffleUp, kShuffleDown;
extern const WarpOperation kBallot, kAny, kAll;
extern const WarpOperation kLoadMatrixX4, kLoadMatrixX4Transposed;
extern const WarpOperation kLoadMatrixX2, kLoadMatrixX2Transposed;
extern const WarpOperation kMmaBf16, kMmaF16, kMmaTf32;

void execute(const WarpOperation& operation, void* arguments, Site site);

struct Votes {
  uint32_t yes, voted;
};

// Replaces the `size` bytes at `value` by those of lane `source`.
void shuffle(const WarpOperation& operation, void* value, size_t size, int source, Site site);
Votes ballot(const WarpOperation& operation, bool predicate, Site site);
void load_matrix(const WarpOperation& operation, uint32_t* regs, const void* row, Site site);
void mma(const WarpOperation& operation, float* d, const uint32_t* a, const uint32_t* b, Site site);

void copy_async(void* to, const void* from, int bytes, int valid, Site site);
void copy_async_commit();
void copy_async_wait(int groups_under_way);

// Subnormal to zero of the same sign.
inline float flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

// a / b as IEEE has it, also for b = 0.
__attribute__((no_sanitize("float-divide-by-zero"))) inline float divide(float a, float b) {
  return a / b;
}

// To 10 mantissa bits, ties away from zero; infinities stay, NaN becomes the canonical one.
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffffffu;
  if (magnitude == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace hw::emu
