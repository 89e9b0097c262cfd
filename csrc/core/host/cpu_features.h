// SPDX-License-Identifier: Apache-2.0
// Which instruction sets this machine can run, and which one the CPU backend uses.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/host/registry.h"

namespace hw {

const char* isa_name(Isa isa);
std::optional<Isa> isa_by_name(std::string_view name);

// True if processor and operating system both support it.
bool machine_has(Isa isa);

// The instruction sets that this build contains, weakest first.
const std::vector<Isa>& built_isas();

// The one in use: the strongest that is built and supported, unless chosen by name through
// set_cpu_isa() or the environment variable HEADWORKS_CPU_ISA (read once).
Isa cpu_isa();

// "" returns to the automatic choice. Throws Error if the name is unknown, not in this build or not
// supported by the machine; `source` says in the message where the name came from.
void set_cpu_isa(const std::string& name, const std::string& source);

}  // namespace hw
