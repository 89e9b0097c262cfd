// SPDX-License-Identifier: Apache-2.0
// The part of DLPack that _C needs, declared from its public specification (version 1.3): the C
// exchange API, a table of functions that a tensor type offers as the capsule
// "dlpack_exchange_api" in its attribute __dlpack_c_exchange_api__. Layouts are fixed within one
// major version.
#pragma once

#include <cstdint>

namespace hw::dlpack {

inline constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;  // the table of an older major version, or null
};

// Functions return 0, or -1 with a Python exception set. The first three make or import owning
// tensors and are not used here.
struct ExchangeApi {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrowed; may be null
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

}  // namespace hw::dlpack
