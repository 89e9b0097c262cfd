// SPDX-License-Identifier: Apache-2.0
// Planted races are reported with both lines, in every order of the threads; their sound twins are
// not. Runs in builds of the preset `races` alone.
#include "buffer.h"
#include "check.h"
#include "gemm_case.h"
#include "orders.h"
#include "races.cuh"

#if defined(HW_EMULATE) && defined(HW_EMU_RACES)

namespace hw::test {
namespace {

using emu::Order;
using emu::RaceCheck;

template <class Kernel>
std::vector<float> run(int blocks = 1) {
  const Buffer<float> out(256, 0.0f), from(64, 1.0f);
  launch<Kernel>({blocks}, 512, context(), {out.data(), from.data()});
  return out.read();
}

template <class Kernel>
void check_sound(int blocks = 1) {
  for_all_orders([&] { run<Kernel>(blocks); });
}

// Every report names the kernel, shared or global memory, and two lines of races.cuh.
template <class Kernel>
void check_found(std::vector<std::string> parts, int blocks = 1) {
  parts.insert(parts.end(), {"in kernel test::", " it at ", "emu/races.cuh:", "1 race"});
  for_all_orders([&] {
    expect_error(parts, [&] { run<Kernel>(blocks); });
    run<RemovedBarrier<true>>();  // a sound launch after it
  });
}

TEST(race_removed_barrier) {
  check_found<RemovedBarrier<false>>({"of shared memory", " reads it", " writes it"});
  check_sound<RemovedBarrier<true>>();
}

TEST(race_same_value) { check_found<SameValue>({"byte 0 of shared memory", "writes it"}); }

TEST(race_adds_without_order) {
  for_all_orders([] {
    expect_error({"2 races", "byte 0 of shared memory", "reads it", "writes it"},
                 [] { run<AddsWithoutOrder>(); });
  });
}

TEST(race_copy_of_another_thread) {
  check_found<CopyOfAnother<false>>({"the copy of thread", "writes it", "reads it"});
  check_sound<CopyOfAnother<true>>();
}

TEST(race_copy_not_waited_for) {
  check_found<CopyNotWaitedFor<false>>({"the copy of thread", "before a wait for the copy"});
  check_sound<CopyNotWaitedFor<true>>();
}

TEST(race_stage_refilled) {
  check_found<StageRefilled<false>>({"the copy of thread", "writes it", "reads it"});
  check_sound<StageRefilled<true>>();
}

TEST(race_two_blocks_one_output) {
  check_found<OneOutput<false>>({"global memory", "of block (0, 0, 0)", "of block (1, 0, 0)",
                                 "blocks of a grid have no order"},
                                2);
  check_sound<OneOutput<true>>(3);
}

TEST(race_reads_another_block) {
  check_found<ReadsOtherBlock>({"global memory", "blocks of a grid have no order"}, 2);
}

TEST(race_relay) {
  check_found<Relay<false>>({"of shared memory"});
  check_sound<Relay<true>>();
}

TEST(race_behind_shuffle_is_one_in_strict_mode) {
  check_sound<BehindShuffle<false>>();
  emu::Config strict;
  strict.races = RaceCheck::strict;
  const emu::ScopedConfig scope(strict);
  expect_error({"1 race", "of shared memory"}, [] { run<BehindShuffle<false>>(); });
  run<BehindShuffle<true>>();
  run<RemovedBarrier<true>>();
  run<Relay<true>>();
}

TEST(race_with_an_exited_thread) { check_found<ReadsFromExited>({"thread 3 of block"}); }

TEST(race_with_an_atomic) {
  check_found<Counts<false>>({"updates it", "reads it"});
  check_sound<Counts<true>>(4);
}

TEST(race_matrix_rows) {
  check_found<MatrixRows<false>>({"of shared memory", "core/gpu/mma.cuh:"});
  check_sound<MatrixRows<true>>();
}

// A matrix product whose synchronisation is planted wrong, also where no wrong number shows it.
template <Plant kPlant>
void check_gemm_found(const std::string& second) {
  const GemmCase<Format::bf16> c(64, 64, 160);
  for_all_orders([&] {
    expect_error(
        {"the copy of thread", "writes it at core/gpu/async_copy.cuh:", "gemm.cuh:", second},
        [&] { c.run<kPlant>(); });
  });
}

TEST(race_gemm_missing_wait) { check_gemm_found<Plant::no_wait>("before a wait for the copy"); }
TEST(race_gemm_wait_one_short) { check_gemm_found<Plant::wait_one_short>("core/gpu/mma.cuh:"); }
TEST(race_gemm_no_barrier_after_wait) {
  check_gemm_found<Plant::no_barrier_arrived>("core/gpu/mma.cuh:");
}
TEST(race_gemm_stage_refilled) { check_gemm_found<Plant::no_barrier_free>("core/gpu/mma.cuh:"); }

TEST(no_race_between_neighbours) { check_sound<Neighbours>(); }

TEST(race_check_can_be_switched_off) {
  emu::Config off;
  off.races = RaceCheck::off;
  const emu::ScopedConfig scope(off);
  EXPECT(run<SameValue>()[5] == 1.0f);
}

}  // namespace
}  // namespace hw::test

#endif
