// SPDX-License-Identifier: Apache-2.0
// What crosses the boundary into native code: one call = a function, its tensors, its scalars and a
// context. Plain C data, so that any front end can make one.
//
//   tensors   in the order of the function's list (core/host/call_list.h); absent: ndim = -1
//   scalars   in the order of the same list: a double, or an int64 (flags are 0 or 1)
//   context   where and how to run
//
// A call may be described without data (null pointers): why_not() and workspace() look only at
// shapes, dtypes and devices. Running one with a null pointer and elements is an error.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/dtype.h"
#include "core/error.h"
#include "core/ref.h"

namespace hw {

inline constexpr int kMaxDims = 6;

enum class Device : int32_t { cpu = 0, cuda = 1, other = 2 };

// Order of preference is sm90, sm80, simt, cpu; `emulate` runs a CUDA backend's code on the host.
enum class Backend : int32_t { cpu = 0, simt = 1, sm80 = 2, sm90 = 3 };

constexpr const char* backend_name(Backend b) {
  switch (b) {
    case Backend::cpu: return "cpu";
    case Backend::simt: return "simt";
    case Backend::sm80: return "sm80";
    case Backend::sm90: return "sm90";
  }
  return "unknown";
}

struct Tensor {
  void* data = nullptr;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  DType dtype = DType::f32;
  int32_t ndim = -1;  // -1: absent
  Device device = Device::cpu;
  int32_t device_index = 0;

  bool present() const { return ndim >= 0; }
  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= size[d];
    return n;
  }

  int64_t bytes() const { return present() ? numel() * dtype_size(dtype) : 0; }
};

union Scalar {
  double number;
  int64_t integer;
};

struct Context {
  void* stream = nullptr;       // cudaStream_t; null on the CPU
  int32_t device_index = 0;     // CUDA device of the call
  int32_t num_threads = 1;      // CPU threads the call may use
  int32_t multiprocessors = 0;  // of the CUDA device, real or emulated
};

// Memory that a function works in: as much as its `workspace` asked for.
struct Workspace {
  void* data = nullptr;
  int64_t bytes = 0;
};

struct Call {
  std::span<const Tensor> tensors;
  std::span<const Scalar> scalars;
  Context context;
  // Made by the dispatcher:
  DType element = DType::f32;  // of the function's first tensor of elements
  Workspace workspace;
};

}  // namespace hw
