// SPDX-License-Identifier: Apache-2.0
// Rows of a matrix that are read in vectors: evenly apart, or anywhere.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace hw {
namespace {

template <class E>
struct Panel {
  const E* data;
  int64_t ld;

  HW_INLINE const E* row(int64_t i) const { return data + i * ld; }
  HW_INLINE Panel from(int64_t column) const { return {data + column, ld}; }
};

template <class E>
struct RowPointers {
  const E* const* rows;
  int64_t column = 0;

  HW_INLINE const E* row(int64_t i) const { return rows[i] + column; }
  HW_INLINE RowPointers from(int64_t more) const { return {rows, column + more}; }
};

}  // namespace
}  // namespace hw
