// SPDX-License-Identifier: Apache-2.0
// The two native libraries behind one set of backend names.
#pragma once

#include <string_view>

#include "core/host/api.h"

namespace hw {

// The emulator library is not beside _C; what() says how to build it.
struct EmulatorMissing : Error {
  using Error::Error;
};

const HwApi& native_api();

// Opened at the first use. Throws EmulatorMissing, or Error if it is there and cannot be loaded.
const HwApi& emulator_api();

struct Target {
  const HwApi* api;
  int backend;  // a hw::Backend or kHwAutomatic
  bool emulated;
};

// "auto", "cpu", "simt", "sm80", "sm90"; "emulate", "emulate:simt", "emulate:sm80".
Target target(std::string_view backend);

}  // namespace hw
