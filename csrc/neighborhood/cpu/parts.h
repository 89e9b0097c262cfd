// SPDX-License-Identifier: Apache-2.0
// How the rows of an image are cut into parts that threads work on. What a row of results is made
// of does not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "neighborhood/window.h"

#include "core/math.h"

namespace hw::neighborhood {
namespace {

// Rows [begin, end) of part i of `parts`.
struct Rows {
  int64_t begin, end;

  Rows(int64_t rows, int64_t parts, int64_t i)
      : begin(rows * i / parts), end(rows * (i + 1) / parts) {}

  // The rows of keys that the windows of these rows of queries hold.
  int64_t first_key(const Axis& y) const { return y.start(begin); }
  int64_t keys(const Axis& y) const { return y.start(end - 1) + y.kernel - first_key(y); }
};

// As many parts as keep the threads busy with `planes` images, but none so short that the rows
// beyond its border are most of what it reads.
inline int64_t parts_of(const Axis& y, int64_t planes, int threads) {
  const int64_t wanted = ceil_div<int64_t>(4 * threads, max_of<int64_t>(planes, 1));
  return std::clamp<int64_t>(y.size / y.kernel, 1, wanted);
}

}  // namespace
}  // namespace hw::neighborhood
