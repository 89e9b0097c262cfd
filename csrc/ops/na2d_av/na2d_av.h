// SPDX-License-Identifier: Apache-2.0
// Values of a neighbourhood, mixed with given weights: mathematics and parameters.
//
//   o_q = sum_t w_qt v_{key(q, t)}                    T = Ky Kx keys of a query, in the order of
//   dw_qt = <do_q, v_{key(q, t)}>                     neighborhood/window.h
//   dv_k = sum of w_qt do_q over the (q, t) with key(q, t) = k, q increasing
//
// dv gathers over the queries that see a key: nothing is added from two sides.
#pragma once

#include "neighborhood/window.h"

#include "core/host/call.h"

namespace hw::na2d_av {

struct ForwardParams {
  Ref<const void, 5> w;  // [B, Y, X, H, T]
  Ref<const void, 5> v;  // [B, Y, X, H, D]
  Ref<void, 5> o;        // [B, Y, X, H, D]   out
  int64_t kernel_y = 1, kernel_x = 1;

  HW_HOST_DEVICE neighborhood::Window window() const {
    return {{v.size[1], kernel_y}, {v.size[2], kernel_x}};
  }
};

struct BackwardParams : ForwardParams {
  Ref<const void, 5> d_o;  // [B, Y, X, H, D]
  Ref<void, 5> d_w;        // [B, Y, X, H, T]   out, or absent
  Ref<void, 5> d_v;        // [B, Y, X, H, D]   out, or absent
};

}  // namespace hw::na2d_av
