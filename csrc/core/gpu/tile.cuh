// SPDX-License-Identifier: Apache-2.0
// Tiles of 16-bit elements in shared memory, their way there, and their products.
//
//   Rows                rows of a matrix in global memory; ListedRows: in the order of a list
//   Tile                [kRows, kColumns] in shared memory, swizzled
//   load_tile           Rows -> Tile, 16 bytes at a time by cp.async where rows are aligned
//   walk_stages         tiles that are read while the next ones load
//   Fragment            an fp32 matrix spread over a warp, as mma leaves it (core/gpu/mma.cuh)
//   multiply_rows       D += A B^T, both tiles
//   multiply_columns    D += P B, P a fragment rounded to elements (pack), B a tile
//
// Swizzle: a row's units of 16 bytes are permuted by its number, so that the 8 rows of a matrix
// load lie in different banks whatever the width (a multiple of 32 columns), and a tile has no
// padding.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "core/gpu/async_copy.cuh"
#include "core/gpu/device.cuh"
#include "core/gpu/mma.cuh"
#include "core/gpu/store.cuh"
#include "core/gpu/vector.h"
#include "core/math.h"
#include "core/ref.h"

namespace hw {

struct Nothing {};
// A member that only some instances of a template have.
template <bool kPresent, class T>
using If = std::conditional_t<kPresent, T, Nothing>;

// ---- Global memory ------------------------------------------------------------------------------

// Rows of a matrix in global memory: element (i, c) is at origin[i row + c column].
template <class Element>
struct Rows {
  const Element* origin = nullptr;
  int64_t row = 0, column = 1;
  int count = 0, columns = 0;  // beyond them: zeros
  bool aligned = false;        // 16-byte copies are possible
  bool whole = false;          // and nothing else is needed: see whole_units
};

inline constexpr int64_t kMaxStep = (1 << 24) - 1;  // of 128 rows one after the other, in 32 bits

// Whether rows that are aligned have whole units of 8 columns, and 32 bits hold their distance.
template <class T>
bool whole_units(const Ref<T, 4>& x) {
  const int64_t step = x.stride[1];
  return x.size[3] % 8 == 0 && step % 8 == 0 && step >= -kMaxStep && step <= kMaxStep;
}

// Rows token[0], token[1], .. of such a matrix, the list in shared memory; negative: zeros.
template <class Element>
struct ListedRows {
  const Element* origin = nullptr;
  int64_t row = 0, column = 1;
  const int* token = nullptr;
  int columns = 0;
  bool aligned = false, whole = false;
};

template <class Element>
struct Input {
  Ref<const Element, 4> ref;  // [B, S, heads, columns]
  bool aligned = false;       // rows in 16-byte units
  bool whole = false;         // of nothing but whole units (whole_units)
};

template <class Element>
Input<Element> input_of(const Ref<const void, 4>& x) {
  const Ref<const Element, 4> ref = x.template as<const Element>();
  const bool aligned = rows_aligned(ref, 16);
  return {ref, aligned, aligned && whole_units(ref)};
}

// Starts loading the first `valid` elements of a unit of 8, zeros in place of the others. `rows`:
// what `from` belongs to. A unit in part goes element by element: compute-sanitizer counts a copy
// of fewer than 16 bytes as one of 16, which may be more than the tensor has.
template <class Rows, class Element>
HW_DEVICE HW_INLINE void load_unit(const Rows& rows, Element* to, const Element* from, int valid) {
  if (rows.aligned && (valid <= 0 || valid == 8)) {
    dev::copy_async_16(to, valid > 0 ? from : rows.origin, valid > 0 ? 16 : 0);
  } else {
    for (int e = 0; e < 8; ++e) to[e] = e < valid ? from[e * rows.column] : Element(0.0f);
  }
}

// Whether kThreads threads load tiles of kRows rows of kUnits units evenly, each its own unit of
// rows.
template <int kRows, int kUnits, int kThreads>
inline constexpr bool kSharedEvenly = kThreads % kUnits == 0 && kRows * kUnits % kThreads == 0;

// The thread's part of them, from its first unit on: of rows of which nothing but whole units
// exists, `row` elements apart. `count` rows and `columns` columns exist; in place of the others
// come zeros. `to(row, unit)`: the unit's place in shared memory, whose pattern is the same every 8
// rows.
template <int kRows, int kUnits, int kThreads, class Element, class To>
HW_DEVICE HW_INLINE void load_whole_units(const Element* from, int row, int columns, int count,
                                          const To& to) {
  constexpr int kStep = kThreads / kUnits;
  const int first = dev::thread_index() / kUnits, unit = dev::thread_index() % kUnits;
  const int end = unit * 8 < columns ? count - first : 0;
  Element* origin = to(first, unit);
  HW_UNROLL
  for (int i = 0; i < kRows / kStep; ++i) {
    const int at = i * kStep, every_8_rows = static_cast<int>(to(8, 0) - to(0, 0));
    Element* place = at % 8 == 0 ? origin + at / 8 * every_8_rows : to(first + at, unit);
    dev::copy_async_16(place, from + at * row, at < end ? 16 : 0);
  }
}

// Starts loading kRows x kUnits units of 8 elements, zeros beyond the rows. `to(row, unit)`: the
// unit's place in shared memory. Whole block of kThreads.
template <int kRows, int kUnits, int kThreads, class Element, class To>
HW_DEVICE HW_INLINE void load_units(const Rows<Element>& rows, To&& to) {
  const auto load = [&](int row, int unit, const Element* from) {
    const int valid = row < rows.count ? max_of(min_of(rows.columns - unit * 8, 8), 0) : 0;
    load_unit(rows, to(row, unit), from, valid);
  };
  const int thread = dev::thread_index();
  if constexpr (kSharedEvenly<kRows, kUnits, kThreads>) {
    constexpr int kStep = kThreads / kUnits;
    const int first = thread / kUnits, unit = thread % kUnits;
    const Element* from = rows.origin + (first * rows.row + unit * 8 * rows.column);
    if (rows.whole)
      return load_whole_units<kRows, kUnits, kThreads>(from, static_cast<int>(rows.row),
                                                       rows.columns, rows.count, to);
    HW_UNROLL_BY(1)
    for (int row = first; row < kRows; row += kStep, from += kStep * rows.row)
      load(row, unit, from);
  } else {
    for (int i = thread; i < kRows * kUnits; i += kThreads) {
      const int row = i / kUnits, unit = i % kUnits;
      load(row, unit, rows.origin + (row * rows.row + unit * 8 * rows.column));
    }
  }
}

template <int kRows, int kUnits, int kThreads, class Element, class To>
HW_DEVICE HW_INLINE void load_units(const ListedRows<Element>& rows, To&& to) {
  if constexpr (kSharedEvenly<kRows, kUnits, kThreads>) {
    if (rows.whole) {
      const int first = dev::thread_index() / kUnits, unit = dev::thread_index() % kUnits;
      const int step = static_cast<int>(rows.row);
      HW_UNROLL_BY(2)  // more of them at once take more registers than some kernels have
      for (int row = first; row < first + kRows; row += kThreads / kUnits) {
        const int64_t token = rows.token[row];
        const bool valid = token >= 0 && unit * 8 < rows.columns;
        dev::copy_async_16(to(row, unit), rows.origin + (token * step + unit * 8), valid ? 16 : 0);
      }
      return;
    }
  }
  HW_UNROLL_BY(1)
  for (int i = dev::thread_index(); i < kRows * kUnits; i += kThreads) {
    const int row = i / kUnits, unit = i % kUnits, token = rows.token[row];
    const int valid = token >= 0 ? max_of(min_of(rows.columns - unit * 8, 8), 0) : 0;
    load_unit(rows, to(row, unit), rows.origin + (token * rows.row + unit * 8 * rows.column),
              valid);
  }
}

// Starts loading kCount numbers from[i step], i < count, to to[i kPitch]; zeros beyond. Whole block
// of kThreads.
template <int kCount, int kThreads, int kPitch = 1>
HW_DEVICE HW_INLINE void load_numbers(float* to, const float* from, int64_t step, int64_t count) {
  HW_UNROLL
  for (int first = 0; first < kCount; first += kThreads) {
    const int i = first + dev::thread_index();
    if (kCount % kThreads != 0 && i >= kCount) continue;
    const bool valid = i < count;
    dev::copy_async_4(to + i * kPitch, from + (valid ? i * step : 0), valid ? 4 : 0);
  }
}

// The same of places at(i), none where negative.
template <int kCount, int kThreads, int kPitch = 1, class At>
HW_DEVICE HW_INLINE void load_numbers_at(float* to, const float* from, int64_t step, const At& at) {
  HW_UNROLL
  for (int first = 0; first < kCount; first += kThreads) {
    const int i = first + dev::thread_index();
    if (kCount % kThreads != 0 && i >= kCount) continue;
    const int64_t place = at(i);
    dev::copy_async_4(to + i * kPitch, from + (place < 0 ? 0 : place * step), place < 0 ? 0 : 4);
  }
}

// ---- Shared memory ------------------------------------------------------------------------------

template <class Element, int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kUnits = kColumns / 8;
  static_assert(sizeof(Element) == 2 && kColumns % 32 == 0, "rows of 64 bytes or a multiple");
  alignas(128) Element at[kRows * kColumns];

