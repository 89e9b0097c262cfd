// SPDX-License-Identifier: Apache-2.0
// For the generated instances of a CUDA backend: the entry point of the static function `name` of a
// backend's struct, or none where the backend does not have that function.
//
//   HW_FUNCTION_OF(forward)             defines   forward_of<Simt<...>>() -> EntryPoint
#pragma once

#include "core/host/registry.h"

#define HW_FUNCTION_OF(name)                    \
  template <class Kernels>                      \
  constexpr EntryPoint name##_of() {            \
    if constexpr (requires { &Kernels::name; }) \
      return entry<&Kernels::name>;             \
    else                                        \
      return {};                                \
  }
