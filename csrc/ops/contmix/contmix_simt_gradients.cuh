// SPDX-License-Identifier: Apache-2.0
// ContMix on CUDA: the kernels of the backward pass that are its own. Weights p and their gradients
// lie in the workspace, rows of T numbers.
//
//   StoreKernel      p of the tokens of a block
//   ScoreKernel      dp -> ds in place; a warp has a row
//   AffinityKernel   da = W^T ds; a thread has a number
//   MapKernel        sums of ds a^T and of ds over a slice of the rows; a block has 32 x 32 of them
//   TableKernel      sums of ds by key - query, of an image and group; a thread has an entry
//   FinishKernel     sums of slices, of images
#pragma once

#include "ops/contmix/contmix_simt_weights.cuh"

namespace hw::contmix::simt {

template <class Element>
struct StoreKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;

  struct Params {
    WeightInputs<Element> in;
    Ref<A, 5> p;  // [B, Y, X, G, T]
  };

  HW_DEVICE static void main(const Params& p) {
    const WeightTile<Element> tile(p.in, dev::shared<A>());
    tile.make();
    for (int n = dev::thread_index(); n < tile.count * tile.taps; n += kThreads) {
      const int i = n / tile.taps;
      p.p(tile.b, tile.y(i), tile.x(i), tile.group, n % tile.taps) = tile.p[n];
    }
  }
};

template <class A>
struct ScoreKernel {
  static constexpr int kThreads = simt::kThreads;

  struct Params {
    const A* p;  // [rows, T]
    A* ds;       // [rows, T]  dp before
    int64_t rows, taps, small;
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t row =
        static_cast<int64_t>(dev::block_index_x()) * (kThreads / dev::kWarp) + dev::warp();
    if (row >= p.rows) return;
    half(p.p + row * p.taps, p.ds + row * p.taps, p.small);
    half(p.p + row * p.taps + p.small, p.ds + row * p.taps + p.small, p.taps - p.small);
  }

 private:
  HW_DEVICE HW_INLINE static void half(const A* p, A* ds, int64_t n) {
    A sum = 0;
    for (int64_t t = dev::lane(); t < n; t += dev::kWarp) sum += p[t] * ds[t];
    sum = dev::warp_sum(sum);
    for (int64_t t = dev::lane(); t < n; t += dev::kWarp) ds[t] = p[t] * (ds[t] - sum);
  }
};

// A row of the workspace: a token and group.
struct Row {
  int64_t b, y, x, group;

  template <class T>
  HW_DEVICE HW_INLINE Row(int64_t row, const Ref<T, 5>& image) {
    group = row % image.size[3], row /= image.size[3];
    x = row % image.size[2], row /= image.size[2];
    y = row % image.size[1], b = row / image.size[1];
  }
};

template <class Element>
struct AffinityKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;

  struct Params {
    const A* ds;                   // [rows, T]
    Ref<const Element, 2> weight;  // [T, A]
    Ref<Element, 5> d_affinity;    // [B, Y, X, G, A]
    int64_t count;
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t n = static_cast<int64_t>(dev::block_index_x()) * kThreads + dev::thread_index();
    if (n >= p.count) return;
    const int64_t taps = p.weight.size[0], c = n % p.weight.size[1], row = n / p.weight.size[1];
    A sum = 0;
    for (int64_t t = 0; t < taps; ++t) sum += p.ds[row * taps + t] * static_cast<A>(p.weight(t, c));
    const Row at(row, p.d_affinity);
    p.d_affinity(at.b, at.y, at.x, at.group, c) = static_cast<Element>(sum);
  }
};

