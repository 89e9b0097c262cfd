// SPDX-License-Identifier: Apache-2.0
// What the dispatcher must know of a CUDA device. Asked from the runtime at the first call on that
// device and remembered: later calls, also those under graph capture, ask nothing. In builds without
// CUDA there is no device; in the emulator every device is a small fixed one.
#pragma once

#include <cstdint>

namespace hw {

struct CudaDevice {
  int capability = 0;  // 80 for sm_80; 0: no such device
  int multiprocessors = 0;
};

const CudaDevice& cuda_device(int index);

// True if the code built for `archs` (such as "80-real;90-virtual") runs on a device of that
// capability: machine code within the same major version, PTX on anything later, and the
// architecture-specific "90a" on exactly that one.
bool archs_cover(const char* archs, int capability);

}  // namespace hw
