// SPDX-License-Identifier: Apache-2.0
// Linear attention (BASED, Arora et al. 2024, arXiv 2402.18668): mathematics and parameters.
//
//   x' = pre(x)                    elementwise map of q and k
//   s_ij = scale * <q'_i, k'_j>
//   w_ij = w(s_ij)                 taylor2: 1 + s + s^2/2 ( = ((1+s)^2 + 1)/2 >= 1/2 );  others: s
//   o_i  = sum_j w_ij v_j / z_i    z_i = sum_j w_ij + eps        (normalize)
//   o_i  = sum_j w_ij v_j                                        (not normalize)
// over j <= i (causal) or all j of the same sequence. A row whose z_i is exactly 0 gives 0.
//
// The same through features: w_ij = sum_f c_f m_f(q'_i) m_f(k'_j), where the monomials m are
//   taylor2   f = 0: 1;   f = 1 .. D: x_{f-1};   then x_a x_b for a <= b, row by row (a outer)
//   others    f = 0 .. D-1: x_f
// and the coefficients c belong to the query side only
//   taylor2   1;  scale;  scale^2 / 2 for a == b, scale^2 for a < b
//   others    scale
// so that the state over a set of keys is independent of the scale:
//   kv[f, :] = sum_j m_f(k'_j) v_j   [F, Dv]        z[f] = sum_j m_f(k'_j)   [F]
//
// Symbols: B batch, N sequences (B, or the packed ones), S tokens, Hq query heads, H key heads,
// D head dim of q and k, Dv of v, F features, G = Hq / H query heads that share a key head.
//
// Backward, with g_i = do_i / z_i, dz_i = -<do_i, o_i> / z_i  (not normalize: g = do, dz = 0):
//   dw_ij = <g_i, v_j> + dz_i       ds_ij = dw_ij * w'(s_ij)
//   dq'_i = scale * sum_j ds_ij k'_j     dk'_j = scale * sum_i ds_ij q'_i     dv_j = sum_i w_ij g_i
// i.e. two loops in two directions: "apply" (sum_j w_ij x_j) and "grad" (sum_j <y_i, x_j> w' b_j).
// With the state S = (kv, z) over earlier keys dm(q'_i) = kv g_i + z dz_i, chained through c, m;
// with the reverse state R = (sum_i c m(q'_i) g_i, sum_i c m(q'_i) dz_i) over later queries (which
// starts from the gradient of the final state): dm(k'_j) = R_kv v_j + R_z, dv_j = R_kv^T m(k'_j).
// R after the first token is the gradient of the initial state.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host/call.h"
#include "core/macros.h"
#include "core/math.h"

namespace hw::linear_attention {

enum class FeatureMap : int { taylor2 = 0, identity = 1, elu1 = 2, relu = 3 };

// Largest D for the quadratic map: 561 features.
inline constexpr int kMaxTaylorDim = 32;

HW_HOST_DEVICE constexpr int num_features(FeatureMap map, int d) {
  return map == FeatureMap::taylor2 ? 1 + d + d * (d + 1) / 2 : d;
}

// Position of x_a x_b (a <= b) among the features of taylor2.
HW_HOST_DEVICE constexpr int quadratic_feature(int d, int a, int b) {
  return 1 + d + a * d - a * (a - 1) / 2 + (b - a);
}

// Arguments of "linear_attention.forward". Absent: Ref without data.
struct ForwardParams {
  Ref<const void, 4> q;    // [B, S, Hq, D]
  Ref<const void, 4> k;    // [B, S, H, D]
  Ref<const void, 4> v;    // [B, S, H, Dv]
  Ref<void, 4> o;          // [B, S, Hq, Dv]   out
  Ref<void, 3> z;          // [B, S, Hq]       out, accumulation type; absent unless normalize
  Ref<const void, 4> kv0;  // [N, H, F, Dv]  initial state, accumulation type, or absent
  Ref<const void, 3> z0;   // [N, H, F]
  Ref<void, 4> kv1;        // [N, H, F, Dv]  out: final state, or absent
  Ref<void, 3> z1;         // [N, H, F]
  Ref<const int64_t, 1> cu_seqlens;  // [N + 1] or absent; then B = 1
  FeatureMap map;
  bool causal, normalize;
  double scale, eps;

