// SPDX-License-Identifier: Apache-2.0
// Routing between regions: means of regions, and how well they suit each other.
//
//   means    m_brhd  = (1 / n_r) sum_{tokens t of region r} x_bthd     n_r tokens of the image in r
//   scores   A_brs   = sum_hd mq_brhd mk_bs(h/G)d                      one graph for all heads
//            A_bhrs  = sum_d  mq_brhd mk_bs(h/G)d                      one for each
//
//   B batch, R and Rk regions (core/regions.h) of q and k, Hq heads of q, H of k,
//   G = Hq / H
//
// Sums are of the accumulation type and have one order: tokens of a region row by row, then h, d.
// Which regions are chosen is select_topk's to say.
#pragma once

#include <cstdint>

#include "core/host/call.h"
#include "core/regions.h"

namespace hw::bilevel_route {

// "bilevel_route.means"
struct MeansParams {
  Ref<const void, 5> x;  // [B, Y, X, H, D]
  Ref<void, 4> m;        // [B, R, H, D]  out, acc, contiguous
  RegionGrid grid;

  HW_HOST_DEVICE int64_t channels() const { return m.size[2] * m.size[3]; }

  // The image's part of a region: rows [y, y_end), columns [x, x_end).
  struct Part {
    int64_t y, y_end, x, x_end;
    HW_HOST_DEVICE int64_t count() const { return (y_end - y) * (x_end - x); }
  };
  HW_HOST_DEVICE Part part(int64_t region) const {
    const int64_t y = region / grid.columns * grid.height;
    const int64_t left = region % grid.columns * grid.width;
    return {y, min_of(y + grid.height, grid.rows_of_image), left,
            min_of(left + grid.width, grid.columns_of_image)};
  }
};

// "bilevel_route.scores"
struct ScoresParams {
  Ref<const void, 4> q;  // [B, R, Hq, D]   means, acc
  Ref<const void, 4> k;  // [B, Rk, H, D]   means, acc
  Ref<void, 4> a;        // [B, Hq | 1, R, Rk]  out, acc

  HW_HOST_DEVICE bool per_head() const { return a.size[1] > 1; }
  HW_HOST_DEVICE int64_t group() const { return k.size[2] ? q.size[2] / k.size[2] : 1; }
  // Heads of q that a score sums over.
  HW_HOST_DEVICE int64_t first_head(int64_t graph) const { return per_head() ? graph : 0; }
  HW_HOST_DEVICE int64_t end_head(int64_t graph) const {
    return per_head() ? graph + 1 : q.size[2];
  }
};

}  // namespace hw::bilevel_route
