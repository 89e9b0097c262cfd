// SPDX-License-Identifier: Apache-2.0
// Every fault that the emulator promises to catch is planted here and caught.
#include "buffer.h"
#include "check.h"
#include "faults.cuh"
#include "orders.h"

#if defined(HW_EMULATE)

#include "emu/fiber.h"

namespace hw::test {
namespace {

using emu::Copies;
using emu::Order;

template <class Kernel>
std::vector<float> run(int index = 0, int shared_bytes = 512, Grid grid = {}) {
  const Buffer<float> out(128, 0.0f);
  launch<Kernel>(grid, shared_bytes, context(), {out.data(), index});
  return out.read();
}

// The fault is reported in every order, and the emulator works as before afterwards.
template <class Kernel>
void check_reported(const std::vector<std::string>& parts, int index = 0, int shared_bytes = 512,
                    Grid grid = {}) {
  for_all_orders([&] {
    expect_error(parts, [&] { run<Kernel>(index, shared_bytes, grid); });
    EXPECT(std::isnan(run<ReadsUnwritten>()[0]), "a sound launch after it");
  });
}

// ---- Faults that show in the results ------------------------------------------------------------

TEST(fault_unwritten_shared_memory_is_nan) {
  for_all_orders([] {
    const std::vector<float> got = run<ReadsUnwritten>();
    for (int t = 0; t < 32; ++t) EXPECT(std::isnan(got[t]), "thread ", t, ": ", got[t]);
  });
}

TEST(fault_unwritten_shared_memory_has_the_poison_asked_for) {
  const emu::ScopedConfig scope({0, Order::forward, Copies::late, 0x7f});
  const float got = run<ReadsUnwritten>()[3];
  EXPECT(got > 3e38f && std::isfinite(got), got);
}

TEST(fault_unwritten_locals_are_nan) {
  if (HW_EMU_ASAN) return note("not run: AddressSanitizer lays frames out in its own way");
  for_all_orders([] {
    const std::vector<float> got = run<ReadsUnwrittenLocals>(3, 512, {4});
    for (int i = 0; i < 128; ++i) EXPECT(std::isnan(got[i]), "element ", i, ": ", got[i]);
  });
}

TEST(fault_shared_memory_left_by_another_block_is_nan) {
  for_all_orders([] {
    const std::vector<float> got = run<LeavesNumbers>(0, 512, {4});
    for (int i = 0; i < 128; ++i) EXPECT(std::isnan(got[i]), "element ", i, ": ", got[i]);
  });
}

TEST(fault_copy_without_wait_never_lands) {
  for (Order order : {Order::forward, Order::reverse, Order::shuffled}) {
    const emu::ScopedConfig scope(racing({1, order, Copies::late}));
    const std::vector<float> got = run<CopyWithoutWait>();
    for (int t = 0; t < 32; ++t) EXPECT(std::isnan(got[t]), "thread ", t, ": ", got[t]);
    const std::vector<float> next = run<WaitsForNothing>();
    for (int t = 0; t < 64; ++t) EXPECT(std::isnan(next[t]), "not in the next block either");
  }
}

// Whether any thread of a missing-barrier kernel has seen something other than what it should.
template <class Kernel, class Want>
bool wrong(int index, Order order, const Want& want) {
  const emu::ScopedConfig scope(racing({7, order, Copies::late}));
  const std::vector<float> got = run<Kernel>(index);
  bool any = false;
  for (int t = 0; t < Kernel::kThreads; ++t) any |= got[t] != want(t);
  return any;
}

TEST(fault_missing_block_barrier_is_caught) {
  // Reading from the thread after or before: each in-order run sees one of the two, the wrap-round
  // aside; shuffled runs see both. A distance of half a block is seen by all.
  for (int distance : {1, 64, 127}) {
    const auto want = [&](int t) { return static_cast<float>((t + distance) % 128); };
    for (Order order : {Order::forward, Order::reverse, Order::shuffled}) {
      EXPECT(wrong<MissingBlockBarrier>(distance, order, want), "distance ", distance, " order ",
             static_cast<int>(order));
    }
  }
}

TEST(fault_missing_warp_barrier_is_caught) {
  const auto want = [](int t) { return static_cast<float>(t ^ 1); };
  for (Order order : {Order::forward, Order::reverse, Order::shuffled}) {
    EXPECT(wrong<MissingWarpBarrier>(0, order, want), "order ", static_cast<int>(order));
  }
}

TEST(fault_shuffle_from_exited_lane_is_nan) {
  for_all_orders([] {
    const std::vector<float> got = run<ShuffleFromExited>();
    for (int t = 1; t < 32; ++t) EXPECT(std::isnan(got[t]), "thread ", t, ": ", got[t]);
  });
}

// ---- Faults that are reported -------------------------------------------------------------------

TEST(fault_divergent_operation_is_reported) {
  check_reported<DivergentOperation>({"DivergentOperation", "block (0, 0, 0)", "divergent warp",
                                      "sync_block", "shuffle", "faults.cuh:"});
}

TEST(fault_divergent_place_is_reported) {
  check_reported<DivergentPlace>({"DivergentPlace", "divergent warp", "sync_warp", "faults.cuh:"});
}

TEST(fault_divergent_block_is_reported) {
  check_reported<DivergentBlock>({"DivergentBlock", "divergent block", "sync_group"});
}

TEST(fault_uneven_loop_is_reported) {
  check_reported<UnevenLoop>({"UnevenLoop", "divergent warp", "shuffle_xor", "sync_block"}, 9);
}

TEST(fault_group_count_mismatch_is_reported) {
  check_reported<GroupCountMismatch>(
      {"GroupCountMismatch", "barrier count mismatch", "barrier 3", "64", "96"});
}

TEST(fault_deadlock_of_a_group_is_reported) {
  check_reported<GroupTooFew>({"deadlock in kernel", "test::GroupTooFew, block (0, 0, 0)",
                               "threads 0 to 63 wait at sync_group(1, 96)", "faults.cuh:",
                               "64 of 96 threads have arrived", "threads 64 to 95 have exited"});
}

TEST(fault_crossed_groups_are_reported) {
  check_reported<CrossedGroups>({"deadlock", "threads 0 to 31 wait at sync_group(1, 64)",
                                 "threads 32 to 63 wait at sync_group(2, 64)"});
}

TEST(fault_group_against_block_is_reported) {
  check_reported<GroupAgainstBlock>({"deadlock", "threads 0 to 31 wait at sync_group(1, 64)",
                                     "threads 32 to 63 wait at sync_block",
                                     "1 of 2 warps have arrived"});
}

TEST(fault_group_arguments_are_reported) {
  check_reported<GroupNumber>({"GroupNumber", "sync_group(0, 64)", "1 to 15"}, 0);
  check_reported<GroupNumber>({"sync_group(16, 64)"}, 16);
  check_reported<GroupThreads>({"sync_group(1, 48)", "multiple of 32 up to 64"}, 48);
  check_reported<GroupThreads>({"sync_group(1, 96)"}, 96);
  check_reported<GroupThreads>({"sync_group(1, 0)"}, 0);
}

TEST(fault_multiply_without_a_lane_is_reported) {
  check_reported<MultiplyWithoutLane>(
      {"MultiplyWithoutLane", "mma_bf16 needs all 32 lanes", "31", "faults.cuh:"});
}

TEST(fault_shared_memory_too_small_is_reported) {
  check_reported<SharedTooSmall>({"SharedTooSmall", "256 bytes", "gave 128"}, 0, 128);
}

TEST(fault_matrix_row_is_reported) {
  check_reported<LoadMatrixAt>({"load_matrix_x4", "offset 8", "not aligned to 16"}, 8);
  check_reported<LoadMatrixAt>({"load_matrix_x4", "offset 512", "has 512 bytes"}, 512);
  check_reported<LoadMatrixAt>({"load_matrix_x4", "offset -16"}, -16);
}

TEST(fault_misaligned_vector_is_reported) {
  check_reported<MisalignedVector<false>>({"an access to 16 bytes is no multiple"}, 1);
  check_reported<MisalignedVector<true>>({"an access to 16 bytes is no multiple"}, 1);
  EXPECT(!run<MisalignedVector<true>>(4).empty());
}

TEST(fault_copy_destination_is_reported) {
  check_reported<CopyTo<16>>({"copy_async_16", "thread 5", "offset 500", "not in shared"}, 500);
  check_reported<CopyTo<16>>({"copy_async_16", "offset 4", "not aligned to 16"}, 4);
  check_reported<CopyTo<17>>({"copy_async_16", "17 valid bytes", "0 to 16"}, 0);
  check_reported<CopyTo<-1>>({"copy_async_16", "-1 valid bytes"}, 0);
}

TEST(fault_copy_source_alignment_is_reported) {
  check_reported<CopyFrom>({"copy_async_16", "source", "not aligned to 16"}, 3);
}

TEST(fault_block_is_named) {
  expect_error({"block (2, 1, 3)"}, [] {
    const emu::ScopedConfig scope({0, Order::reverse, Copies::late});
    run<GroupTooFew>(0, 512, {3, 2, 4});
  });
}

// Without AddressSanitizer, writes near shared memory are found when the block ends.
TEST(fault_write_beyond_shared_memory_is_reported) {
  if (HW_EMU_ASAN) return note("not run: AddressSanitizer ends the process, see the planted tests");
  check_reported<SharedWrite>({"SharedWrite", "byte 512 of shared memory", "gave 512"}, 128);
  check_reported<SharedWrite>({"byte -4 of shared memory"}, -1);
  check_reported<SharedWrite>({"shared memory was written", "gave 0 bytes"}, 0, 0);
}

}  // namespace
}  // namespace hw::test

#endif
