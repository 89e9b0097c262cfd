// SPDX-License-Identifier: Apache-2.0
// Floating-point numbers as unsigned integers of the same order, for selection and sorting.
//
//   sort_key(x) < sort_key(y)   exactly if x < y; NaN is the smallest, below -inf; -0 equals 0
//
// Non-negative numbers get their sign bit set, negative ones all bits turned. Key 0 is that of NaN
// alone.
#pragma once

#include <bit>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace hw {

// An unsigned integer of the size of T, and the bits of infinity.
template <class T>
struct SortKeyOf;
template <>
struct SortKeyOf<double> {
  using type = uint64_t;
  static constexpr type infinity = 0x7ff0000000000000u;
};
template <>
struct SortKeyOf<float> {
  using type = uint32_t;
  static constexpr type infinity = 0x7f800000u;
};
template <>
struct SortKeyOf<bf16> {
  using type = uint16_t;
  static constexpr type infinity = 0x7f80u;
};
template <>
struct SortKeyOf<f16> {
  using type = uint16_t;
  static constexpr type infinity = 0x7c00u;
};
template <class T>
using SortKey = typename SortKeyOf<T>::type;

// Integer operations alone, without a branch: loops over it become vector instructions.
template <class T>
HW_HOST_DEVICE HW_INLINE SortKey<T> sort_key(T x) {
  using Key = SortKey<T>;
  constexpr Key kSign = static_cast<Key>(Key{1} << (8 * sizeof(Key) - 1));
  const Key bits = std::bit_cast<Key>(x), magnitude = static_cast<Key>(bits & ~kSign);
  const bool negative = bits != magnitude && magnitude != 0;
  const Key key = static_cast<Key>(negative ? ~bits : magnitude | kSign);
  return magnitude > SortKeyOf<T>::infinity ? Key{0} : key;
}

}  // namespace hw
