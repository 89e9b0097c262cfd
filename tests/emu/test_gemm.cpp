// SPDX-License-Identifier: Apache-2.0
// A double-buffered tensor-core matrix product, whole, and with its synchronisation planted wrong.
#include <ctime>

#include "gemm_case.h"
#include "orders.h"

namespace hw::test {
namespace {

template <Format kFormat>
void check_gemm() {
  const GemmCase<kFormat> whole(64, 64, 64), odd(77, 72, 88), thin(1, 8, 8);
  for_all_orders([&] {
    for (const auto* c : {&whole, &odd, &thin}) {
      EXPECT(c->wrong(c->run()).count == 0, c->m, " x ", c->n, " x ", c->k);
    }
  });
}

TEST(gemm_bf16) { check_gemm<Format::bf16>(); }
TEST(gemm_f16) { check_gemm<Format::f16>(); }
TEST(gemm_tf32) { check_gemm<Format::tf32>(); }

#if defined(HW_EMULATE)

using emu::Copies;
using emu::Order;

constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::shuffled};

// The fault changes the result under this landing of copies in every thread order.
template <Plant kPlant>
void check_caught(Copies copies) {
  const GemmCase<Format::bf16> c(64, 64, 160);
  for (Order order : kOrders) {
    const emu::ScopedConfig scope(racing({5, order, copies}));
    EXPECT(c.wrong(c.run<kPlant>()).count > 0, "order ", static_cast<int>(order));
  }
}

TEST(fault_wait_one_short_is_caught) {
  const GemmCase<Format::f16> c(64, 64, 64);
  for (Order order : kOrders) {
    const emu::ScopedConfig scope(racing({5, order, Copies::late}));
    const auto wrong = c.wrong(c.run<Plant::wait_one_short>());
    EXPECT(wrong.nan == 64 * 64, wrong.nan, " elements are NaN, all should be");
  }
}

TEST(fault_missing_wait_is_caught) { check_caught<Plant::no_wait>(Copies::late); }

TEST(fault_missing_barrier_after_wait_is_caught) {
  check_caught<Plant::no_barrier_arrived>(Copies::late);
}

TEST(fault_stage_reused_too_early_is_caught) {
  check_caught<Plant::no_barrier_free>(Copies::early);
}

// Late landing alone would not have shown it: the copies land only at a wait, behind the barrier
// that follows it. This is why both landings are run.
TEST(fault_stage_reused_too_early_needs_early_landing) {
  const GemmCase<Format::bf16> c(64, 64, 160);
  const emu::ScopedConfig scope(racing({5, Order::forward, Copies::late}));
  EXPECT(c.wrong(c.run<Plant::no_barrier_free>()).count == 0);
}

TEST(gemm_speed) {
  const GemmCase<Format::bf16> c(256, 256, 256);
  for (Order order : kOrders) {
    const emu::ScopedConfig scope({1, order, Copies::late});
    const std::clock_t start = std::clock();
    EXPECT(c.wrong(c.run()).count == 0);
    const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    note("order ", static_cast<int>(order), ": ",
         static_cast<int>(2.0 * 256 * 256 * 256 / seconds * 1e-6), " MFLOP/s of one core");
  }
}

#endif

}  // namespace
}  // namespace hw::test
