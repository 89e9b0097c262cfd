// SPDX-License-Identifier: Apache-2.0
// Tiles and fragments of the tensor-core kernels of linear attention (taylor2, D <= 16).
//
// Features in slots. Rows are padded with zeros to 16 columns x_0 .. x_15, and the 153 monomials
// take 160 slots, 10 blocks of 16, so that a block is one k16 step of an mma and comes from two
// fragments of x by one packed product, without any selection:
//
//   block r = 0 .. 7   slot c   x_c x_{(c + r) mod 16}          r = 0: the squares
//   block 8            slot c   c < 8: x_c x_{c + 8}     8, 9: 1     10 .. 15: 0
//   block 9            slot c   x_c
//
// Every pair a < b appears once: b - a or 16 - (b - a) is r = 1 .. 7, or both are 8. Slots 8 and 9
// of block 8 hold the same sum over keys; reading takes the rounded sum from the first and what
// rounding lost from the second, because this sum grows like the number of keys.
//
// The rotated fragments are matrix loads: tiles are kept transposed ([column, token], columns
// 0 .. 6 repeated behind 15), so that a rotation is a different first row:
//   as A of  Phi(x) S      (token g, slots 2t, 2t+1, ...)   ldmatrix transposed
//   as B of  V^T Phi(x)    (tokens 2t, 2t+1, ...; slot g)   ldmatrix plain; in the order
//                          a[0 .. 3] of an A whose rows are slots: b of slots 0 .. 7 is a[0], a[2],
//                          b of slots 8 .. 15 is a[1], a[3]
#pragma once

#include <type_traits>

#include "ops/linear_attention/linear_attention_plan.h"

#include "core/gpu/async_copy.cuh"
#include "core/gpu/device.cuh"
#include "core/gpu/mma.cuh"
#include "core/gpu/packed.cuh"
#include "core/gpu/tile.cuh"

