// SPDX-License-Identifier: Apache-2.0
// Rows of fragments to global memory.
//
//   Output         a tensor whose rows are stored, and what its layout allows
//   store_pair     two neighbouring columns
//   store_pairs    those of a lane in a row of a fragment: 16 bytes at a time where rows allow it
#pragma once

#include <bit>
#include <cstdint>

#include "core/gpu/device.cuh"
#include "core/gpu/mma.cuh"
#include "core/gpu/vector.h"
#include "core/ref.h"

namespace hw {

using Word __attribute__((may_alias)) = uint32_t;  // two elements

// Whether every row of a tensor [B, S, H, *] is contiguous and starts at a multiple of `bytes`.
template <class T>
bool rows_aligned(const Ref<T, 4>& x, int bytes) {
  const int64_t unit = bytes / static_cast<int>(sizeof(T));
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(bytes) == 0;
  for (int i = 0; i < 3; ++i) aligned &= x.size[i] <= 1 || x.stride[i] % unit == 0;
  return aligned && (x.size[3] <= 1 || x.stride[3] == 1);
}

template <class Element>
struct Output {
  Ref<Element, 4> ref;  // [B, S, heads, columns]
  bool paired = false;  // may be stored in words of two elements
  bool whole = false;   // rows are of nothing but aligned units of 8 elements
};

template <class Element>
Output<Element> output_of(const Ref<void, 4>& x) {
  const Ref<Element, 4> ref = x.template as<Element>();
  return {ref, rows_aligned(ref, 4), rows_aligned(ref, 16) && ref.size[3] % 8 == 0};
}

// Stores two columns of a row, one word where the row allows it; columns beyond its end are
// dropped.
template <class Element>
HW_DEVICE HW_INLINE void store_pair(const Ref<Element, 1>& row, int64_t column, bool paired,
                                    float lo, float hi) {
  const uint32_t word = dev::pack<Element>(lo, hi);
  if (paired && column + 1 < row.size[0]) {
    *reinterpret_cast<Word*>(aligned<4>(row.at(column))) = word;
    return;
  }
  if (column < row.size[0]) row(column) = std::bit_cast<Element>(static_cast<uint16_t>(word));
  if (column + 1 < row.size[0])
    row(column + 1) = std::bit_cast<Element>(static_cast<uint16_t>(word >> 16));
}

// Of 4 neighbouring lanes with 4 words each: word i of lane t becomes word t of lane i. Whole warp.
HW_DEVICE HW_INLINE void transpose_quad(uint32_t (&w)[4]) {
  HW_UNROLL
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = dev::lane() & step;
    HW_UNROLL
    for (int n = 0; n < 2; ++n) {
      uint32_t &low = w[n * (3 - step)], &high = w[n * (3 - step) + step];
      const uint32_t other = dev::shuffle_xor(upper ? low : high, step);
      (upper ? low : high) = other;
    }
  }
}

// Stores a row of whole units of 8 elements: word[j] has columns 8 j + 2 t + {0, 1} of lane t of 4.
// Four tiles at a time change places so that a lane has a unit. Whole warp.
template <class Element, int kTiles>
HW_DEVICE HW_INLINE void store_units(const Ref<Element, 1>& row, bool exists,
                                     const uint32_t (&word)[kTiles]) {
  HW_UNROLL
  for (int j = 0; j < kTiles; j += 4) {
    uint32_t unit[4] = {word[j], word[j + 1], word[j + 2], word[j + 3]};
    transpose_quad(unit);
    const int column = 8 * (j + dev::lane() % 4);
    if (exists && column < row.size[0])
      store_vector(reinterpret_cast<uint32_t*>(row.at(column)),
                   Vec<uint32_t, 4>{unit[0], unit[1], unit[2], unit[3]});
  }
}

// Stores x[j][i], columns first + 8 j + i of a row, first = 2 t: those of lane t of 4 in a row of a
// fragment, whose other columns its 4 neighbours have. Rows of whole units take one store of 16
// bytes per 4 pairs, rows of whole words one per pair; the others take turns in a loop that is not
// unrolled, which keeps the kernels that end with this short. Whole warp; nothing is stored where
// the row does not `exist`.
template <class Element, int kTiles>
HW_DEVICE HW_INLINE void store_pairs(const Ref<Element, 1>& row, bool exists, int first,
                                     const Output<Element>& form, const float (&x)[kTiles][2]) {
  Element* to = row.at(first);
  const int end = static_cast<int>(row.size[0]) - first;
  uint32_t word[kTiles];
  HW_UNROLL
  for (int j = 0; j < kTiles; ++j) word[j] = dev::pack<Element>(x[j][0], x[j][1]);
  if constexpr (kTiles % 4 == 0) {
    if (form.whole) return store_units(row, exists, word);
  }
  if (!exists) return;
  if (form.paired && row.size[0] % 2 == 0) {
    HW_UNROLL
    for (int j = 0; j < kTiles; ++j)
      if (8 * j < end) *reinterpret_cast<Word*>(aligned<4>(to + 8 * j)) = word[j];
    return;
  }
  const auto element = [](uint32_t bits) {
    return std::bit_cast<Element>(static_cast<uint16_t>(bits));
  };
  HW_UNROLL_BY(1)
  for (int column = 0; column < end && column < 8 * kTiles; column += 8) {
    to[column * row.stride[0]] = element(word[0]);
    if (column + 1 < end) to[(column + 1) * row.stride[0]] = element(word[0] >> 16);
    HW_UNROLL
    for (int j = 0; j + 1 < kTiles; ++j) word[j] = word[j + 1];
  }
}

// The same in fp32.
template <int kTiles>
HW_DEVICE HW_INLINE void store_pairs(const Ref<float, 1>& row, bool exists, int first,
                                     const Output<float>&, const float (&x)[kTiles][2]) {
  if (!exists) return;
  float* to = row.at(first);
  const int end = static_cast<int>(row.size[0]) - first;
  const int64_t step = row.stride[0];
  HW_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    if (8 * j < end) to[8 * j * step] = x[j][0];
    if (8 * j + 1 < end) to[(8 * j + 1) * step] = x[j][1];
  }
}

}  // namespace hw
