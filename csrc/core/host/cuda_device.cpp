// SPDX-License-Identifier: Apache-2.0
#include "core/host/cuda_device.h"

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "core/error.h"

#if !defined(HW_EMULATE)
#include "build_config.h"
#endif

#if !defined(HW_EMULATE) && HW_CUDA_FOUND
#include <cuda_runtime_api.h>
#define HW_HAS_CUDA_RUNTIME 1
#else
#define HW_HAS_CUDA_RUNTIME 0
#endif

namespace hw {
namespace {

// One entry of an architecture list, for example "90a-virtual".
bool entry_covers(const char* entry, size_t length, int capability) {
  char* end = nullptr;
  const int arch = static_cast<int>(std::strtol(entry, &end, 10));
  const bool specific = end < entry + length && (*end == 'a' || *end == 'f');
  const size_t left = length - static_cast<size_t>(end - entry) - (specific ? 1 : 0);
  const char* kind = end + (specific ? 1 : 0);
  if (specific) return arch == capability;
  const bool real = left == 0 || std::strncmp(kind, "-real", left) == 0;
  const bool ptx = left == 0 || std::strncmp(kind, "-virtual", left) == 0;
  return (real && arch / 10 == capability / 10 && arch <= capability) ||
         (ptx && arch <= capability);
}

#if HW_HAS_CUDA_RUNTIME

void succeed(cudaError_t status, const char* what) {
  check(status == cudaSuccess, ErrorKind::runtime, what, ": ", cudaGetErrorString(status));
}

CudaDevice query(int index) {
  int major = 0, minor = 0, count = 0, shared_bytes = 0;
  succeed(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
          "CUDA device capability");
  succeed(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
          "CUDA device capability");
  succeed(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index),
          "CUDA multiprocessor count");
  succeed(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          "CUDA shared memory per block");
  return {major * 10 + minor, count, shared_bytes};
}

#endif

}  // namespace

bool archs_cover(const char* archs, int capability) {
  while (*archs) {
    const size_t length = std::strcspn(archs, ";");
    if (entry_covers(archs, length, capability)) return true;
    archs += length + (archs[length] == ';');
  }
  return false;
}

#if HW_HAS_CUDA_RUNTIME

CudaDevice cuda_device(int index) {
  static std::once_flag once[kMaxDevices];
  static CudaDevice devices[kMaxDevices];
  check(index >= 0 && index < kMaxDevices, ErrorKind::runtime, "CUDA device index ", index);
  std::call_once(once[index], [index] { devices[index] = query(index); });
  return devices[index];
}

#elif defined(HW_EMULATE)

namespace {

std::mutex emulated_mutex;
CudaDevice emulated = kEmulatedDevice;

}  // namespace

CudaDevice cuda_device(int) {
  const std::lock_guard<std::mutex> lock(emulated_mutex);
  return emulated;
}

void emulate_cuda_device(const CudaDevice& device) {
  const std::lock_guard<std::mutex> lock(emulated_mutex);
  emulated = device;
}

#else

CudaDevice cuda_device(int) { return {}; }

#endif

}  // namespace hw
