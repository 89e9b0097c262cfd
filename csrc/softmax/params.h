// SPDX-License-Identifier: Apache-2.0
// Softmax-type attention: mathematics and parameters of the whole family.
//
// Scores, for query i and key j of one head; c_ij = <q_i, k_j>:
//
//   x_ij = scale tau_i c_ij                        tau: row_temperature
//   y_ij = cap tanh(x_ij / cap)                    softcap; without one y = x
//   s_ij = y_ij + gamma_j |y_ij| + b_ij + beta_j   key_gain (rows of gain_rows only), bias, key_bias
//
// Row i sees the keys [first_i, last_i) (visible_keys): causal and windows are aligned at the lower
// right corner. Weights of the keys it sees; the others have weight 0:
//
//   softmax    p_ij = exp(s_ij - L_i)    L_i = log sum_j exp(s_ij)
//   softmax1   p_ij = exp(s_ij - L_i)    L_i = log (1 + sum_j exp(s_ij))
//   sigmoid, relu, relu2                 p_ij = a(s_ij) / n_i      a(s) = 1 / (1 + e^-s), s+, s+^2
//              n_i = 1 | number of keys that row i sees | sum_j a(s_ij)     (normalizer)
//
// A row without keys, or whose scores are all -inf, has p = 0 and L = -inf (softmax1: 0); where n_i
// is 0, p = 0.
//
//   w_i  = sum_j p_ij v_j
//   o_i  = g_i ((1 - u) w_i + u v_i)               head_gate g, identity_mix u of the head
//
// What a pass leaves per row for all later ones ("row statistic" l): L_i for the softmaxes, n_i with
// normalizer sum; the others need none. It replays p by the same functor (attention_score.h).
//
// Rounding L to the accumulation type costs up to half an ulp, 32 at 1e9: where all scores of a row
// are large, log sum_j exp(s_ij - M_i) is lost. So what was lost, the "rest", is handed on beside L,
// and p = exp((s - L) - rest) whatever the size of s. An L from elsewhere has no rest: its weights
// are those of the rounded number.
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
// Symbols: B batch, N sequences (B, or the packed ones), Sq, Sk tokens, Hq query heads, H key heads,
// G = Hq / H query heads that share a key head, D head dim of q and k, Dv of v. "acc": accumulation
// type, fp32 (fp64 for fp64).
#pragma once

#include <cstdint>

#include "core/host/arguments.h"
#include "core/host/call.h"
#include "core/host/signature.h"
#include "core/macros.h"
#include "core/math.h"

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
  Ref<const int64_t, 1> cu_seqlens_q;  // [N + 1] or absent; then B = 1
  Ref<const int64_t, 1> cu_seqlens_k;  // [N + 1], present exactly if cu_seqlens_q is
  double scale, softcap;               // softcap 0: none
  bool causal;
  int64_t left, right;  // window: keys before and after the diagonal; negative: unlimited
  Activation activation;
  Normalizer normalizer;
  int64_t gain_begin, gain_end;  // rows (of a sequence) that key_gain is for
  int64_t max_q, max_k;          // longest sequence; Sq and Sk when not packed

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
  bool skip_dead;  // rows with g = 0 or u = 1 need no loop; nothing but o is wanted of a row

  HW_HOST_DEVICE int value_dim() const { return v ? static_cast<int>(v.size[3]) : 0; }
};

// "attention.backward". The caller makes d_w and delta from what it saved, and adds the gradients of
// gate and mix. `factor` is not among the tensors of this call.
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

// Tensors and scalars of a call, in order:
//   all       q k bias key_bias key_gain row_temperature cu_seqlens_q cu_seqlens_k, then
//   forward   v head_gate identity_mix mass_keys o w row entropy p_max sq_norm mass workspace
//   backward  v d_w row delta d_q d_k d_v d_bias d_key_bias d_key_gain d_row_temperature workspace
//   columns   x row row_weight y sum max workspace
//   probs     row keys rows offsets p workspace
//   row is [2, B, Hq, Sq], L and its rest, or [B, Hq, Sq], L alone
//   scalars of all: scale softcap causal left right activation normalizer gain_begin gain_end
//                   max_q max_k; forward: skip_dead
ForwardParams forward_params(const Call& call);
BackwardParams backward_params(const Call& call);
void read_forward(Arguments& a, ForwardParams& p);  // from the next argument on
void read_backward(Arguments& a, BackwardParams& p);
ColumnsParams columns_params(const Call& call);
ProbsParams probs_params(const Call& call);

// The signatures of the same; letters as above, S and K for Sq and Sk, Q for Hq. Of the outputs of
// rows, `w` and `row` may lie elsewhere.
inline constexpr int kScoreScalars = 11;
inline constexpr std::array<Argument, 8> kScoreTensors{
    {{"q", "BSQD"},
     {"k", "BKHD"},
     {"bias", "BQSK", Kind::element, Need::optional},
     {"key_bias", "BQK", Kind::wide, Need::optional},
     {"key_gain", "BQK", Kind::wide, Need::optional},
     {"row_temperature", "BSQ", Kind::wide, Need::optional},
     {"cu_seqlens_q", "n", Kind::index, Need::optional},
     {"cu_seqlens_k", "n", Kind::index, Need::optional}}};

