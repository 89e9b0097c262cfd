// SPDX-License-Identifier: Apache-2.0
// Routing between regions on CUDA, without tensor cores: every dtype, sm_75 and later.
//
//   means    a block: a region and 128 channels, a thread each; tokens row by row. Neighbouring
//            threads read neighbouring channels; the image is read once.
//   scores   a block: 16 x 16 pairs of regions, a thread each, over slices of 16 channels of the
//            heads in shared memory. Means are small: both sides stay in L2.
#pragma once

#include "ops/bilevel_route/bilevel_route.h"

#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"

namespace hw::bilevel_route::simt {

template <class Element>
struct MeansKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = 128;

  struct Params {
    MeansParams f;
    int64_t slices;  // of the channels
  };

  HW_DEVICE static void main(const Params& p) {
    const MeansParams& f = p.f;
    const int64_t index = dev::block_index_x(), regions = f.m.size[1], width = f.m.size[3];
    const int64_t batch = index / p.slices / regions, region = index / p.slices % regions;
    const int64_t channel = index % p.slices * kThreads + dev::thread_index();
    if (channel >= f.channels()) return;
    const int64_t h = channel / width, d = channel % width;
    const Ref<const Element, 5> x = f.x.template as<const Element>();
    const MeansParams::Part part = f.part(region);
    A sum = 0;
    for (int64_t y = part.y; y < part.y_end; ++y)
      for (int64_t i = part.x; i < part.x_end; ++i) sum += static_cast<A>(x(batch, y, i, h, d));
    f.m.template as<A>()(batch, region, h, d) = sum / static_cast<A>(part.count());
  }
};

template <class A>
struct ScoresKernel {
  static constexpr int kSide = 16, kThreads = kSide * kSide;

  struct Params {
    ScoresParams f;
    int64_t row_tiles, column_tiles;
  };

  // Rows are an odd number of words apart: lanes that read a column meet all banks.
  struct Smem {
    A q[kSide][kSide + 1];  // [rows, channels]
    A k[kSide][kSide + 1];
  };

  HW_DEVICE static void main(const Params& p) {
    const ScoresParams& f = p.f;
    int64_t rest = dev::block_index_x();
    const auto take = [&](int64_t count) {
      const int64_t at = rest % count;
      rest /= count;
      return at;
    };
    const int64_t first_column = take(p.column_tiles) * kSide;
    const int64_t first_row = take(p.row_tiles) * kSide;
    const int64_t graph = take(f.a.size[1]), batch = rest;
    const Ref<const A, 4> q = f.q.template as<const A>(), k = f.k.template as<const A>();
    Smem& smem = *dev::shared<Smem>();
    const int i = dev::thread_index() / kSide, j = dev::thread_index() % kSide;
    const int64_t width = q.size[3];
    A sum = 0;
    for (int64_t h = f.first_head(graph); h < f.end_head(graph); ++h)
      for (int64_t d = 0; d < width; d += kSide) {
        dev::sync_block();
        smem.q[i][j] = value(q, batch, first_row + i, h, d + j);
        smem.k[i][j] = value(k, batch, first_column + i, h / f.group(), d + j);
        dev::sync_block();
        HW_UNROLL
        for (int c = 0; c < kSide; ++c) sum += smem.q[i][c] * smem.k[j][c];
      }
    const Ref<A, 4> a = f.a.template as<A>();
    if (first_row + i < a.size[2] && first_column + j < a.size[3])
      a(batch, graph, first_row + i, first_column + j) = sum;
  }

 private:
  // A mean's channel; 0 beyond the regions and the channels.
  HW_DEVICE HW_INLINE static A value(const Ref<const A, 4>& m, int64_t batch, int64_t region,
                                     int64_t head, int64_t d) {
    return region < m.size[1] && d < m.size[3] ? m(batch, region, head, d) : A(0);
  }
};

template <class Element>
void means(const MeansParams& f, const Call& call) {
  using Kernel = MeansKernel<Element>;
  const int64_t slices = ceil_div<int64_t>(f.channels(), Kernel::kThreads);
  launch<Kernel>({f.m.size[0] * f.m.size[1] * slices, 1, 1}, 0, call.context, {f, slices});
}

// Means are of the accumulation type: half-precision instances never see them.
template <class Element>
void scores(const ScoresParams& f, const Call& call) {
  using Kernel = ScoresKernel<Accum<Element>>;
  const int64_t rows = ceil_div<int64_t>(f.a.size[2], Kernel::kSide);
  const int64_t columns = ceil_div<int64_t>(f.a.size[3], Kernel::kSide);
  launch<Kernel>({f.a.size[0] * f.a.size[1] * rows * columns, 1, 1}, sizeof(typename Kernel::Smem),
                 call.context, {f, rows, columns});
}

}  // namespace hw::bilevel_route::simt

namespace hw::bilevel_route {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& means = simt::means<Element>;
  static constexpr auto& scores = simt::scores<Element>;
};

}  // namespace hw::bilevel_route
