// SPDX-License-Identifier: Apache-2.0
// Attention over keys that lie anywhere, multiplied in pairs. Called by test_sources.cpp.
#define HW_ISA avx512bf16
#include "sources.h"

namespace hw::test {

void check_sources_of_pairs() {
  check_sources<bf16>();
  check_sources<float>();
}

}  // namespace hw::test
