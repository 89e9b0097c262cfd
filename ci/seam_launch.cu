// SPDX-License-Identifier: Apache-2.0
// Launches for ci/check_seam.py, linked with ci/seam_runtime.cpp in place of the CUDA runtime. The
// lines that both print are LAUNCHES in ci/seam_golden.py.
#include <cstdio>

#include "core/gpu/device.cuh"

namespace {

struct ProbeKernel {
  struct Params {
    int value;
  };
  static constexpr int kThreads = 96;
  HW_DEVICE static void main(const Params& p) { hw::dev::shared<int>()[0] = p.value; }
};

void go(const char* what, hw::Grid grid, int bytes, int device) {
  std::printf("%s\n", what);
  hw::Context context;
  context.device_index = device;
  context.stream = reinterpret_cast<void*>(5);
  hw::launch<ProbeKernel>(grid, bytes, context, {1});
}

}  // namespace

int main() {
  const hw::Grid grid{7, 5, 3};
  go("49152 bytes: no opt-in", grid, 48 * 1024, 0);
  go("49168 bytes: opt-in", grid, 48 * 1024 + 16, 0);
  go("another device", grid, 1024, 1);
  go("no blocks: nothing", {0, 5, 3}, 48 * 1024 + 16, 1);
}
