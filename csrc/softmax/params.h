// SPDX-License-Identifier: Apache-2.0
// Softmax-type attention: mathematics and parameters of the whole family.
//
// Scores, for query i and key j of one head; c_ij = <q_i, k_j>:
//
//   x_ij = scale tau_i c_ij                        tau: row_temperature
//   y_ij = cap tanh(x_ij / cap)                    softcap; without one y = x
//   s_ij = y_ij + gamma_j |y_ij| + b_ij + beta_j   key_gain (in gain_rows only), bias, key_bias
//
// Row i sees the keys [first_i, last_i) (visible_keys): causal and windows are aligned at the lower
// right corner. Weights of the keys it sees; the others have weight 0:
//
//   softmax    p_ij = exp(s_ij - L_i)    L_i = log sum_j exp(s_ij)
//              with a sink z_h:          L_i = log (exp(z_h) + sum_j exp(s_ij))
//   softmax1   p_ij = exp(s_ij - L_i)    L_i = log (1 + sum_j exp(s_ij))
//   sigmoid, relu, relu2                 p_ij = a(s_ij) / n_i      a(s) = 1 / (1 + e^-s), s+, s+^2
//              n_i = 1 | number of keys that row i sees | sum_j a(s_ij)     (normalizer)
//
// A row without keys, or whose scores are all -inf, has p = 0 and L = -inf (softmax1: 0, with a
// sink z); where n_i is 0, p = 0.
//
//   w_i  = sum_j p_ij v_j
//   o_i  = g_i ((1 - u) w_i + u v_i)               head_gate g, identity_mix u of the head
//
// What a pass leaves per row for all later ones ("row statistic" l): L_i for the softmaxes, n_i
// with normalizer sum; the others need none. It replays p by the same functor (softmax/score.h).
//
// Rounding L to the accumulation type costs up to half an ulp, 32 at 1e9: where all scores of a row
// are large, log sum_j exp(s_ij - M_i) is lost. So what was lost, the "rest", is handed on beside
// L, and p = exp((s - L) - rest) whatever the size of s. An L from elsewhere has no rest: its
// weights are those of the rounded number.
//
// Read-outs of a row, softmaxes only: entropy -sum p ln p, p_max, sum p^2, mass sum_j p_ij m_j. One
// pass: with the running maximum M and l = sum e^{s-M}, t = sum e^{s-M} (s - M) is carried to M' as
// e^{M-M'} (t + (M - M') l), and the entropy is (l (L - M) - t) / l': no cancellation at large s.
//
// Backward, with d_w_i = g_i (1 - u) d_o_i and D_i = <d_w_i, w_i>:
//   d_v_j = sum_i p_ij d_w_i + g_j u d_o_j          dp_ij = <d_w_i, v_j>
//   ds_ij = p_ij (dp_ij - D_i + d_L_i)                              softmaxes
//   ds_ij = a'(s_ij) / n_i (dp_ij - D_i [normalizer sum])           others
//   d_b_ij = ds_ij    d_beta_j = sum_i ds_ij    d_gamma_j = sum_i ds_ij |y_ij|
//   dy = ds (1 + gamma sign(y))    dx = dy (1 - (y / cap)^2)    d_tau_i = sum_j dx_ij scale c_ij
//   dc = dx scale tau_i    d_q_i = sum_j dc_ij k_j    d_k_j = sum_i dc_ij q_i
//   d_g_i = <d_o_i, (1 - u) w_i + u v_i>            d_u = sum_i g_i <d_o_i, v_i - w_i>
//
// Columns, given the row statistics, with row weights r_i (1 when absent):
//   y_j = sum_i p_ij x_i        sum_j = sum_i r_i p_ij        max_j = max_i p_ij
//
// Symbols: B batch, N sequences (B, or the packed ones), Sq, Sk tokens, Hq query heads, H key
// heads, G = Hq / H query heads that share a key head, D head dim of q and k, Dv of v. "acc":
// accumulation type, fp32 (fp64 for fp64).
#pragma once

#include <cstdint>
#include <limits>

