// SPDX-License-Identifier: Apache-2.0
// Pairs of bf16 (core/cpu/bf16_dot.h), on machines that multiply them. The checks themselves are
// compiled for the instruction set, in *_avx512bf16.cpp.
#include "native_test.h"

#include "core/host/cpu_features.h"

#if defined(__x86_64__)

namespace hw::test {
void check_rounding_of_pairs();
void check_order_of_pairs();
void check_products_of_pairs();
void check_rows_of_pairs();
void check_transposed_pairs();
void check_matrices_of_pairs();
void check_operands_of_pairs();
void check_coarse_exponentials();
}  // namespace hw::test

namespace {

void where_possible(void (*check)()) {
  if (hw::machine_has(hw::Isa::avx512bf16)) return check();
  std::printf("        not checked: this machine has no AVX512-BF16\n");
}

TEST(pairs_round_to_nearest_even) { where_possible(hw::test::check_rounding_of_pairs); }
TEST(pairs_keep_their_order) { where_possible(hw::test::check_order_of_pairs); }
TEST(pairs_multiply_and_add) { where_possible(hw::test::check_products_of_pairs); }
TEST(rows_of_bf16_become_pairs) { where_possible(hw::test::check_rows_of_pairs); }
TEST(pairs_transpose) { where_possible(hw::test::check_transposed_pairs); }
TEST(small_products_of_pairs_match_plain_loops) {
  where_possible(hw::test::check_matrices_of_pairs);
}
TEST(coarse_exponentials) { where_possible(hw::test::check_coarse_exponentials); }
TEST(operands_of_attention_become_pairs) { where_possible(hw::test::check_operands_of_pairs); }

}  // namespace

#endif
