// SPDX-License-Identifier: Apache-2.0
// Faults that end the process are planted in a child: `emu_tests --plant NAME`.
#pragma once

namespace hw::test {

// Runs the named faulty kernel; returns the process's exit code if it survives.
int plant(const char* name);

}  // namespace hw::test
