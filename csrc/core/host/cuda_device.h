// SPDX-License-Identifier: Apache-2.0
// What the dispatcher must know of a CUDA device. Asked from the runtime at the first call on that
// device and remembered: later calls, also those under graph capture, ask nothing. In builds
// without CUDA there is no device; in the emulator every device is the one of its configuration.
#pragma once

#include <cstdint>

namespace hw {

struct CudaDevice {
  int capability = 0;  // 80 for sm_80; 0: no such device
  int multiprocessors = 0;
  // The most shared memory that a block may have, static and dynamic together, for a kernel that
  // opts in: 64 KB on sm_75, 163 KB on sm_80, 99 KB on sm_86, sm_89 and sm_120, 227 KB on sm_90.
  int shared_bytes_per_block = 0;
};

inline constexpr int kMaxDevices = 128;

CudaDevice cuda_device(int index);

#if defined(HW_EMULATE)
// By default few multiprocessors, so that small cases take the plans of a device that is full.
inline constexpr CudaDevice kEmulatedDevice{
    .capability = 80, .multiprocessors = 4, .shared_bytes_per_block = 163 * 1024};

// From the next call on every device is this one; a launch that asks for more memory fails.
void emulate_cuda_device(const CudaDevice& device);
#endif

// True if the code built for `archs` (such as "80-real;90-virtual") runs on a device of that
// capability: machine code within the same major version, PTX on anything later, and the
// architecture-specific "90a" on exactly that one.
bool archs_cover(const char* archs, int capability);

}  // namespace hw
