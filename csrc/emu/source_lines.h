// SPDX-License-Identifier: Apache-2.0
// Source lines of return addresses, for reports.
#pragma once

#include <string>
#include <vector>

namespace hw::emu {

// "core/gpu/tile.cuh:88 in softmax/sm80/loop.cuh:120": the line of the call that returns
// to each address, and the lines that it was inlined into. Asks addr2line; without it the library
// and the offset.
std::vector<std::string> source_lines(const std::vector<const void*>& return_addresses);

}  // namespace hw::emu
