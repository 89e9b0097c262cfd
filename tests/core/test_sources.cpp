// SPDX-License-Identifier: Apache-2.0
// Attention on the CPU over keys that lie anywhere (sources.h), without wide instruction sets; with
// pairs of bf16 on machines that multiply them.
#define HW_ISA baseline
#include "sources.h"

#include "core/host/cpu_features.h"

#if defined(__x86_64__)
namespace hw::test {
void check_sources_of_pairs();
}  // namespace hw::test
#endif

namespace {

TEST(keys_may_lie_anywhere) {
  hw::test::check_sources<float>();
  hw::test::check_sources<double>();
  hw::test::check_sources<hw::bf16>();
}

#if defined(__x86_64__)
TEST(keys_of_pairs_may_lie_anywhere) {
  if (hw::machine_has(hw::Isa::avx512bf16)) return hw::test::check_sources_of_pairs();
  std::printf("        not checked: this machine has no AVX512-BF16\n");
}
#endif

}  // namespace
