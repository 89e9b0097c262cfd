// SPDX-License-Identifier: Apache-2.0
// What the emulator's tests check beyond TEST and EXPECT.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "native_test.h"

#include "core/error.h"

namespace hw::test {

// got must be within `tolerance` of want, or both the same infinity, or both NaN.
inline void expect_near(double got, double want, double tolerance, const std::string& what) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  if (same || std::fabs(got - want) <= tolerance) return;
  throw Failure(concat(what, ": got ", got, ", expected ", want));
}

// `body` must throw Error(runtime) whose message contains every one of `parts`.
template <class Body>
void expect_error(const std::vector<std::string>& parts, const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT(error.kind() == ErrorKind::runtime, error.what());
    for (const std::string& part : parts) {
      EXPECT(std::string(error.what()).find(part) != std::string::npos, "for '", part,
             "' in the message: ", error.what());
    }
    return;
  }
  throw Failure("nothing was thrown, expected an error about '" + parts.front() + "'");
}

// A line about a part of a test that cannot run here, or about what was measured.
template <class... Part>
void note(const Part&... part) {
  std::printf("        %s\n", concat(part...).c_str());
}

}  // namespace hw::test
