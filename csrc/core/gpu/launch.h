// SPDX-License-Identifier: Apache-2.0
// Launching a kernel struct (see core/gpu/device.cuh) on a CUDA stream, or in the emulator.
//
//   launch<Kernel>(Grid{x, y, z}, shared_bytes, context, params)
//
// A grid without blocks launches nothing. A failure throws Error(runtime) that names the kernel,
// the grid and the shared memory. The call neither allocates nor waits (in the emulator it returns
// when the kernel has ended).
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/error.h"
#include "core/host/call.h"
#include "core/host/cuda_device.h"
#include "core/macros.h"

#if defined(HW_EMULATE)
#include "emu/emulator.h"
#elif defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace hw {

// Blocks of a launch.
struct Grid {
  int64_t x = 1, y = 1, z = 1;

  bool empty() const { return x == 0 || y == 0 || z == 0; }
};

inline constexpr int64_t kMaxGridX = 2147483647, kMaxGridYZ = 65535;
inline constexpr int kMaxSharedBytes = 227 * 1024;   // of any supported architecture
inline constexpr int kPlainSharedBytes = 48 * 1024;  // beyond this a kernel has to opt in

// The name of a type, for messages: "key_scan::ScanKernel<float, 64>" (some compilers add "hw::").
template <class Kernel>
std::string kernel_name() {
  const std::string_view text = __PRETTY_FUNCTION__;
  const size_t begin = text.find("Kernel = ") + 9;
  const size_t end = text.find(';', begin);
  return std::string(text.substr(begin, (end == text.npos ? text.rfind(']') : end) - begin));
}

inline std::string describe_launch(const std::string& kernel, Grid grid, int threads, int bytes) {
  return concat("kernel ", kernel, ", grid (", grid.x, ", ", grid.y, ", ", grid.z, "), ", threads,
                " threads, ", bytes, " bytes of shared memory");
}

// What every launch must satisfy; `what` is made only for the message.
template <class Kernel>
void check_launch(Grid grid, int shared_bytes) {
  static_assert(std::is_trivially_copyable_v<typename Kernel::Params>, "parameters are copied");
  static_assert(sizeof(typename Kernel::Params) <= 4096, "kernel parameters are limited to 4 KB");
  static_assert(Kernel::kThreads >= 1 && Kernel::kThreads <= 1024, "1 to 1024 threads a block");
  const bool fits = grid.x >= 0 && grid.y >= 0 && grid.z >= 0 && grid.x <= kMaxGridX &&
                    grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ;
  if (fits && shared_bytes >= 0 && shared_bytes <= kMaxSharedBytes) return;
  throw Error(ErrorKind::runtime,
              concat("cannot launch ",
                     describe_launch(kernel_name<Kernel>(), grid, Kernel::kThreads, shared_bytes),
                     ": the limits are (", kMaxGridX, ", ", kMaxGridYZ, ", ", kMaxGridYZ,
                     ") blocks and ", kMaxSharedBytes, " bytes"));
}

#if defined(HW_EMULATE)

template <class Kernel>
void launch(Grid grid, int shared_bytes, const Context& context,
            const typename Kernel::Params& params) {
  check_launch<Kernel>(grid, shared_bytes);
  if (grid.empty()) return;
  using Params = typename Kernel::Params;
  emu::Launch work;
  work.kernel = kernel_name<Kernel>();
  work.grid[0] = static_cast<int>(grid.x);
  work.grid[1] = static_cast<int>(grid.y);
  work.grid[2] = static_cast<int>(grid.z);
  work.threads = Kernel::kThreads;
  work.shared_bytes = shared_bytes;
  work.workers = context.num_threads;
  work.params = &params;
  work.params_bytes = sizeof(Params);
  work.main = [](const void* p) { Kernel::main(*static_cast<const Params*>(p)); };
  emu::run(work);
}

#elif defined(__CUDACC__)

// Makes `device` current for the life of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    require(cudaGetDevice(&before_));
    if (before_ == device) return;
    require(cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void require(cudaError_t status) {
    check(status == cudaSuccess, ErrorKind::runtime,
          "cannot select the CUDA device: ", cudaGetErrorString(status));
  }
  int before_ = 0;
  bool changed_ = false;
};

// Of internal linkage: units for other architectures instantiate the same kernels, and each must
// launch the code that was compiled with it.
namespace {

template <class Kernel>
constexpr int min_blocks() {
  if constexpr (requires { Kernel::kMinBlocks; })
    return Kernel::kMinBlocks;
  else
    return 1;
}

// The only __global__ function: the body of every kernel struct.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, min_blocks<Kernel>())
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::main(params);
}

// Lets launches of `entry` on the current device have that much shared memory. The driver is told
// once, unless more is asked for.
template <class Kernel, class Require>
void allow_shared(void (*entry)(typename Kernel::Params), int bytes, int device,
                  const Require& require) {
  static std::atomic<int> allowed[kMaxDevices] = {};
  if (bytes <= allowed[device].load(std::memory_order_acquire)) return;
  static std::mutex telling;
  const std::lock_guard<std::mutex> lock(telling);
  if (bytes <= allowed[device].load(std::memory_order_relaxed)) return;
  require(cudaFuncSetAttribute(reinterpret_cast<const void*>(entry),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  allowed[device].store(bytes, std::memory_order_release);
}

template <class Kernel>
void launch(Grid grid, int shared_bytes, const Context& context,
            const typename Kernel::Params& params) {
  check_launch<Kernel>(grid, shared_bytes);
  if (grid.empty()) return;
  const auto require = [&](cudaError_t status) {
    if (status == cudaSuccess) [[likely]]
      return;
    throw Error(ErrorKind::runtime,
                concat("cannot launch ",
                       describe_launch(kernel_name<Kernel>(), grid, Kernel::kThreads, shared_bytes),
                       " on device ", context.device_index, ": ", cudaGetErrorString(status)));
  };
  const DeviceGuard guard(context.device_index);
  const auto entry = kernel_entry<Kernel>;
  if (shared_bytes > kPlainSharedBytes)
    allow_shared<Kernel>(entry, shared_bytes, context.device_index, require);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
  entry<<<blocks, Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(context.stream)>>>(
      params);
  require(cudaGetLastError());
}

}  // namespace

#endif

}  // namespace hw
