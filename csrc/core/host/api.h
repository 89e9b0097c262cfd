// SPDX-License-Identifier: Apache-2.0
// The C boundary of the native libraries: one exported function, which returns a table.
//
// libheadworks and libheadworks_emulator export the same table; the second runs the CUDA kernels on
// the host. A front end needs this header alone. Tensors and contexts are plain data
// (core/host/call.h).
//
// Every function that can fail returns an ErrorKind (0: success) and, on failure, writes a
// zero-terminated message of at most `size` bytes. No exception crosses this boundary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/host/call.h"
#include "core/host/call_list.h"

#define HW_API_VERSION 3

// A call without its function: see hw::Call.
struct HwArguments {
  const hw::Tensor* tensors;
  const hw::Scalar* scalars;
  int32_t num_tensors;
  int32_t num_scalars;
  hw::Context context;
  // Of a call that runs: memory for its workspace, which the caller keeps until the work is done.
  void* (*allocate)(void* self, int64_t bytes);
  void* self;
};

// A function: the arguments of its calls in their order, tensors and scalars among each other.
struct HwFunction {
  char name[64];  // "linear_attention.forward"
  const hw::Argument* arguments;
  int32_t num_arguments;
};

struct HwMessage {
  char* text;
  size_t size;
};

// Instead of a hw::Backend: the first backend that can take the call.
inline constexpr int kHwAutomatic = -1;

struct HwApi {
  int version;
  // Functions are numbered from 0; false beyond the last.
  bool (*function)(int number, HwFunction*);
  // Runs the call.
  int (*call)(int function, int backend, const HwArguments*, HwMessage);
  // The backend that `call` would use; the arguments may be without data.
  int (*choose)(int function, int backend, const HwArguments*, int* chosen, HwMessage);
  // Writes the reason why a backend cannot take the call, an empty text if it can.
  int (*why_not)(int function, int backend, const HwArguments*, HwMessage);
  // Writes which of a backend's instances `call` would run: "bfloat16, dim 64".
  int (*instance)(int function, int backend, const HwArguments*, HwMessage);
  // Bytes of device workspace that the call needs on this backend.
  int (*workspace)(int function, int backend, const HwArguments*, int64_t* bytes, HwMessage);
  // What this library is and contains, as JSON; returns the length without the final zero and
  // writes nothing if the buffer is smaller than that.
  size_t (*info)(char* text, size_t size);
  // Sets "cpu_isa" (libheadworks), or "seed", "order" and "copies" (the emulator).
  int (*configure)(const char* key, const char* value, HwMessage);
};

// Null if the library does not speak this version.
extern "C" __attribute__((visibility("default"))) const HwApi* hw_api(int version);

static_assert(std::is_standard_layout_v<hw::Tensor> && std::is_standard_layout_v<hw::Context> &&
              std::is_standard_layout_v<hw::Argument>);