  // From unit 0 or 1 of a row to the unit that is `even` units further on.
  static constexpr dev::AddressOffset offset(int even) {
    return {(even & (kGroup - 1)) * 16, (even & -kGroup) * 16};
  }
  // The 8 elements (row, 8 unit ..).
  HW_DEVICE HW_INLINE Element* unit(int row, int u) { return at + place(row, u); }
  HW_DEVICE HW_INLINE const Element* unit(int row, int u) const { return at + place(row, u); }
  // The elements (row, column) and (row, column + 1), column even.
  HW_DEVICE HW_INLINE uint32_t pair(int row, int column) const {
    return *reinterpret_cast<const Word*>(unit(row, column / 8) + column % 8);
  }

 private:
  // Units change places within groups of kGroup, so that addresses differ by constants from group
  // to group, and within a group, which is aligned to its size, in fixed bits.
  static constexpr int kGroup = kUnits % 8 == 0 ? 8 : 4;
  HW_DEVICE HW_INLINE static int place(int row, int u) {
    const int turn = kGroup == 8 ? row & 7 : (row >> 1) & 3;
    return (row * kUnits + (u & -kGroup) + ((u & (kGroup - 1)) ^ turn)) * 8;
  }
};

// From Rows or ListedRows.
template <int kThreads, class Source, class Element, int kRows, int kColumns>
HW_DEVICE HW_INLINE void load_tile(Tile<Element, kRows, kColumns>& tile, const Source& rows) {
  load_units<kRows, kColumns / 8, kThreads>(rows, [&](int r, int u) { return tile.unit(r, u); });
}

