// SPDX-License-Identifier: Apache-2.0
// For the generated instances of a CUDA backend: the entry point `name` of a kernel struct, or null
// where the backend does not have that function.
//
//   HW_FUNCTION_OF(forward)             defines   forward_of<Kernel>() -> void (*)(const Call&)
#pragma once

#include "core/host/call.h"

#define HW_FUNCTION_OF(name)                     \
  template <class Kernel>                        \
  constexpr auto name##_of() {                   \
    using Entry = void (*)(const Call&);         \
    if constexpr (requires { &Kernel::name; }) { \
      return static_cast<Entry>(&Kernel::name);  \
    } else {                                     \
      return static_cast<Entry>(nullptr);        \
    }                                            \
  }