namespace hw::linear_attention::sm80 {

using dev::Two;

inline constexpr int kTile = static_cast<int>(kChunk);  // tokens of a chunk
inline constexpr int kRows = 16;                        // rows of an mma tile
inline constexpr int kStrips = kTile / kRows;           // mma tiles along the tokens of a chunk
inline constexpr int kPadded = 16;                      // columns of q and k, padded
inline constexpr int kBlocks = 10;                      // blocks of 16 slots
inline constexpr int kSlots = kBlocks * 16;
inline constexpr int kProducts = 8, kLinear = 9;  // the two special blocks
inline constexpr int kSharers = 4;                // warps that share the slots of
inline constexpr int kShared = 64;                // columns of v

// Two neighbours along the k dimension of an mma operand, and the arithmetic on them.
//   bf16   packed bf16, mma m16n8k16: the range of bf16 holds every product
//   f16    two tf32, two mma m16n8k8: products and weights exceed 65504, tf32 has f16's precision.
//          The order of k is free as long as A and B agree: step 0 takes columns 2t, 2t+1 of the
//          m16n8k16 fragment as its columns t, t+4, step 1 takes 2t+8, 2t+9.
template <class Element>
struct Pairs;

template <>
struct Pairs<bf16> {
  using Pair = uint32_t;
  HW_DEVICE static HW_INLINE Pair zero() { return 0; }
  HW_DEVICE static HW_INLINE Pair exact(uint32_t word) { return word; }
  HW_DEVICE static HW_INLINE Pair round(float lo, float hi) { return dev::pack_bf16(lo, hi); }
  HW_DEVICE static HW_INLINE Two widen(Pair p) { return dev::unpack<bf16>(p); }
  HW_DEVICE static HW_INLINE Pair multiply(Pair a, Pair b) { return dev::multiply_bf16(a, b); }
  HW_DEVICE static HW_INLINE void mma(float d[4], const Pair a[4], const Pair b[2]) {
    dev::mma_bf16(d, a, b);
  }
};

template <>
struct Pairs<f16> {
  struct alignas(8) Pair {
    uint32_t lo, hi;
  };
  HW_DEVICE static HW_INLINE Pair zero() { return {0, 0}; }
  HW_DEVICE static HW_INLINE Pair exact(uint32_t word) {
    const Two two = dev::unpack<f16>(word);
    return {std::bit_cast<uint32_t>(two.lo), std::bit_cast<uint32_t>(two.hi)};
  }
  HW_DEVICE static HW_INLINE Pair round(float lo, float hi) {
    return {dev::to_tf32(lo), dev::to_tf32(hi)};
  }
  HW_DEVICE static HW_INLINE Two widen(Pair p) {
    return {std::bit_cast<float>(p.lo), std::bit_cast<float>(p.hi)};
  }
  HW_DEVICE static HW_INLINE Pair multiply(Pair a, Pair b) {
    const Two x = widen(a), y = widen(b);
    return round(x.lo * y.lo, x.hi * y.hi);
  }
  HW_DEVICE static HW_INLINE void mma(float d[4], const Pair a[4], const Pair b[2]) {
    const uint32_t a0[4] = {a[0].lo, a[1].lo, a[0].hi, a[1].hi}, b0[2] = {b[0].lo, b[0].hi};
    const uint32_t a1[4] = {a[2].lo, a[3].lo, a[2].hi, a[3].hi}, b1[2] = {b[1].lo, b[1].hi};
    dev::mma_tf32(d, a0, b0);
    dev::mma_tf32(d, a1, b1);
  }
};

template <class Element>
using Pair = typename Pairs<Element>::Pair;

// ---- Tiles in shared memory ---------------------------------------------------------------------

// Pitches keep rows 16-byte aligned and the 8 rows of a matrix load in different banks.
template <class Element>
struct Narrow {  // rows of q or k as they come
  static constexpr int kPitch = 24;
  alignas(16) Element at[kTile][kPitch];
};

template <class Element>
struct Turned {  // the same transposed; row kPadded + i repeats row i
  static constexpr int kPitch = kTile + 8, kColumns = kPadded + 7;
  alignas(16) Element at[kColumns][kPitch];
};

template <class Element, int kDim>
struct Wide {  // rows of v, do, ...
  static constexpr int kPitch = kDim + 8;
  alignas(16) Element at[kTile][kPitch];
};

// Starts loading a tile of kTile x kWidth elements; zeros beyond `rows`. Whole block of kThreads.
template <int kWidth, int kThreads, class Element>
HW_DEVICE HW_INLINE void load_rows(Element* tile, int pitch, const Rows<Element>& rows) {
  load_units<kTile, kWidth / 8, kThreads>(
      rows, [&](int row, int unit) { return tile + row * pitch + unit * 8; });
}

// Transposes 16 tokens (one warp).
template <class Element>
HW_DEVICE HW_INLINE void turn_strip(Turned<Element>& turned, const Narrow<Element>& rows,
                                    int strip) {
  const int lane = dev::lane(), g = lane / 4, t = lane % 4, token = strip * kRows;
  uint32_t regs[4];  // (token 2t, 2t+1; column g) of [tokens 0-7 | 8-15][columns 0-7 | 8-15]
  const int part = lane / 8;
  dev::load_matrix_x4_transposed(regs, &rows.at[token + lane % 8 + (part & 2) * 4][(part & 1) * 8]);
  HW_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int column = g + (i & 1) * 8, at = token + (i & 2) * 4 + 2 * t;
    *reinterpret_cast<Word*>(&turned.at[column][at]) = regs[i];
    if (column < Turned<Element>::kColumns - kPadded)
      *reinterpret_cast<Word*>(&turned.at[kPadded + column][at]) = regs[i];
  }
}

// ---- Fragments ----------------------------------------------------------------------------------

// x rotated by `turn` columns, tokens of a strip as rows of A: (token g, columns 2t, 2t+1 | + 8).
template <class Element>
HW_DEVICE HW_INLINE void tokens_by_columns(uint32_t regs[4], const Turned<Element>& x, int strip,
                                           int turn) {
  const int lane = dev::lane(), part = lane / 8;
  dev::load_matrix_x4_transposed(
      regs, &x.at[lane % 8 + (part & 2) * 4 + turn][strip * kRows + (part & 1) * 8]);
}

// The same with columns as rows of A: (column g, tokens 2t, 2t+1 | + 8).
template <class Element>
HW_DEVICE HW_INLINE void columns_by_tokens(uint32_t regs[4], const Turned<Element>& x, int strip,
                                           int turn) {
  const int lane = dev::lane(), part = lane / 8;
  dev::load_matrix_x4(regs,
                      &x.at[lane % 8 + (part & 1) * 8 + turn][strip * kRows + (part & 2) * 4]);
}

// Tokens of a strip as the sum of B: regs[2 h], regs[2 h + 1] = (tokens 2t, 2t+1 | + 8; column
// 8 h + g).
template <class Element>
HW_DEVICE HW_INLINE void tokens_of_columns(uint32_t regs[4], const Turned<Element>& x, int strip) {
  const int lane = dev::lane(), part = lane / 8;
  dev::load_matrix_x4(regs, &x.at[lane % 8 + (part & 2) * 4][strip * kRows + (part & 1) * 8]);
}