// Tiles begin .. end - 1 through two stages: prefetch(tile) starts the copies of a tile to stage
// tile % 2, visit(tile) reads it meanwhile the next is on its way. What was started before lands
// with the first. One barrier per tile; none after the last. Whole block.
template <class Prefetch, class Visit>
HW_DEVICE HW_INLINE void walk_stages(int begin, int end, const Prefetch& prefetch,
                                     const Visit& visit) {
  prefetch(begin);
  dev::copy_async_commit();
  HW_UNROLL_BY(1)
  for (int tile = begin; tile < end; ++tile) {
    dev::copy_async_wait<0>();
    dev::sync_block();
    if (tile + 1 < end) prefetch(tile + 1);
    dev::copy_async_commit();
    visit(tile);
  }
}

// ---- Fragments ----------------------------------------------------------------------------------

// Rows [16 kStrips], columns [8 kTiles]: with g = lane / 4 and t = lane % 4, at[s][j][i] is element
// (16 s + g + 8 (i / 2), 8 j + 2 t + i % 2).
template <int kStrips_, int kTiles_>
struct Fragment {
  static constexpr int kStrips = kStrips_, kTiles = kTiles_;
  float at[kStrips][kTiles][4];

  HW_DEVICE static HW_INLINE int row(int s, int i) {
    return 16 * s + dev::lane() / 4 + 8 * (i / 2);
  }
  HW_DEVICE static HW_INLINE int column(int j, int i) {
    return 8 * j + 2 * (dev::lane() % 4) + i % 2;
  }
  HW_DEVICE HW_INLINE void clear() {
    each([&](int s, int j, int i) { at[s][j][i] = 0.0f; });
  }
  // x[j] = times the pair of tile j of the lane's row g + 8 half of a strip
  HW_DEVICE HW_INLINE void copy_row(float (&x)[kTiles][2], int s, int half, float times) const {
    HW_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      x[j][0] = at[s][j][2 * half] * times;
      x[j][1] = at[s][j][2 * half + 1] * times;
    }
  }
  // f(s, half) of every row that the lane has a share of: row(s, 2 * half)
  template <class F>
  HW_DEVICE static HW_INLINE void each_row(F&& f) {
    HW_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      HW_UNROLL
      for (int half = 0; half < 2; ++half) f(s, half);
    }
  }
  // The largest number of a row and of `from`, in each of its four lanes.
  HW_DEVICE HW_INLINE float row_max(int s, int half, float from) const {
    HW_UNROLL
    for (int j = 0; j < kTiles; ++j)
      from = dev::larger(from, dev::larger(at[s][j][2 * half], at[s][j][2 * half + 1]));
    return dev::warp_max<4>(from);
  }
  // The sum of a row, in each of its four lanes.
  HW_DEVICE HW_INLINE float row_sum(int s, int half) const {
    float sum = 0;
    HW_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      sum += at[s][j][2 * half];
      sum += at[s][j][2 * half + 1];
    }
    return dev::warp_sum<4>(sum);
  }
  HW_DEVICE HW_INLINE void scale_row(int s, int half, float factor) {
    HW_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      at[s][j][2 * half] *= factor;
      at[s][j][2 * half + 1] *= factor;
    }
  }
  // f(s, j, i) of every element
  template <class F>
  HW_DEVICE static HW_INLINE void each(F&& f) {
    HW_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      HW_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        HW_UNROLL
        for (int i = 0; i < 4; ++i) f(s, j, i);
      }
    }
  }
};

