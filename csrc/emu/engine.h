// SPDX-License-Identifier: Apache-2.0
// The engine: runs the blocks of a launch, one at a time, on one host thread.
//
// A thread runs until it has to wait for others or ends, then the next runnable one goes on. All
// waiting is done by warps, as on hardware: the lanes of a warp that have not exited meet at one
// operation (a "meeting"), and when the last has arrived, the warp
//   - executes it and goes on at once                               (shuffles, mma, sync_warp, ...)
//   - or arrives, as a whole, at the barrier of its block or group  (sync_block, sync_group)
// Lanes that meet at different operations or places are a fault, found at the moment it happens;
// so is a state in which no thread can run.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>

#include "emu/clocks.h"
#include "emu/copies.h"
#include "emu/emulator.h"
#include "emu/fiber.h"
#include "emu/races.h"
#include "emu/random.h"
#include "emu/shared_memory.h"

#include "core/error.h"

namespace hw::emu {

inline constexpr int kBarriers = 16;  // number 0 belongs to sync_block

extern const WarpOperation kSyncBlock, kSyncWarp, kSyncGroup;

// What a warp waits for, and where.
struct Meeting {
  const WarpOperation* operation = nullptr;
  int barrier = 0, threads = 0;  // of sync_group
  Site site;
};

struct Warp {
  int index = 0;
  uint32_t live = 0;     // lanes that have not exited
  uint32_t ready = 0;    // lanes that can run; the running one is not among them
  uint32_t arrived = 0;  // lanes waiting at `meeting`
  Meeting meeting;
  void* arguments[kLanes] = {};  // of the meeting's operation, by lane; null without one
};

class Engine;

struct Thread : ThreadInfo {
  Engine* engine = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  bool started = false, ended = false;  // in this block
  CopyQueue copies;
  Fiber fiber;

  uint32_t bit() const { return 1u << lane; }
};

// Thrown out of a wait to unwind a thread whose block has failed.
struct Cancelled {};

class Engine {
 public:
  // The host thread's own engine, which keeps its fibers from launch to launch.
  static Engine& local();
  // The same, from inside a kernel.
  static Engine& running() { return *static_cast<Thread*>(current)->engine; }

  void run_block(const Launch& launch, const Config& config, const int index[3], uint64_t number);

  // For the running thread: waits until its warp has met and, at a barrier, the others too.
  void meet(const Meeting& meeting, void* arguments);

  // `place`: the return address into the kernel, as for all that the race check is told.
  void issue_copy(const Copy& copy, const void* place);
  void commit_copies();
  void wait_for_copies(int groups_under_way);
  Races* races() const { return races_.get(); }
  const SharedMemory& shared() const { return shared_; }
  const Config& config() const { return config_; }
  int warps() const { return warps_in_use_; }
  // Whether p is what the emulator tells the running thread of itself.
  bool owns(const void* p) const {
    const auto at = reinterpret_cast<uintptr_t>(p);
    return at - reinterpret_cast<uintptr_t>(&block_) < sizeof(block_) ||
           at - reinterpret_cast<uintptr_t>(running_) < sizeof(Thread) || p == &current;
  }

  // Throws Error(runtime) if [p, p + bytes) is not in shared memory or not aligned to `bytes`.
  void require_shared(const char* operation, const void* p, int bytes, Site site) const;

  // A fault of the running thread at `site`.
  template <class... Part>
  Error fault(Site site, const Part&... part) const {
    return Error(ErrorKind::runtime, concat("emulator: in ", where(), ", thread ", running_->index,
                                            " at ", place(site), ": ", part...));
  }
  static std::string place(Site site);

 private:
  struct Barrier {
    int arrived = 0, threads = 0;  // of sync_group: how many are here, how many are expected
    uint32_t warps = 0;            // that wait here
  };

  // --- one block
  void prepare(const Launch& launch, const Config& config, const int index[3], uint64_t number);
  static void thread_entry();
  void run_thread(Thread& thread);
  void leave(Thread& thread);
  void fail(std::exception_ptr error);

  // --- meetings
  void join(Warp& warp, const Meeting& meeting);
  void complete(Warp& warp);
  void arrive_block(Warp& warp);
  void arrive_group(Warp& warp);
  void release(Warp& warp);
  void release_all(uint32_t warps);

  // --- scheduling
  void suspend();
  Thread* next_thread();
  Thread* next_cancelled();
  int choose_warp();
  void go_on(Thread* thread);

  // --- reports
  std::string where() const;
  std::string deadlock_report() const;
  std::string waiting_for(const Warp& warp) const;

  const Launch* launch_ = nullptr;
  Config config_;
  BlockInfo block_ = {};
  Random random_{0, 0};
  SharedMemory shared_;

  std::array<std::unique_ptr<Thread>, kMaxThreads> threads_;
  std::array<Warp, kMaxWarps> warps_;
  std::array<Barrier, kBarriers> barriers_;
  int warps_in_use_ = 0;
  uint32_t live_warps_ = 0;   // with a lane that has not exited
  uint32_t ready_warps_ = 0;  // with a lane that can run
  bool interrupted_ = false;  // the next thread may be of any warp (shuffled order)

  Thread* running_ = nullptr;
  Fiber host_;
  // Null where the kernels are not built for it.
  std::unique_ptr<Races> races_{HW_EMU_RACES ? new Races : nullptr};
  std::exception_ptr error_;    // the first one; set: the block is being unwound
  int exceptions_outside_ = 0;  // that the host thread had in flight when it launched
};

}  // namespace hw::emu
