// SPDX-License-Identifier: Apache-2.0
// One kernel for each form of matrix load and multiply: fragments in and out as they are.
#pragma once

#include "core/gpu/mma.cuh"

namespace hw::test {

// Loads kMatrices 8x8 matrices of 16-bit elements; out[lane, i] = regs[i].
template <int kMatrices, bool kTransposed>
struct LoadMatrix {
  static constexpr int kThreads = 32;
  struct Params {
    const uint16_t* in;  // [kMatrices, 8, 8]
    uint32_t* out;       // [32, kMatrices]
  };
  HW_DEVICE static void main(const Params& p) {
    uint16_t* s = dev::shared<uint16_t>();
    for (int i = dev::lane(); i < kMatrices * 64; i += 32) s[i] = p.in[i];
    dev::sync_warp();
    const uint16_t* row = s + dev::lane() % (8 * kMatrices) * 8;
    uint32_t regs[kMatrices];
    if constexpr (kMatrices == 4 && !kTransposed) dev::load_matrix_x4(regs, row);
    if constexpr (kMatrices == 4 && kTransposed) dev::load_matrix_x4_transposed(regs, row);
    if constexpr (kMatrices == 2 && !kTransposed) dev::load_matrix_x2(regs, row);
    if constexpr (kMatrices == 2 && kTransposed) dev::load_matrix_x2_transposed(regs, row);
    for (int i = 0; i < kMatrices; ++i) p.out[dev::lane() * kMatrices + i] = regs[i];
  }
};

enum class Format : int { bf16, f16, tf32 };

// d[lane, :] += a[lane, :] b[lane, :], registers as given.
template <Format kFormat>
struct Multiply {
  static constexpr int kThreads = 32;
  struct Params {
    const uint32_t* a;  // [32, 4]
    const uint32_t* b;  // [32, 2]
    float* d;           // [32, 4]
  };
  HW_DEVICE static void main(const Params& p) {
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = p.a[dev::lane() * 4 + i];
    for (int i = 0; i < 2; ++i) b[i] = p.b[dev::lane() * 2 + i];
    for (int i = 0; i < 4; ++i) d[i] = p.d[dev::lane() * 4 + i];
    if constexpr (kFormat == Format::bf16) dev::mma_bf16(d, a, b);
    if constexpr (kFormat == Format::f16) dev::mma_f16(d, a, b);
    if constexpr (kFormat == Format::tf32) dev::mma_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) p.d[dev::lane() * 4 + i] = d[i];
  }
};

// out[thread] = to_tf32(in[thread]).
struct RoundToTf32 {
  static constexpr int kThreads = 32;
  struct Params {
    const float* in;  // [32]
    uint32_t* out;    // [32]
  };
  HW_DEVICE static void main(const Params& p) {
    p.out[dev::lane()] = dev::to_tf32(p.in[dev::lane()]);
  }
};

}  // namespace hw::test
