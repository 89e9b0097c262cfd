// SPDX-License-Identifier: Apache-2.0
// C[M, N] = A[M, K] B[K, N] as a tensor-core kernel is written: tiles of 64 x 64 by steps of 64
// bytes of K, two stages in shared memory filled by asynchronous copies, ldmatrix, mma.
//
//   four warps, each 32 x 32 of the tile = 2 x 4 fragments of 16 x 8
//   A row-major; B row-major for the 16-bit formats (loaded transposed), B^T row-major for tf32,
//   whose fragments are loaded as pairs of 16-bit elements
//
// Any M and N; rows of A and B (and of B^T) are whole multiples of 16 bytes. kPlant leaves out or
// weakens one step, for the tests that such a fault is caught.
#pragma once

#include "fragments.cuh"

#include "core/math.h"

namespace hw::test {

enum class Plant : int {
  none,
  wait_one_short,      // the wait leaves the stage's own group under way
  no_barrier_arrived,  // none between the wait and the reads
  no_barrier_free,     // none between the reads and the next copies into the stage
  no_wait,
};

template <Format kFormat>
struct GemmTypes {
  using Element = std::conditional_t<kFormat == Format::bf16, bf16,
                                     std::conditional_t<kFormat == Format::f16, f16, float>>;
};

template <Format kFormat, Plant kPlant = Plant::none>
struct Gemm {
  using Element = typename GemmTypes<kFormat>::Element;
  static constexpr bool kWide = kFormat == Format::tf32;
  static constexpr int kThreads = 128, kTile = 64;
  static constexpr int kVector = 16 / sizeof(Element);  // elements of a 16-byte copy
  static constexpr int kStep = 64 / sizeof(Element);    // of K, for each stage
  static constexpr int kPad = kVector;                  // spreads rows over the banks
  static constexpr int kRowsB = kWide ? kTile : kStep, kColumnsB = kWide ? kStep : kTile;

  struct Stage {
    Element a[kTile][kStep + kPad];
    Element b[kRowsB][kColumnsB + kPad];
  };
  static constexpr int kSharedBytes = 2 * sizeof(Stage);

  struct Params {
    const Element* a;  // [M, K]
    const Element* b;  // [K, N], for tf32 [N, K]
    float* c;          // [M, N]
    int m, n, k;
  };

  static Grid grid(int m, int n) { return {ceil_div(n, kTile), ceil_div(m, kTile)}; }

  // Copies rows [row, row + kRows) x columns [column, column + kColumns) of a matrix into a tile;
  // what lies outside becomes zero.
  template <int kRows, int kColumns>
  HW_DEVICE static void copy_tile(Element (*to)[kColumns + kPad], const Element* from, int rows,
                                  int columns, int row, int column) {
    constexpr int kPerRow = kColumns / kVector;
    for (int i = dev::thread_index(); i < kRows * kPerRow; i += kThreads) {
      const int r = i / kPerRow, c = i % kPerRow * kVector;
      const bool inside = row + r < rows && column + c < columns;
      const Element* source = inside ? from + int64_t{row + r} * columns + column + c : from;
      dev::copy_async_16(&to[r][c], source, inside ? 16 : 0);
    }
  }

  HW_DEVICE static void prefetch(const Params& p, Stage& s, int step) {
    const int row = dev::block_index_y() * kTile, column = dev::block_index_x() * kTile;
    copy_tile<kTile, kStep>(s.a, p.a, p.m, p.k, row, step * kStep);
    if constexpr (kWide)
      copy_tile<kRowsB, kColumnsB>(s.b, p.b, p.n, p.k, column, step * kStep);
    else
      copy_tile<kRowsB, kColumnsB>(s.b, p.b, p.k, p.n, step * kStep, column);
  }

  // a[2][4]: the warp's two 16 x 32-byte fragments of A at byte column 32 * i of the stage.
  HW_DEVICE static void load_a(uint32_t (&a)[2][4], const Stage& s, int i) {
    const int row = dev::warp() / 2 * 32 + dev::lane() % 16;
    const int column = i * 2 * kVector + dev::lane() / 16 * kVector;
    for (int m = 0; m < 2; ++m) dev::load_matrix_x4(a[m], &s.a[row + 16 * m][column]);
  }

  // b[4][2]: the warp's four fragments of B.
  HW_DEVICE static void load_b(uint32_t (&b)[4][2], const Stage& s, int i) {
    const int column = dev::warp() % 2 * 32;
    if constexpr (kWide) {
      const int row = column + dev::lane() % 8, k = i * 2 * kVector + dev::lane() / 8 % 2 * kVector;
      for (int n = 0; n < 4; ++n) dev::load_matrix_x2(b[n], &s.b[row + 8 * n][k]);
    } else {
      const int k = i * 16 + dev::lane() % 16;
      for (int n = 0; n < 4; n += 2) {
        uint32_t pair[4];
        dev::load_matrix_x4_transposed(pair, &s.b[k][column + 8 * n + dev::lane() / 16 * 8]);
        b[n][0] = pair[0], b[n][1] = pair[1];
        b[n + 1][0] = pair[2], b[n + 1][1] = pair[3];
      }
    }
  }

  HW_DEVICE static void multiply_stage(float (&d)[2][4][4], const Stage& s) {
    HW_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t a[2][4], b[4][2];
      load_a(a, s, i);
      load_b(b, s, i);
      for (int m = 0; m < 2; ++m) {
        for (int n = 0; n < 4; ++n) {
          if constexpr (kWide)
            dev::mma_tf32(d[m][n], a[m], b[n]);
          else
            dev::mma_16x8x16<Element>(d[m][n], a[m], b[n]);
        }
      }
    }
  }

  HW_DEVICE static void store(const Params& p, const float (&d)[2][4][4]) {
    const int row = dev::block_index_y() * kTile + dev::warp() / 2 * 32 + dev::lane() / 4;
    const int column = dev::block_index_x() * kTile + dev::warp() % 2 * 32 + dev::lane() % 4 * 2;
    for (int m = 0; m < 2; ++m) {
      for (int n = 0; n < 4; ++n) {
        for (int i = 0; i < 4; ++i) {
          const int r = row + 16 * m + 8 * (i / 2), c = column + 8 * n + i % 2;
          if (r < p.m && c < p.n) p.c[int64_t{r} * p.n + c] = d[m][n][i];
        }
      }
    }
  }

  HW_DEVICE static void main(const Params& p) {
    Stage* stages = dev::shared<Stage>();
    float d[2][4][4] = {};
    const int steps = ceil_div(p.k, kStep);
    prefetch(p, stages[0], 0);
    dev::copy_async_commit();
    for (int i = 0; i < steps; ++i) {
      if (i + 1 < steps) prefetch(p, stages[(i + 1) % 2], i + 1);
      dev::copy_async_commit();  // possibly empty, so that one group is always the next stage's
      if constexpr (kPlant == Plant::wait_one_short)
        dev::copy_async_wait<2>();
      else if constexpr (kPlant != Plant::no_wait)
        dev::copy_async_wait<1>();
      if constexpr (kPlant != Plant::no_barrier_arrived) dev::sync_block();
      multiply_stage(d, stages[i % 2]);
      if constexpr (kPlant != Plant::no_barrier_free) dev::sync_block();
    }
    store(p, d);
  }
};

}  // namespace hw::test