// A fragment rounded to elements: A of a product over its columns, in steps of 16.
template <int kStrips, int kSteps>
struct Packed {
  uint32_t at[kStrips][kSteps][4];
};

template <class Element, int kStrips, int kTiles>
HW_DEVICE HW_INLINE Packed<kStrips, kTiles / 2> pack(const Fragment<kStrips, kTiles>& d) {
  static_assert(kTiles % 2 == 0, "whole steps of 16 columns");
  Packed<kStrips, kTiles / 2> p;
  HW_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    HW_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      p.at[s][j / 2][j % 2 * 2] = dev::pack<Element>(d.at[s][j][0], d.at[s][j][1]);
      p.at[s][j / 2][j % 2 * 2 + 1] = dev::pack<Element>(d.at[s][j][2], d.at[s][j][3]);
    }
  }
  return p;
}

// Matrix loads of 16 x 16 elements of a tile. A lane's address of the first is computed once, those
// of all others differ from it by constants: `down` rows (a multiple of 8) and 16 `step` columns.
//   Left         A of rows x columns; transposed: B of rows x columns, regs[2 h], [2 h + 1] =
//                (rows 2t, 2t+1 | + 8; column 8 h + g)
//   Right        B of columns x rows: regs[2 h], [2 h + 1] = (columns 2t, 2t+1 | + 8; row 8 h + g)
template <class T>
struct MatrixLoads {
  const void* first;
  int distance = 0;  // bytes from there to the tile that is loaded: see moved()

