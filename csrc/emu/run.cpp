// SPDX-License-Identifier: Apache-2.0
// Launches: configuration, the order of blocks, host threads; and the seam's bodies that are not
// warp operations.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <vector>

#include "emu/engine.h"

#include "core/host/cuda_device.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace hw::emu {
namespace {

std::mutex configuration_mutex;
Config configuration;

// The numbers of the blocks (x fastest), in the order in which they run.
std::vector<int64_t> block_order(const Launch& launch, const Config& config) {
  const int64_t count = int64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t{0});
  if (config.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (config.order == Order::shuffled) {
    Random random(config.seed, 0x626c6f636bu);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.next() % i]);
  }
  return order;
}

void run_one(const Launch& launch, const Config& config, int64_t number) {
  const int64_t x = launch.grid[0], y = launch.grid[1];
  const int index[3] = {static_cast<int>(number % x), static_cast<int>(number / x % y),
                        static_cast<int>(number / (x * y))};
  Engine::local().run_block(launch, config, index, static_cast<uint64_t>(number));
}

// The failure at the lowest position of the order, whatever host threads there are.
class FirstFailure {
 public:
  bool before(size_t position) const { return position_.load() < position; }
  void report(size_t position) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (position >= position_.load()) return;
    position_ = position;
    error_ = std::current_exception();
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }
  // The same; what else was found becomes an error, or a part of the emulator's own.
  void rethrow_with(const std::string& found) const {
    if (found.empty()) return rethrow();
    std::string before;
    try {
      rethrow();
    } catch (const Error& error) {
      before = std::string(error.what()) + "\n";
    }
    throw Error(ErrorKind::runtime, before + found);
  }

 private:
  std::mutex mutex_;
  std::atomic<size_t> position_ = static_cast<size_t>(-1);
  std::exception_ptr error_;
};

}  // namespace

void configure(const Config& config) {
  const std::lock_guard<std::mutex> lock(configuration_mutex);
  configuration = config;
}

Config config() {
  const std::lock_guard<std::mutex> lock(configuration_mutex);
  return configuration;
}

void run(const Launch& launch) {
  check(current == nullptr, ErrorKind::runtime, "emulator: kernel ", launch.kernel,
        " is launched from inside a kernel");
  const Config config = emu::config();
  const int limit = cuda_device(0).shared_bytes_per_block;
  check(launch.shared_bytes <= limit, ErrorKind::runtime, "emulator: cannot launch kernel ",
        launch.kernel, " with ", launch.shared_bytes, " bytes of shared memory: the device has ",
        limit, " for a block");
  const std::vector<int64_t> order = block_order(launch, config);
  FirstFailure failure;
  const auto work = [&](size_t worker, size_t workers) {
    for (size_t i = worker; i < order.size() && !failure.before(i); i += workers) {
      try {
        run_one(launch, config, order[i]);
      } catch (...) {
        failure.report(i);
      }
    }
  };
  // The race check compares the blocks with each other, so one host thread runs them all.
  if (Races* const races = Engine::local().races()) {
    races->begin_launch(launch, config.races);
    work(0, 1);
    return failure.rethrow_with(races->report());
  }
#if defined(_OPENMP)
  const int workers = static_cast<int>(
      std::min<int64_t>(std::max(launch.workers, 1), static_cast<int64_t>(order.size())));
  if (workers > 1) {
#pragma omp parallel num_threads(workers)
    work(static_cast<size_t>(omp_get_thread_num()), static_cast<size_t>(omp_get_num_threads()));
    return failure.rethrow();
  }
#endif
  work(0, 1);
  failure.rethrow();
}

// ---- The seam -----------------------------------------------------------------------------------

void* shared(size_t size, Site site) {
  const Engine& engine = Engine::running();
  const SharedMemory& memory = engine.shared();
  if (memory.bytes() != 0 && size > memory.bytes()) {
    throw engine.fault(site, "shared<T>() needs ", size, " bytes, but the launch gave ",
                       memory.bytes());
  }
  return memory.base();
}

void sync_block(Site site) { Engine::running().meet({&kSyncBlock, 0, 0, site}, nullptr); }

void sync_warp(Site site) { Engine::running().meet({&kSyncWarp, 0, 0, site}, nullptr); }

void sync_group(int id, int threads, Site site) {
  Engine& engine = Engine::running();
  const int most = engine.warps() * kLanes;
  if (id < 1 || id >= kBarriers || threads < kLanes || threads % kLanes != 0 || threads > most) {
    throw engine.fault(site, "sync_group(", id, ", ", threads, "): the barrier has to be 1 to ",
                       kBarriers - 1, ", the threads a multiple of ", kLanes, " up to ", most);
  }
  engine.meet({&kSyncGroup, id, threads, site}, nullptr);
}

void copy_async(void* to, const void* from, int bytes, int valid, Site site) {
  Engine& engine = Engine::running();
  const char* name = bytes == 16 ? "copy_async_16" : bytes == 8 ? "copy_async_8" : "copy_async_4";
  engine.require_shared(name, to, bytes, site);
  if (valid < 0 || valid > bytes) {
    throw engine.fault(site, name, ": ", valid, " valid bytes; expected 0 to ", bytes);
  }
  if (valid > 0 && reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(bytes) != 0) {
    throw engine.fault(site, name, ": the source ", from, " is not aligned to ", bytes, " bytes");
  }
#if HW_EMU_ASAN
  // A source out of bounds is reported here, at the call, also when the copy lands late.
  unsigned char unused[16];
  if (valid > 0) std::memcpy(unused, from, static_cast<size_t>(valid));
#endif
  engine.issue_copy({to, from, bytes, valid}, __builtin_return_address(0));
}

void copy_async_commit() { Engine::running().commit_copies(); }

void copy_async_wait(int groups_under_way) { Engine::running().wait_for_copies(groups_under_way); }

}  // namespace hw::emu