  HW_HOST_DEVICE int64_t tokens() const { return q.size[1]; }
  HW_HOST_DEVICE int64_t sequences() const {
    return cu_seqlens ? cu_seqlens.size[0] - 1 : q.size[0];
  }
  HW_HOST_DEVICE int query_heads() const { return static_cast<int>(q.size[2]); }
  HW_HOST_DEVICE int key_heads() const { return static_cast<int>(k.size[2]); }
  HW_HOST_DEVICE int group() const { return key_heads() ? query_heads() / key_heads() : 0; }
  HW_HOST_DEVICE int dim() const { return static_cast<int>(q.size[3]); }
  HW_HOST_DEVICE int value_dim() const { return static_cast<int>(v.size[3]); }
  HW_HOST_DEVICE int features() const { return num_features(map, dim()); }
};

// Arguments of "linear_attention.backward": those of forward (o and z are inputs, kv1 and z1 are
// absent), and
struct BackwardParams : ForwardParams {
  Ref<const void, 4> d_o;    // [B, S, Hq, Dv]
  Ref<const void, 4> d_kv1;  // [N, H, F, Dv]  gradient of the final state, or absent
  Ref<const void, 3> d_z1;   // [N, H, F]
  Ref<void, 4> d_q;          // [B, S, Hq, D]  out
  Ref<void, 4> d_k;          // [B, S, H, D]   out
  Ref<void, 4> d_v;          // [B, S, H, Dv]  out
  Ref<void, 4> d_kv0;        // [N, H, F, Dv]  out: gradient of the initial state, or absent
  Ref<void, 3> d_z0;         // [N, H, F]
};

// Arguments of "linear_attention.step": one token per sequence, state updated in place.
struct StepParams {
  Ref<const void, 3> q;  // [B, Hq, D]
  Ref<const void, 3> k;  // [B, H, D]
  Ref<const void, 3> v;  // [B, H, Dv]
  Ref<void, 4> kv;       // [B, H, F, Dv]    in and out, accumulation type
  Ref<void, 3> z;        // [B, H, F]        in and out
  Ref<void, 3> o;        // [B, Hq, Dv]      out
  FeatureMap map;
  bool normalize;
  double scale, eps;

  HW_HOST_DEVICE int64_t batch() const { return q.size[0]; }
  HW_HOST_DEVICE int query_heads() const { return static_cast<int>(q.size[1]); }
  HW_HOST_DEVICE int key_heads() const { return static_cast<int>(k.size[1]); }
  HW_HOST_DEVICE int group() const { return key_heads() ? query_heads() / key_heads() : 0; }
  HW_HOST_DEVICE int dim() const { return static_cast<int>(q.size[2]); }
  HW_HOST_DEVICE int value_dim() const { return static_cast<int>(v.size[2]); }
  HW_HOST_DEVICE int features() const { return num_features(map, dim()); }
};

// The rows [begin, end) of sequence n, and the batch index they are found at.
struct Sequence {
  int64_t batch, begin, end;
};

template <class Params>
HW_HOST_DEVICE Sequence sequence(const Params& p, int64_t n) {
  if (!p.cu_seqlens) return {n, 0, p.tokens()};
  return {0, p.cu_seqlens(n), p.cu_seqlens(n + 1)};
}

// pre(x), its derivative, w(s) and w'(s), shared by every backend. NaN stays NaN.
template <class T>
HW_HOST_DEVICE T pre_map(FeatureMap map, T x) {
  switch (map) {
    case FeatureMap::elu1: return x > T(0) ? x + T(1) : std::exp(x);
    case FeatureMap::relu: return x < T(0) ? T(0) : x;
    default: return x;
  }
}

template <class T>
HW_HOST_DEVICE T pre_map_derivative(FeatureMap map, T x) {
  switch (map) {
    case FeatureMap::elu1: return x > T(0) ? T(1) : std::exp(x);
    case FeatureMap::relu: return x > T(0) ? T(1) : T(0);
    default: return T(1);
  }
}

template <class T>
HW_HOST_DEVICE constexpr T weight(FeatureMap map, T s) {
  return map == FeatureMap::taylor2 ? T(1) + s + T(0.5) * s * s : s;
}

template <class T>
HW_HOST_DEVICE constexpr T weight_derivative(FeatureMap map, T s) {
  return map == FeatureMap::taylor2 ? T(1) + s : T(1);
}

}  // namespace hw::linear_attention