  HW_DEVICE static HW_INLINE MatrixLoads left(const T& tile, int row) {
    const int lane = dev::lane();
    return {tile.unit(row + lane % 16, lane / 16)};
  }
  HW_DEVICE static HW_INLINE MatrixLoads right(const T& tile, int row) {
    const int lane = dev::lane();
    return {tile.unit(row + lane % 8 + lane / 16 * 8, lane / 8 % 2)};
  }
  HW_DEVICE HW_INLINE dev::AddressOffset offset(int down, int step) const {
    dev::AddressOffset to = T::offset(2 * step);
    to.shift += down * T::kUnits * 16 + distance;
    return to;
  }
  // The same place of another tile. Members of one struct then share a register for the address.
  HW_DEVICE HW_INLINE MatrixLoads moved(const T& from, const T& to) const {
    return {first, distance + static_cast<int>(reinterpret_cast<const char*>(&to) -
                                               reinterpret_cast<const char*>(&from))};
  }
  HW_DEVICE HW_INLINE void load(uint32_t regs[4], int down, int step) const {
    dev::load_matrix_x4(regs, first, offset(down, step));
  }
  HW_DEVICE HW_INLINE void load_transposed(uint32_t regs[4], int down, int step) const {
    dev::load_matrix_x4_transposed(regs, first, offset(down, step));
  }
};

// d += A B^T, of the loads of A (left) and of B (right).
template <class Element, int kStrips, int kTiles, int kA, int kB, int kColumns>
HW_DEVICE HW_INLINE void multiply_rows(Fragment<kStrips, kTiles>& d,
                                       const MatrixLoads<Tile<Element, kA, kColumns>>& of_a,
                                       const MatrixLoads<Tile<Element, kB, kColumns>>& of_b) {
  static_assert(kTiles % 2 == 0, "whole matrix loads");
  HW_UNROLL
  for (int step = 0; step < kColumns / 16; ++step) {
    uint32_t left[kStrips][4];
    HW_UNROLL
    for (int s = 0; s < kStrips; ++s) of_a.load(left[s], 16 * s, step);
    HW_UNROLL
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t right[4];
      of_b.load(right, 8 * j, step);
      HW_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        dev::mma_16x8x16<Element>(d.at[s][j], left[s], right);
        dev::mma_16x8x16<Element>(d.at[s][j + 1], left[s], right + 2);
      }
    }
  }
}

// The same: rows a_row .. of a, rows b_row .. of b, both multiples of 8.
template <class Element, int kStrips, int kTiles, int kA, int kB, int kColumns>
HW_DEVICE HW_INLINE void multiply_rows(Fragment<kStrips, kTiles>& d,
                                       const Tile<Element, kA, kColumns>& a, int a_row,
                                       const Tile<Element, kB, kColumns>& b, int b_row = 0) {
  multiply_rows<Element>(d, MatrixLoads<Tile<Element, kA, kColumns>>::left(a, a_row),
                         MatrixLoads<Tile<Element, kB, kColumns>>::right(b, b_row));
}

// d += P B: rows of b from 0 on, its columns from 8 `unit` (even) on.
template <class Element, int kStrips, int kTiles, int kSteps, int kRows, int kColumns>
HW_DEVICE HW_INLINE void multiply_columns(Fragment<kStrips, kTiles>& d,
                                          const Packed<kStrips, kSteps>& p,
                                          const Tile<Element, kRows, kColumns>& b, int unit = 0) {
  static_assert(kTiles % 2 == 0 && kSteps * 16 <= kRows, "whole matrix loads");
  const auto of_b = MatrixLoads<Tile<Element, kRows, kColumns>>::left(b, 0);
  HW_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    HW_UNROLL
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t right[4];
      of_b.load_transposed(right, 16 * step, (unit + j) / 2);
      HW_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        dev::mma_16x8x16<Element>(d.at[s][j], p.at[s][step], right);
        dev::mma_16x8x16<Element>(d.at[s][j + 1], p.at[s][step], right + 2);
      }
    }
  }
}

}  // namespace hw
