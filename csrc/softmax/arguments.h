// SPDX-License-Identifier: Apache-2.0
// The arguments of softmax-type attention: what the lists of its functions are made of, and what
// lists cannot say. Symbols of sizes are those of softmax/params.h.
#pragma once

#include "softmax/params.h"

#include "core/host/call_list.h"

namespace hw::softmax {

// What decides the scores.
inline constexpr auto kScoreArguments = arguments(
    in("q", &ScoreParams::q, "B Sq Hq D"), in("k", &ScoreParams::k, "B Sk H D"),
    in("bias", &ScoreParams::bias, "B? Hq? Sq? Sk?").optional(),
    in("key_bias", &ScoreParams::key_bias, "B Hq Sk").wide().optional(),
    in("key_gain", &ScoreParams::key_gain, "B Hq Sk").wide().optional(),
    in("row_temperature", &ScoreParams::row_temperature, "B Sq Hq").wide().optional(),
    in("sink", &ScoreParams::sink, "B Hq").wide().optional(),
    in("cu_seqlens_q", &ScoreParams::cu_seqlens_q, "N+1").index().optional(),
    in("cu_seqlens_k", &ScoreParams::cu_seqlens_k, "N+1").index().optional(),
    number("scale", &ScoreParams::scale), number("softcap", &ScoreParams::softcap),
    flag("causal", &ScoreParams::causal), integer("left", &ScoreParams::left),
    integer("right", &ScoreParams::right), choice("activation", &ScoreParams::activation, 5),
    choice("normalizer", &ScoreParams::normalizer, 3),
    integer("gain_begin", &ScoreParams::gain_begin), integer("gain_end", &ScoreParams::gain_end),
    integer("max_q", &ScoreParams::max_q), integer("max_k", &ScoreParams::max_k));

// The rest of a forward pass. Sizes: where w and the row statistic are, which may be elsewhere than
// rows; read-outs are [B, Hq, Sq].
consteval auto forward_arguments(const char* w, const char* row) {
  using P = ForwardParams;
  return arguments(in("v", &P::v, "B Sk H Dv").optional(),
                   in("head_gate", &P::head_gate, "B Sq Hq").wide().optional(),
                   in("identity_mix", &P::identity_mix, "B Hq").wide().optional(),
                   in("mass_keys", &P::mass_keys, "B Hq Sk").wide().optional(),
                   out("o", &P::o, "B Sq Hq Dv").optional(), out("w", &P::w, w).optional(),
                   out("row", &P::row, row).wide().optional().with(&P::rest),
                   out("entropy", &P::entropy, "B Hq Sq").wide().optional(),
                   out("p_max", &P::p_max, "B Hq Sq").wide().optional(),
                   out("sq_norm", &P::sq_norm, "B Hq Sq").wide().optional(),
                   out("mass", &P::mass, "B Hq Sq").wide().optional(),
                   flag("skip_dead", &P::skip_dead));
}

// The rest of a backward pass; `row`: where the row statistic is.
consteval auto backward_inputs(const char* row) {
  using P = BackwardParams;
  return arguments(in("v", &P::v, "B Sk H Dv"), in("d_w", &P::d_w, "B Sq Hq Dv"),
                   in("row", &P::row, row).wide().optional().with(&P::rest),
                   in("delta", &P::delta, "B Hq Sq").wide().optional());
}
// The gradient of an argument x of the score is d_x.
inline constexpr auto kGradients = arguments(
    out("d_q", &BackwardParams::d_q, "B Sq Hq D"), out("d_k", &BackwardParams::d_k, "B Sk H D"),
    out("d_v", &BackwardParams::d_v, "B Sk H Dv").optional(),
    out("d_bias", &BackwardParams::d_bias, "B? Hq? Sq? Sk?").wide().optional(),
    out("d_key_bias", &BackwardParams::d_key_bias, "B Hq Sk").wide().optional(),
    out("d_key_gain", &BackwardParams::d_key_gain, "B Hq Sk").wide().optional(),
    out("d_row_temperature", &BackwardParams::d_row_temperature, "B Sq Hq").wide().optional());

// Fills in lengths, and the rows of key_gain, which are counted as a slice of Python's: from the
// end where they are negative.
void complete_scores(ScoreParams& p);

// A single query: the heads that share a key head become rows, G of them, so that keys and values
// are read once for all. References are laid out anew, and keys outside the window left out; rows
// then see all of them. Where query heads have numbers of their own for keys, beside the softmax or
// behind it (a gate may be closed), heads stay heads.
void pack_query_heads(ForwardParams& p, DType element);

// Throw Error; `op` names the operator.
void check_scores(const char* op, const ScoreParams& p, const Call& call);
void check_forward(const char* op, const ForwardParams& p);
void check_statistic(const char* op, const ScoreParams& p, const Ref<const void, 3>& row);

}  // namespace hw::softmax