constexpr std::array<Argument, 11> forward_tensors(const char* w, const char* row) {
  return {{{"v", "BKHV", Kind::element, Need::optional},
           {"head_gate", "BSQ", Kind::wide, Need::optional},
           {"identity_mix", "BQ", Kind::wide, Need::optional},
           {"mass_keys", "BQK", Kind::wide, Need::optional},
           {"o", "BSQV", Kind::element, Need::optional},
           {"w", w, Kind::element, Need::optional},
           {"row", row, Kind::wide, Need::optional},
           {"entropy", "BQS", Kind::wide, Need::optional},
           {"p_max", "BQS", Kind::wide, Need::optional},
           {"sq_norm", "BQS", Kind::wide, Need::optional},
           {"mass", "BQS", Kind::wide, Need::optional}}};
}

constexpr std::array<Argument, 11> backward_tensors(const char* row, Need delta) {
  return {{{"v", "BKHV"},
           {"d_w", "BSQV"},
           {"row", row, Kind::wide, Need::optional},
           {"delta", "BQS", Kind::wide, delta},
           {"d_q", "BSQD"},
           {"d_k", "BKHD"},
           {"d_v", "BKHV", Kind::element, Need::optional},
           {"d_bias", "BQSK", Kind::wide, Need::optional},
           {"d_key_bias", "BQK", Kind::wide, Need::optional},
           {"d_key_gain", "BQK", Kind::wide, Need::optional},
           {"d_row_temperature", "BSQ", Kind::wide, Need::optional}}};
}

// What signatures do not say of the arguments from number `first`, that of q, on.
void check_scores(const Call& call, int first);
void check_forward(const Call& call, int first);
void check_backward(const Call& call, int first, const ScoreParams& p);
void check_statistic(const ScoreParams& p, const Tensor& row);

// One sequence: rows [q_begin, q_begin + q_count) and keys [k_begin, k_begin + k_count) of `batch`.
struct Sequence {
  int64_t batch, q_begin, q_count, k_begin, k_count;
};

template <class Params>
HW_HOST_DEVICE HW_INLINE Sequence sequence(const Params& p, int64_t n) {
  if (!p.packed()) return {n, 0, p.q.size[1], 0, p.k.size[1]};
  const int64_t q = p.cu_seqlens_q(n), k = p.cu_seqlens_k(n);
  return {0, q, p.cu_seqlens_q(n + 1) - q, k, p.cu_seqlens_k(n + 1) - k};
}

// A half-open range of keys, or of rows.
struct Range {
  int64_t begin, end;
  HW_HOST_DEVICE bool empty() const { return end <= begin; }
  HW_HOST_DEVICE int64_t count() const { return empty() ? 0 : end - begin; }
};

// Which keys a row sees: an interval, whose ends never decrease from row to row.
struct Mask {
  int64_t rows = 0, keys = 0;     // of the sequence
  int64_t left = -1, right = -1;  // around the diagonal; causal is right = 0

  HW_HOST_DEVICE int64_t diagonal(int64_t row) const { return row + keys - rows; }

  HW_HOST_DEVICE Range visible_keys(int64_t row) const {
    const int64_t at = diagonal(row);
    const int64_t begin = left < 0 ? 0 : max_of<int64_t>(at - left, 0);
    const int64_t end = right < 0 ? keys : min_of<int64_t>(at + right + 1, keys);
    return {begin, end < begin ? begin : end};
  }

  // Rows that see `key`.
  HW_HOST_DEVICE Range seeing_rows(int64_t key) const {
    const int64_t at = key - (keys - rows);  // the row whose diagonal is `key`
    const int64_t begin = right < 0 ? 0 : max_of<int64_t>(at - right, 0);
    const int64_t end = left < 0 ? rows : min_of<int64_t>(at + left + 1, rows);
    return {begin, end < begin ? begin : end};
  }

  // Keys that any row of `rows`, rows that any key of `keys` may meet; all of them do in `whole`.
  HW_HOST_DEVICE Range keys_of(const Range& some_rows) const {
    return {visible_keys(some_rows.begin).begin, visible_keys(some_rows.end - 1).end};
  }
  HW_HOST_DEVICE Range rows_of(const Range& some_keys) const {
    return {seeing_rows(some_keys.begin).begin, seeing_rows(some_keys.end - 1).end};
  }
  HW_HOST_DEVICE bool whole(const Range& some_rows, const Range& some_keys) const {
    return visible_keys(some_rows.end - 1).begin <= some_keys.begin &&
           visible_keys(some_rows.begin).end >= some_keys.end;
  }
};

template <class Params>
HW_HOST_DEVICE Mask mask_of(const Params& p, const Sequence& s) {
  return {s.q_count, s.k_count, p.left, p.causal ? 0 : p.right};
}

}  // namespace hw::softmax
