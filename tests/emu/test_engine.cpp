// SPDX-License-Identifier: Apache-2.0
// The engine itself: orders, seeds, host threads, exceptions, limits of a launch.
#include <algorithm>
#include <chrono>
#include <numeric>
#include <thread>

#include "buffer.h"
#include "check.h"
#include "orders.h"
#include "primitives.cuh"

#include "core/host/cuda_device.h"

namespace hw::test {
namespace {

TEST(launch_of_no_blocks_does_nothing) {
  const Buffer<int> out(1, 5);
  for (Grid grid : {Grid{0, 1, 1}, Grid{1, 0, 1}, Grid{1, 1, 0}}) {
    launch<Coordinates>(grid, 0, context(), {nullptr});
  }
  EXPECT(out.read()[0] == 5);
}

TEST(launch_beyond_limits_is_refused) {
  const auto refuse = [](Grid grid, int bytes, const std::string& part) {
    expect_error({"test::Coordinates", "96 threads", part},
                 [&] { launch<Coordinates>(grid, bytes, context(), {nullptr}); });
  };
  refuse({1, 65536, 1}, 0, "(1, 65536, 1)");
  refuse({1, 1, 65536}, 0, "(1, 1, 65536)");
  refuse({int64_t{1} << 31, 1, 1}, 0, "(2147483648, 1, 1)");
  refuse({-1, 1, 1}, 0, "(-1, 1, 1)");
  refuse({1, 1, 1}, 227 * 1024 + 1, "232449 bytes");
  refuse({1, 1, 1}, -1, "-1 bytes");
}

TEST(kernel_names_are_readable) {
  const std::string plain = kernel_name<Coordinates>(), argument = kernel_name<Shuffles<float>>();
  EXPECT(plain.ends_with("test::Coordinates") && plain.size() <= 21, plain);
  EXPECT(argument.ends_with("test::Shuffles<float>") && argument.size() <= 25, argument);
}

#if defined(HW_EMULATE)

using emu::Copies;
using emu::Order;

TEST(launch_beyond_the_memory_of_the_device_is_refused) {
  const Buffer<int> out(9 * Coordinates::kThreads, 0);
  CudaDevice small = kEmulatedDevice;
  small.shared_bytes_per_block = 99 * 1024;
  emulate_cuda_device(small);
  launch<Coordinates>({}, 99 * 1024, context(), {out.data()});
  expect_error({"test::Coordinates", "101377 bytes", "the device has 101376"},
               [&] { launch<Coordinates>({}, 99 * 1024 + 1, context(), {out.data()}); });
  emulate_cuda_device(kEmulatedDevice);
  launch<Coordinates>({}, 99 * 1024 + 1, context(), {out.data()});
}

// ticket[block, thread] = how many threads of the grid came before, at the start and behind a
// barrier of the block.
struct Arrivals {
  static constexpr int kThreads = 64;
  struct Params {
    int* counter;  // [1]
    int* ticket;   // [blocks, kThreads, 2]
  };
  static void main(const Params& p) {
    int* row = p.ticket + 2 * (dev::block_index_x() * kThreads + dev::thread_index());
    row[0] = dev::atomic_add(p.counter, 1);
    dev::sync_block();
    row[1] = dev::atomic_add(p.counter, 1);
  }
};

std::vector<int> arrivals(const emu::Config& config, int blocks = 3) {
  const emu::ScopedConfig scope(config);
  const Buffer<int> counter(1, 0), ticket(blocks * Arrivals::kThreads * 2, -1);
  launch<Arrivals>({blocks}, 0, context(), {counter.data(), ticket.data()});
  return ticket.read();
}

TEST(order_forward_and_reverse) {
  const int n = Arrivals::kThreads;
  const std::vector<int> forward = arrivals({0, Order::forward, Copies::late});
  const std::vector<int> reverse = arrivals({0, Order::reverse, Copies::late});
  for (int b = 0; b < 3; ++b) {
    for (int t = 0; t < n; ++t) {
      EXPECT(forward[2 * (b * n + t)] == 2 * b * n + t, "block ", b, " thread ", t);
      EXPECT(reverse[2 * (b * n + t)] == 2 * (2 - b) * n + n - 1 - t, "block ", b, " thread ", t);
    }
  }
}

TEST(order_shuffled_depends_on_the_seed_only) {
  const std::vector<int> one = arrivals({1, Order::shuffled, Copies::late});
  EXPECT(one == arrivals({1, Order::shuffled, Copies::late}), "the same seed, the same order");
  EXPECT(one != arrivals({2, Order::shuffled, Copies::late}), "another seed, another order");
  EXPECT(one != arrivals({1, Order::forward, Copies::late}), "not in order");
  // The order is drawn anew behind the barrier, and in the next block.
  const int n = Arrivals::kThreads;
  const auto ranks = [&](int block, int phase) {
    std::vector<int> who(n);
    std::iota(who.begin(), who.end(), 0);
    const auto ticket = [&](int t) { return one[2 * (block * n + t) + phase]; };
    std::sort(who.begin(), who.end(), [&](int a, int b) { return ticket(a) < ticket(b); });
    return who;
  };
  EXPECT(ranks(0, 0) != ranks(0, 1), "behind the barrier");
  EXPECT(ranks(0, 0) != ranks(1, 0), "in another block");
}

TEST(order_shuffled_changes_the_order_of_blocks) {
  const std::vector<int> tickets = arrivals({1, Order::shuffled, Copies::late}, 8);
  std::vector<int> first;
  for (int b = 0; b < 8; ++b) first.push_back(tickets[2 * b * Arrivals::kThreads] / 128);
  EXPECT(!std::is_sorted(first.begin(), first.end()), "blocks ran in order");
  std::sort(first.begin(), first.end());
  for (int b = 0; b < 8; ++b) EXPECT(first[b] == b, "block ", b, " ran once");
}

// seen[block, thread] = sum of what the thread has seen at unguarded reads: depends on the order.
struct Racy {
  static constexpr int kThreads = 64;
  struct Params {
    float* seen;  // [blocks, kThreads]
  };
  static void main(const Params& p) {
    float* s = dev::shared<float>();
    const int t = dev::thread_index();
    s[t] = static_cast<float>(t);
    dev::sync_block();
    float sum = 0;
    for (int i = 1; i < 5; ++i) {
      sum += s[(t + i) % kThreads];
      s[t] = dev::shuffle_xor(sum, i);
    }
    p.seen[int64_t{dev::block_index_x()} * kThreads + t] = sum;
  }
};

TEST(host_threads_do_not_change_results) {
  const auto seen = [](int workers) {
    const Buffer<float> out(11 * Racy::kThreads, 0.0f);
    launch<Racy>({11}, Racy::kThreads * 4, context(workers), {out.data()});
    return out.read();
  };
  for_all_orders([&] {
    const emu::ScopedConfig scope(racing(emu::config()));
    const std::vector<float> one = seen(1);
    for (int workers : {2, 3, 16}) EXPECT(one == seen(workers), workers, " host threads");
  });
  const emu::ScopedConfig scope(racing({1, Order::shuffled, Copies::late}));
  const std::vector<float> one = seen(1);
  emu::configure(racing({2, Order::shuffled, Copies::late}));
  EXPECT(one != seen(1), "the kernel does depend on the order");
}

// ---- Exceptions ---------------------------------------------------------------------------------

// Counts the objects that are alive.
struct Counted {
  static inline int alive = 0;
  std::vector<int> memory = std::vector<int>(100);
  Counted() { ++alive; }
  ~Counted() { --alive; }
};

struct KernelFailure {
  int block;
};

// Thread `thread` of the blocks from `block` on throws, before or behind a barrier; the others hold
// objects while they wait or have not started.
struct Throws {
  static constexpr int kThreads = 96;
  struct Params {
    int block, thread;
    bool behind;
  };
  static void main(const Params& p) {
    const Counted object;
    const bool mine = dev::block_index_x() >= p.block && dev::thread_index() == p.thread;
    if (!p.behind && mine) throw KernelFailure{dev::block_index_x()};
    dev::sync_block();
    if (p.behind && mine) throw KernelFailure{dev::block_index_x()};
    dev::shuffle(1, 0);
    dev::sync_block();
  }
};

int block_that_threw(const Throws::Params& params, int workers) {
  try {
    launch<Throws>({6}, 0, context(workers), params);
  } catch (const KernelFailure& failure) {
    return failure.block;
  }
  return -1;
}

TEST(exceptions_reach_the_caller_and_unwind_the_block) {
  for_all_orders([] {
    const emu::ScopedConfig scope(racing(emu::config()));  // all count in one number
    const bool forward = emu::config().order == Order::forward;
    for (int thread : {0, 37, 95}) {
      for (bool behind : {false, true}) {
        const int block = block_that_threw({2, thread, behind}, 1);
        EXPECT(forward ? block == 2 : block >= 2, "block ", block);
        EXPECT(Counted::alive == 0, Counted::alive, " objects are still alive");
      }
    }
    EXPECT(block_that_threw({99, 0, false}, 1) == -1, "nothing is thrown");
    EXPECT(Counted::alive == 0);
  });
}

// Every block from `first` on throws, those behind it so late that they are under way by then.
struct ThrowsFromEach {
  static constexpr int kThreads = 32;
  struct Params {
    int first;  // the first block that throws
  };
  static void main(const Params& p) {
    if (dev::block_index_x() > p.first && dev::thread_index() == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    dev::sync_warp();
    if (dev::block_index_x() >= p.first) throw KernelFailure{dev::block_index_x()};
  }
};

TEST(exceptions_of_several_host_threads_are_the_first_in_order) {
  for (int workers : {1, 2, 3}) {
    for (int first : {0, 1, 4, 5}) {
      int block = -1;
      try {
        launch<ThrowsFromEach>({6}, 0, context(workers), {first});
      } catch (const KernelFailure& failure) {
        block = failure.block;
      }
      EXPECT(block == first, "block ", block, " with ", workers, " host threads");
    }
  }
}

// A wait inside a destructor, while the block is being unwound, returns at once.
struct WaitsInDestructor {
  static constexpr int kThreads = 32;
  struct Params {};
  struct Guard {
    ~Guard() { dev::sync_warp(); }
  };
  static void main(const Params&) {
    const Guard guard;
    if (dev::lane() == 31) throw KernelFailure{0};
    dev::sync_block();
  }
};

TEST(exceptions_pass_destructors_that_wait) {
  const emu::ScopedConfig scope({0, Order::reverse, Copies::late});
  bool thrown = false;
  try {
    launch<WaitsInDestructor>({}, 0, context(), {});
  } catch (const KernelFailure&) {
    thrown = true;
  }
  EXPECT(thrown);
}

// Kernel code that swallows every exception cannot keep a failed block alive: thread `thrower`
// comes last to the barrier and throws behind it, before any other has gone on.
struct SwallowsAll {
  static constexpr int kThreads = 64;
  struct Params {
    int* passed;  // [1] threads that got through
    int thrower;
  };
  static void main(const Params& p) {
    try {
      dev::sync_block();
    } catch (...) {
    }
    if (dev::thread_index() == p.thrower) throw KernelFailure{0};
    dev::shuffle(1, 0);
    dev::atomic_add(p.passed, 1);
  }
};

TEST(exceptions_cannot_be_swallowed) {
  for (Order order : {Order::forward, Order::reverse}) {
    const emu::ScopedConfig scope({0, order, Copies::late});
    const Buffer<int> passed(1, 0);
    bool thrown = false;
    try {
      launch<SwallowsAll>({}, 0, context(), {passed.data(), order == Order::forward ? 63 : 0});
    } catch (const KernelFailure&) {
      thrown = true;
    }
    EXPECT(thrown && passed.read()[0] == 0, passed.read()[0], " threads passed");
  }
}

struct Launches {
  static constexpr int kThreads = 1;
  struct Params {};
  static void main(const Params&) { launch<Launches>({}, 0, context(), {}); }
};

TEST(launch_from_a_kernel_is_refused) {
  expect_error({"Launches", "inside a kernel"}, [] { launch<Launches>({}, 0, context(), {}); });
}

// ---- Stacks -------------------------------------------------------------------------------------

// Uses the largest block and a good part of each stack.
struct LargestBlock {
  static constexpr int kThreads = 1024;
  struct Params {
    int* out;  // [kThreads]
  };
  static void main(const Params& p) {
    volatile int local[8192] = {};
    const int t = dev::thread_index();
    local[t] = t;
    dev::sync_block();
    p.out[t] = local[t] + static_cast<int>(dev::ballot(true) & 1u);
  }
};

TEST(largest_block) {
  const Buffer<int> out(1024, 0);
  launch<LargestBlock>({}, 0, context(), {out.data()});
  const std::vector<int> got = out.read();
  for (int t = 0; t < 1024; ++t) EXPECT(got[t] == t + 1, "thread ", t);
}

#endif

}  // namespace
}  // namespace hw::test
