// SPDX-License-Identifier: Apache-2.0
// Key-only softmax scan ("non-approximate" attention, Deconstructing Attention, arXiv 2510.11602):
// mathematics and parameters.
//
//   o_i = sum_{j <= i} e^{s_j} v_j / sum_{j <= i} e^{s_j}         per head
// computed with the running log-sum L_i = log sum_{j <= i} e^{s_j}, which is carried as a pair of
// the largest score and a sum relative to it (key_scan_sum.h):
//   o_i = e^{L_{i-1} - L_i} o_{i-1} + e^{s_i - L_i} v_i           both exponents are <= 0
// The initial state (o_0, L_0) acts as one more key with score L_0 and value o_0; without one
// L_0 = -inf. The final state is (o_S, L_S). Where L_i = -inf: o_i = 0.
//
// Backward, from the last token to the first (R in [Dv], T a scalar):
//   R_i = do_i + e^{L_i - L_{i+1}} R_{i+1}          T_i = <do_i, o_i> + e^{L_i - L_{i+1}} T_{i+1}
//   dv_i = e^{s_i - L_i} R_i                        ds_i = e^{s_i - L_i} (<v_i, R_i> - T_i)
// R_S also receives the gradient d_o1 of the final o, T_S receives <d_o1, o_S> - d_lse1, and the
// initial state's gradient is that of its key: d_o0 = e^{L_0 - L_1} R_1,
// d_lse0 = e^{L_0 - L_1} (<o_0, R_1> - T_1).
// <v, R> and T sum up products over all later rows and nearly cancel. Both may be relative to any
// value c, v - c and o - c in place of v and o; with c = o_0 the sums are small where the state is
// what the rows are made of, and d_lse0 = -e^{L_0 - L_1} T_1.
#pragma once

#include "core/host/call.h"

namespace hw::key_scan {

struct ForwardParams {
  Ref<const void, 3> s;     // [B, S, H]
  Ref<const void, 4> v;     // [B, S, H, Dv]
  Ref<void, 4> o;           // [B, S, H, Dv]   out
  Ref<void, 3> lse, rest;   // [B, S, H]       out: L and its rest, accumulation type
  Ref<const void, 3> o0;    // [B, H, Dv]      initial state, accumulation type, or absent
  Ref<const void, 2> lse0;  // [B, H]
  Ref<void, 3> o1;          // [B, H, Dv]      out: final state, accumulation type, or absent
  Ref<void, 2> lse1;        // [B, H]
  Ref<void, 4> wide;        // [B, S, H, Dv]   out: o unrounded, accumulation type, or absent
};

struct BackwardParams : ForwardParams {
  Ref<const void, 4> d_o;     // [B, S, H, Dv]
  Ref<const void, 3> d_o1;    // [B, H, Dv]    gradient of the final state, or absent
  Ref<const void, 2> d_lse1;  // [B, H]
  Ref<void, 3> d_s;           // [B, S, H]     out
  Ref<void, 4> d_v;           // [B, S, H, Dv] out
  Ref<void, 3> d_o0;          // [B, H, Dv]    out, or absent
  Ref<void, 2> d_lse0;        // [B, H]        out, or absent
};

// In backward wide and o1 are the forward's: T sums products with o over all later rows, and in
// that sum roundings of o would add up.

}  // namespace hw::key_scan