template <class Element>
struct MapKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = 256, kOwn = kStep * kStep / kThreads;

  struct Params {
    const A* ds;                     // [rows, T]
    Ref<const Element, 5> affinity;  // [B, Y, X, G, A]
    A* sums;                         // [slices, T, A + 1]
    int64_t rows, taps, slices;
    bool first;  // part: sums begin
  };

  struct Smem {
    A ds[kStep][kStep];        // [rows, taps]
    A affinity[kStep][kStep];  // [rows, centres]; 1 in column A
  };

  HW_DEVICE static void main(const Params& p) {
    Smem& smem = *dev::shared<Smem>();
    const int64_t width = p.affinity.size[4] + 1, slice = dev::block_index_z();
    const int64_t tap = static_cast<int64_t>(dev::block_index_x()) * kStep;
    const int64_t centre = static_cast<int64_t>(dev::block_index_y()) * kStep;
    const int64_t end = p.rows * (slice + 1) / p.slices;
    A sum[kOwn] = {};
    for (int64_t row = p.rows * slice / p.slices; row < end; row += kStep) {
      for (int n = dev::thread_index(); n < kStep * kStep; n += kThreads) {
        const int64_t r = row + n / kStep, t = tap + n % kStep, c = centre + n % kStep;
        smem.ds[n / kStep][n % kStep] = r < end && t < p.taps ? p.ds[r * p.taps + t] : A(0);
        smem.affinity[n / kStep][n % kStep] = r < end && c < width ? affinity(p, r, c) : A(0);
      }
      dev::sync_block();
      for (int r = 0; r < kStep; ++r) {
        HW_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          const int n = dev::thread_index() + i * kThreads;
          sum[i] += smem.ds[r][n / kStep] * smem.affinity[r][n % kStep];
        }
      }
      dev::sync_block();
    }
    HW_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int n = dev::thread_index() + i * kThreads;
      const int64_t t = tap + n / kStep, c = centre + n % kStep;
      if (t >= p.taps || c >= width) continue;
      A& to = p.sums[(slice * p.taps + t) * width + c];
      to = p.first ? sum[i] : to + sum[i];
    }
  }

 private:
  HW_DEVICE HW_INLINE static A affinity(const Params& p, int64_t row, int64_t c) {
    if (c == p.affinity.size[4]) return A(1);
    const Row at(row, p.affinity);
    return static_cast<A>(p.affinity(at.b, at.y, at.x, at.group, c));
  }
};

template <class A>
struct TableKernel {
  static constexpr int kThreads = simt::kThreads;

  struct Params {
    Ref<const A, 5> ds;  // [B, Y, X, G, taps of the half]
    Ref<A, 3> sums;      // [B, G, entries]
    Window window;
    int64_t count;
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t n = static_cast<int64_t>(dev::block_index_x()) * kThreads + dev::thread_index();
    if (n >= p.count) return;
    const int64_t entry = n % p.sums.size[2], plane = n / p.sums.size[2];
    const int64_t b = plane / p.sums.size[1], group = plane % p.sums.size[1];
    const Axis &rows = p.window.y, &line = p.window.x;
    const int64_t dy = entry / line.offsets(), dx = entry % line.offsets();
    A sum = 0;
    for (int64_t y = 0; y < rows.size; ++y) {
      const int64_t a = dy - rows.first_offset(y);  // row of the window
      if (a < 0 || a >= rows.kernel) continue;
      for (int64_t x = 0; x < line.size; ++x) {
        const int64_t i = dx - line.first_offset(x);
        if (i >= 0 && i < line.kernel) sum += p.ds(b, y, x, group, a * line.kernel + i);
      }
    }
    p.sums(b, group, entry) = sum;
  }

 private:
  using Axis = neighborhood::Axis;
};

// to(i, j, k) = sum over n of from[n * step + i * outer + j * inner + k]
template <class Element>
struct FinishKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;

  struct Params {
    const A* from;
    int64_t terms, step, outer, inner;
    Ref<Element, 3> to;
    int64_t count;
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t n = static_cast<int64_t>(dev::block_index_x()) * kThreads + dev::thread_index();
    if (n >= p.count) return;
    const int64_t k = n % p.to.size[2], j = n / p.to.size[2] % p.to.size[1];
    const int64_t i = n / p.to.size[2] / p.to.size[1];
    const A* from = p.from + i * p.outer + j * p.inner + k;
    A sum = 0;
    for (int64_t term = 0; term < p.terms; ++term) sum += from[term * p.step];
    p.to(i, j, k) = static_cast<Element>(sum);
  }
};

}  // namespace hw::contmix::simt
