// SPDX-License-Identifier: Apache-2.0
// A CUDA runtime that launches nothing and prints what it is asked for (see ci/seam_launch.cu).
#include <cstdio>

#include <cuda_runtime_api.h>

namespace {

int current_device = 0;
const void* opted_in = nullptr;

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;

cudaError_t print_launch(const void* kernel, dim3 grid, dim3 block, size_t shared, void* stream) {
  if (opted_in != nullptr && opted_in != kernel) std::printf("opted in for another kernel\n");
  std::printf("launch (%u, %u, %u) x %u, %zu bytes, stream %p\n", grid.x, grid.y, grid.z, block.x,
              shared, stream);
  opted_in = nullptr;
  return cudaSuccess;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
char __cudaInitModule(void**) { return 1; }

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* entry) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(entry));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                               cudaStream_t stream) {
  return print_launch(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared,
                             cudaStream_t stream) {
  return print_launch(kernel, grid, block, shared, stream);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  opted_in = kernel;
  std::printf("set attribute %d to %d\n", static_cast<int>(attribute), value);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current_device = device;
  std::printf("device %d\n", device);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

}  // extern "C"
