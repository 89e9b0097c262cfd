// SPDX-License-Identifier: Apache-2.0
// ContMix (OverLoCK, arXiv 2502.20087): neighbourhoods whose weights are made of a token's
// affinities; mathematics and parameters.
//
//   s_t = <W_t, a> + c_t         t < T = S + K keys of a small window and of a large one, a token
//   p   = softmax(s + r), of both windows apart;  r: tables at (key - query), one per group
//   o_m = sum_t p_t v_m,key(t)    m = 0, 1: heads g and G + g of v belong to group g
// Backward, of p made again from a:
//   dp_t = <do_m, v_m,key(t)>      ds_t = p_t (dp_t - sum_u p_u dp_u), u in the window of t
//   da = W^T ds     dW = sum ds a^T     dc = sum ds     dr: sums of ds by key - query
//   dv as in ops/na2d_av/na2d_av.h with the weights p
// Nothing but the inputs is kept for it: the T numbers of a token are at hand together, so that
// their maximum and sum cost less than reading them would.
//
// Sums over tokens (dW, dc, dr) have two stages in a fixed order: partial sums of parts that the
// shapes alone decide, then their sum.
#pragma once

#include "neighborhood/window.h"

#include "core/host/call.h"

namespace hw::contmix {

struct ForwardParams {
  Ref<const void, 5> affinity;   // [B, Y, X, G, A]
  Ref<const void, 2> weight;     // [T, A]                 the small window first
  Ref<const void, 1> bias;       // [T]                    or absent
  Ref<const void, 3> small_rpb;  // [G, 2 Sy - 1, 2 Sx - 1] or absent
  Ref<const void, 3> rpb;        // [G, 2 Ky - 1, 2 Kx - 1] or absent
  Ref<const void, 5> v;          // [B, Y, X, 2 G, D]
  Ref<void, 5> o;                // [B, Y, X, 2 G, D]      out
  int64_t small_y = 1, small_x = 1, kernel_y = 1, kernel_x = 1;

  HW_HOST_DEVICE int64_t batch() const { return affinity.size[0]; }
  HW_HOST_DEVICE int64_t groups() const { return affinity.size[3]; }
  HW_HOST_DEVICE int64_t centres() const { return affinity.size[4]; }
  HW_HOST_DEVICE int64_t width() const { return v.size[4]; }
  HW_HOST_DEVICE int64_t tokens() const { return v.size[1] * v.size[2]; }
  // Of half m: 0 the small window, 1 the large one.
  HW_HOST_DEVICE neighborhood::Window window(int m) const {
    return {{v.size[1], m == 0 ? small_y : kernel_y}, {v.size[2], m == 0 ? small_x : kernel_x}};
  }
  HW_HOST_DEVICE const Ref<const void, 3>& table(int m) const { return m == 0 ? small_rpb : rpb; }
};

struct BackwardParams : ForwardParams {
  Ref<const void, 5> d_o;   // [B, Y, X, 2 G, D]
  Ref<void, 5> d_affinity;  // as their tensors; out, each of them may be absent
  Ref<void, 2> d_weight;
  Ref<void, 1> d_bias;
  Ref<void, 3> d_small_rpb;
  Ref<void, 3> d_rpb;
  Ref<void, 5> d_v;

  HW_HOST_DEVICE bool wants_scores() const {
    return d_affinity || d_weight || d_bias || d_small_rpb || d_rpb;
  }
  HW_HOST_DEVICE const Ref<void, 3>& d_table(int m) const { return m == 0 ? d_small_rpb : d_rpb; }
};

}  // namespace hw::contmix
