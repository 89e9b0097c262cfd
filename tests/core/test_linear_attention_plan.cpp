// SPDX-License-Identifier: Apache-2.0
// Which calls of linear attention are cut on a GPU: those that leave more of it idle than the
// totals and states of segments cost.
#include "native_test.h"
#include "ops/linear_attention/linear_attention_sm80_layout.h"

namespace {

using hw::linear_attention::CallSizes;
using hw::linear_attention::Plan;
using hw::linear_attention::Schedule;

// taylor2 with D = 16 and 16 heads.
CallSizes call(int multiprocessors, int64_t batch, int64_t tokens, int value_dim = 64) {
  CallSizes s;
  s.batch = s.sequences = batch;
  s.tokens = tokens;
  s.query_heads = s.key_heads = 16;
  s.dim = 16;
  s.value_dim = value_dim;
  s.features = 153;
  s.causal = s.normalize = true;
  s.multiprocessors = multiprocessors;
  return s;
}

Plan plan(const CallSizes& s) { return hw::linear_attention::sm80::plan_of(s, s.value_dim); }

void expect_single(const CallSizes& s) {
  const Plan p = plan(s);
  EXPECT(p.schedule == Schedule::single, s.batch, " x ", s.tokens, " on ", s.multiprocessors);
  EXPECT(p.segment_tokens == s.tokens && p.num_slots == s.sequences, p.segment_tokens);
}

void expect_split(const CallSizes& s, int64_t length) {
  const Plan p = plan(s);
  EXPECT(p.schedule == Schedule::split, s.batch, " x ", s.tokens, " on ", s.multiprocessors);
  EXPECT(p.segment_tokens == length, p.segment_tokens, " rows in a segment");
}

TEST(calls_that_nearly_fill_the_device_are_not_cut) {
  for (const int64_t tokens : {1024, 8192, 65536}) {
    expect_single(call(132, 16, tokens));  // the benchmark: 256 blocks, where 264 fit
    expect_single(call(108, 13, tokens));
    expect_single(call(132, 17, tokens));  // a second round of few blocks
    expect_single(call(132, 64, tokens));
  }
}

TEST(idle_multiprocessors_are_filled_in_one_round) {
  expect_split(call(132, 1, 8192), 512);
  expect_split(call(132, 4, 8192), 2048);
  expect_split(call(132, 8, 8192), 4096);
  expect_split(call(108, 4, 8192), 2752);
  // 128 blocks where 216 fit: two segments each are a second round, for no gain.
  expect_single(call(108, 8, 8192));
}

TEST(short_sequences_are_not_worth_their_states) {
  expect_single(call(132, 1, 600));
  expect_split(call(132, 1, 1024), 64);
  expect_single(call(132, 8, 2048));
}

TEST(a_wide_tile_has_its_multiprocessor_alone) {
  expect_single(call(132, 8, 8192, 128));  // 128 blocks, where 132 fit
  expect_split(call(132, 4, 8192, 128), 4096);
  CallSizes s = call(132, 8, 8192, 256);  // two slices each
  EXPECT(hw::linear_attention::sm80::plan_of(s, 128).schedule == Schedule::single, "full");
}

TEST(without_a_mask_totals_are_there_anyway) {
  CallSizes s = call(132, 8, 2048);
  s.causal = false;
  expect_split(s, 1024);
  EXPECT(plan(s).has_totals(), "of segments");
  s.batch = s.sequences = 64;
  expect_single(s);
  EXPECT(plan(s).has_totals(), "of whole sequences");
}

TEST(packed_sequences_are_cut_by_their_share) {
  CallSizes s = call(132, 1, 16384);
  s.packed = true;
  s.sequences = 4;
  const Plan p = plan(s);
  EXPECT(p.schedule == Schedule::split, "64 blocks");
  EXPECT(p.num_slots == 16384 / p.segment_tokens + 4, p.num_slots);
  EXPECT(p.num_slots * 16 <= 264, p.num_slots, " slots in one round");
  s.sequences = 17;
  EXPECT(plan(s).schedule == Schedule::single, "272 blocks");
}

TEST(half_a_device_of_short_calls_is_direct) {
  EXPECT(plan(call(132, 1, 448)).schedule == Schedule::direct, "tiles alone");
  EXPECT(plan(call(132, 17, 448)).schedule == Schedule::single, "the device is full");
  EXPECT(plan(call(132, 9, 448, 128)).schedule == Schedule::single, "of wide tiles");
  EXPECT(plan(call(132, 64, 256)).schedule == Schedule::direct, "always");
}

}  // namespace