// B of the scores: regs[2 h], regs[2 h + 1] = (columns 2t, 2t+1 | + 8; token 8 h + g).
template <class Element>
HW_DEVICE HW_INLINE void keys_of_scores(uint32_t regs[4], const Turned<Element>& x, int strip) {
  const int lane = dev::lane(), part = lane / 8;
  dev::load_matrix_x4_transposed(regs,
                                 &x.at[lane % 8 + (part & 1) * 8][strip * kRows + (part & 2) * 4]);
}

// 16 columns of a wide tile as A: (column g, tokens 2t, 2t+1 | + 8).
template <class Element, int kDim>
HW_DEVICE HW_INLINE void values_by_tokens(uint32_t regs[4], const Wide<Element, kDim>& x, int strip,
                                          int column) {
  const int lane = dev::lane(), part = lane / 8;
  dev::load_matrix_x4_transposed(
      regs, &x.at[strip * kRows + lane % 8 + (part & 2) * 4][column + (part & 1) * 8]);
}

// The same as B: regs[2 h], regs[2 h + 1] = (tokens 2t, 2t+1 | + 8; column 8 h + g).
template <class Element, int kDim>
HW_DEVICE HW_INLINE void tokens_of_values(uint32_t regs[4], const Wide<Element, kDim>& x, int strip,
                                          int column) {
  const int lane = dev::lane(), part = lane / 8;
  dev::load_matrix_x4_transposed(
      regs, &x.at[strip * kRows + lane % 8 + (part & 1) * 8][column + (part & 2) * 4]);
}

// 16 columns of a wide tile as A with tokens as rows: (token g, columns 2t, 2t+1 | + 8).
template <class Element, int kDim>
HW_DEVICE HW_INLINE void tokens_by_values(uint32_t regs[4], const Wide<Element, kDim>& x, int strip,
                                          int column) {
  const int lane = dev::lane(), part = lane / 8;
  dev::load_matrix_x4(regs,
                      &x.at[strip * kRows + lane % 8 + (part & 1) * 8][column + (part & 2) * 4]);
}

// The same as B: regs[2 h], regs[2 h + 1] = (columns 2t, 2t+1 | + 8; token 8 h + g).
template <class Element, int kDim>
HW_DEVICE HW_INLINE void keys_by_values(uint32_t regs[4], const Wide<Element, kDim>& x, int strip,
                                        int column) {
  const int lane = dev::lane(), part = lane / 8;
  dev::load_matrix_x4(regs,
                      &x.at[strip * kRows + lane % 8 + (part & 2) * 4][column + (part & 1) * 8]);
}

// Block kBlock of Phi with tokens as rows, from x itself (own) and, for blocks 1 .. 7, x rotated by
// kBlock. a[2], a[3] are the slots 8 .. 15.
template <class Element, int kBlock>
HW_DEVICE HW_INLINE void features_of_tokens(Pair<Element> phi[4], const Pair<Element> own[4],
                                            const Turned<Element>& x, int strip) {
  using P = Pairs<Element>;
  if constexpr (kBlock == kLinear) {
    for (int i = 0; i < 4; ++i) phi[i] = own[i];
  } else if constexpr (kBlock == kProducts) {
    const float one = dev::lane() % 4 == 0 ? 1.0f : 0.0f;
    phi[0] = P::multiply(own[0], own[2]);
    phi[1] = P::multiply(own[1], own[3]);
    phi[2] = phi[3] = P::round(one, one);
  } else if constexpr (kBlock == 0) {
    for (int i = 0; i < 4; ++i) phi[i] = P::multiply(own[i], own[i]);
  } else {
    uint32_t turned[4];
    tokens_by_columns(turned, x, strip, kBlock);
    for (int i = 0; i < 4; ++i) phi[i] = P::multiply(own[i], P::exact(turned[i]));
  }
}

// One of the two special blocks with slots as rows: a[1], a[3] are the slots 8 .. 15. `counted`: x,
// times a factor of the token if it has one, as `ones` are.
template <class Element>
HW_DEVICE HW_INLINE void special_by_tokens(Pair<Element> phi[4], const Pair<Element> own[4],
                                           const Pair<Element> counted[4],
                                           const Pair<Element> ones[4], int block) {
  const bool products = block == kProducts;
  HW_UNROLL
  for (int i = 0; i < 4; i += 2) {
    phi[i] = products ? Pairs<Element>::multiply(counted[i], own[i + 1]) : counted[i];
    phi[i + 1] = products ? ones[i + 1] : counted[i + 1];
  }
}

// Calls f(std::integral_constant<int, 0>), ... for each block.
template <int kFirst = 0, class F>
HW_DEVICE HW_INLINE void for_each_block(F&& f) {
  if constexpr (kFirst < kBlocks) {
    f(std::integral_constant<int, kFirst>{});
    for_each_block<kFirst + 1>(f);
  }
}

}  // namespace hw::linear_attention::sm80