#include "core/macros.h"
#include "core/ref.h"

namespace hw::softmax {

enum class Activation : int { softmax = 0, softmax1 = 1, sigmoid = 2, relu = 3, relu2 = 4 };
enum class Normalizer : int { none = 0, length = 1, sum = 2 };

HW_HOST_DEVICE constexpr bool is_softmax(Activation a) {
  return a == Activation::softmax || a == Activation::softmax1;
}

// What decides the scores. Refs of optional arguments are absent (no data) or expanded to the full
// shape with zero strides.
struct ScoreParams {
  Ref<const void, 4> q;                // [B, Sq, Hq, D]
  Ref<const void, 4> k;                // [B, Sk, H, D]
  Ref<const void, 4> bias;             // [B, Hq, Sq, Sk]  element type
  Ref<const void, 3> key_bias;         // [B, Hq, Sk]      acc
  Ref<const void, 3> key_gain;         // [B, Hq, Sk]      acc
  Ref<const void, 3> row_temperature;  // [B, Sq, Hq]      acc
  Ref<const void, 2> sink;             // [B, Hq]          acc: z, softmax only
  Ref<const int64_t, 1> cu_seqlens_q;  // [N + 1] or absent; then B = 1
  Ref<const int64_t, 1> cu_seqlens_k;  // [N + 1], present exactly if cu_seqlens_q is
  double scale, softcap;               // softcap 0: none
  bool causal;
  int64_t left, right;  // window: keys before and after the diagonal; negative: unlimited
  Activation activation;
  Normalizer normalizer;
  int64_t gain_begin, gain_end;  // rows (of a sequence) that key_gain is for
  int64_t max_q, max_k;          // longest sequence, of packed ones a bound; else Sq and Sk

  HW_HOST_DEVICE bool packed() const { return cu_seqlens_q.data != nullptr; }
  HW_HOST_DEVICE int64_t batch() const { return q.size[0]; }
  HW_HOST_DEVICE int64_t sequences() const {
    return packed() ? cu_seqlens_q.size[0] - 1 : q.size[0];
  }
  HW_HOST_DEVICE int query_heads() const { return static_cast<int>(q.size[2]); }
  HW_HOST_DEVICE int key_heads() const { return static_cast<int>(k.size[2]); }
  HW_HOST_DEVICE int group() const { return key_heads() ? query_heads() / key_heads() : 0; }
  HW_HOST_DEVICE int dim() const { return static_cast<int>(q.size[3]); }
  HW_HOST_DEVICE bool has_row_statistic() const {
    return is_softmax(activation) || normalizer == Normalizer::sum;
  }
};

// Whether all batch entries have the same scores, and logits beside them.
inline bool same_scores_in_batch(const ScoreParams& p) {
  const auto same = [](const auto& x) { return !x || x.stride[0] == 0; };
  return same(p.q) && same(p.k) && same(p.bias) && same(p.key_bias) && same(p.key_gain) &&
         same(p.row_temperature) && same(p.sink);
}

// The logit beside the scores of a row of a softmax that takes weight and has no value: -inf, none.
template <class A>
HW_HOST_DEVICE HW_INLINE A extra_logit(const ScoreParams& p, int64_t batch, int head) {
  if (p.sink) return p.sink.as<const A>()(batch, head);
  return p.activation == Activation::softmax1 ? A(0) : -std::numeric_limits<A>::infinity();
}

// "attention.forward"
struct ForwardParams : ScoreParams {
  Ref<const void, 4> v;             // [B, Sk, H, Dv]; absent: row statistics only
  Ref<const void, 3> head_gate;     // [B, Sq, Hq]  acc
  Ref<const void, 2> identity_mix;  // [B, Hq]      acc
  Ref<const void, 3> mass_keys;     // [B, Hq, Sk]  acc: m of the read-out `mass`
  Ref<void, 4> o;                   // [B, Sq, Hq, Dv]  out
  Ref<void, 4> w;                   // [B, Sq, Hq, Dv]  out: before gate and mix; absent: not wanted
  Ref<void, 3> row, rest;           // [B, Hq, Sq]  out, acc: row statistic; absent: not wanted
  Ref<void, 3> entropy, p_max, sq_norm, mass;  // [B, Hq, Sq]  out, acc; absent: not wanted
  bool skip_dead;  // rows with g = 0 or u = 1 need no loop; goes with o alone

