// SPDX-License-Identifier: Apache-2.0
// What crosses the boundary into native code: one call = a function, a list of tensors, a list of
// scalars and a context. Plain C data, so that any front end can make one.
//
//   tensors   in the order that the operator's header names; an absent optional has ndim = -1
//   scalars   in the order that the operator's header names; integers and flags are exact doubles
//   context   where and how to run
//
// A call may be described without data (null pointers): why_not() and workspace() look only at
// shapes, dtypes and devices. Running one with a null pointer and elements is an error.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string>

#include "core/dtype.h"
#include "core/error.h"
#include "core/ref.h"

namespace hw {

inline constexpr int kMaxDims = 6;
inline constexpr double kMaxInteger = 9007199254740992.0;  // 2^53: doubles up to here are exact

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

  // The tensor as an N-dimensional reference; absent tensors give an absent Ref.
  template <int N>
  Ref<void, N> ref() const {
    Ref<void, N> r;
    if (!present()) return r;
    check(ndim == N, ErrorKind::value, "expected ", N, " dimensions, got ", ndim);
    r.data = data;
    for (int d = 0; d < N; ++d) {
      r.size[d] = size[d];
      r.stride[d] = stride[d];
    }
    return r;
  }
};

struct Context {
  void* stream = nullptr;       // cudaStream_t; null on the CPU
  int32_t device_index = 0;     // CUDA device of the call
  int32_t num_threads = 1;      // CPU threads the call may use
  int32_t multiprocessors = 0;  // of the CUDA device, real or emulated
};

struct Call {
  std::span<const Tensor> tensors;
  std::span<const double> scalars;
  Context context;

  const Tensor& tensor(int i) const {
    check(static_cast<size_t>(i) < tensors.size(), ErrorKind::value, "a call has no tensor ", i);
    return tensors[static_cast<size_t>(i)];
  }
  double scalar(int i) const {
    check(static_cast<size_t>(i) < scalars.size(), ErrorKind::value, "a call has no scalar ", i);
    return scalars[static_cast<size_t>(i)];
  }
  bool flag(int i) const {
    const double x = scalar(i);
    check(x == 0.0 || x == 1.0, ErrorKind::value, "scalar ", i, " of a call is ", x,
          ", expected 0 or 1");
    return x != 0.0;
  }
  int64_t integer(int i) const {
    const double x = scalar(i);
    check(x >= -kMaxInteger && x <= kMaxInteger && x == std::trunc(x), ErrorKind::value, "scalar ",
          i, " of a call is ", x, ", expected an integer of at most 53 bits");
    return static_cast<int64_t>(x);
  }
  // An integer whose size does not matter beyond 53 bits: a bound of lengths or of distances.
  int64_t bound(int i) const {
    const double x = scalar(i);
    const bool large = x < -kMaxInteger || x > kMaxInteger;
    return large ? static_cast<int64_t>(std::copysign(kMaxInteger, x)) : integer(i);
  }
};

}  // namespace hw
