// SPDX-License-Identifier: Apache-2.0
// The emulator's tests of the primitives, run by the hardware that it imitates (ci/gpu.sh):
//   nvcc -x cu -std=c++20 --expt-relaxed-constexpr -Icsrc -Itests tests/device/main.cpp
//        tests/emu/test_primitives.cpp tests/emu/test_fragments.cpp tests/emu/test_gemm.cpp
#include "native_test.h"

int main(int argc, char** argv) { return hw::test::run(argc, argv); }