  HW_HOST_DEVICE int value_dim() const { return v ? static_cast<int>(v.size[3]) : 0; }
};

// "attention.backward". The caller makes d_w and delta from what it saved, and adds the gradients
// of gate and mix. `factor` is no argument of this call.
struct BackwardParams : ScoreParams {
  Ref<const void, 4> v;        // [B, Sk, H, Dv]
  Ref<const void, 4> d_w;      // [B, Sq, Hq, Dv], times
  Ref<const void, 3> factor;   // [B, Sq, Hq]  acc; absent: 1. cpu only, where elements are of acc
  Ref<const void, 3> row;      // [B, Hq, Sq]  acc: row statistic, absent if there is none
  Ref<const void, 3> rest;     // [B, Hq, Sq]  acc: of the row statistic, or absent
  Ref<const void, 3> delta;    // [B, Hq, Sq]  acc: D_i - d_L_i
  Ref<void, 4> d_q, d_k, d_v;  // out; d_v absent: not wanted
  Ref<void, 4> d_bias;         // [B, Hq, Sq, Sk]  out, acc, zero strides where bias is broadcast
  Ref<void, 3> d_key_bias;     // [B, Hq, Sk]  out, acc
  Ref<void, 3> d_key_gain;     // [B, Hq, Sk]  out, acc
  Ref<void, 3> d_row_temperature;  // [B, Sq, Hq]  out, acc

  HW_HOST_DEVICE int value_dim() const { return static_cast<int>(v.size[3]); }
};

// Whether several (batch entry, head) pairs, rows or keys add to the same element of d_bias.
inline bool adds_up_bias(const BackwardParams& b) {
  if (!b.d_bias) return false;
  for (int d = 0; d < 4; ++d)
    if (b.d_bias.stride[d] == 0 && b.d_bias.size[d] > 1) return true;
  return false;
}

// "attention.row_dot": D_i of d_w and w, and other inner products of rows with rows.
struct RowDotParams {
  Ref<const void, 4> x, y;  // [B, S, H, D]
  Ref<void, 3> dot;         // [B, H, S]  out, acc: <x_i, y_i>
};

// "attention.columns"
struct ColumnsParams : ScoreParams {
  Ref<const void, 4> x;           // [B, Sq, Hq, Dx], or absent
  Ref<const void, 3> row;         // [B, Hq, Sq]  acc, absent if there is none
  Ref<const void, 3> rest;        // [B, Hq, Sq]  acc: of the row statistic, or absent
  Ref<const void, 3> row_weight;  // [B, Hq, Sq]  acc: r, or absent
  Ref<void, 4> y;                 // [B, Sk, Hq, Dx]  out, with x
  Ref<void, 3> sum, max;          // [B, Hq, Sk]  out, acc; absent: not wanted
};

// "attention.probs": p of pairs (i, j), 0 where i does not see j. Exactly one of the index lists is
// present; keys and rows count within each sequence (rows: within the sequence of key j):
//   keys     out [B, Hq, Sq, n]   p_{i, keys[b, n]}         an index outside the keys gives 0
//   rows     out [B, Hq, n, Sk]   p_{rows[b, n], j}
//   offsets  out [B, Hq, Sq, n]   p_{i, i + Sk - Sq + offsets[n]}
struct ProbsParams : ScoreParams {
  Ref<const void, 3> row;            // [B, Hq, Sq]  acc, absent if there is none
  Ref<const void, 3> rest;           // [B, Hq, Sq]  acc: of the row statistic, or absent
  Ref<const int64_t, 2> keys, rows;  // [B, n]
  Ref<const int64_t, 1> offsets;     // [n]
  Ref<void, 4> p;                    // out, acc
};

}  // namespace hw::softmax
