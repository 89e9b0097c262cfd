// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys: the loops of csrc/softmax over index lists.
//
// Of every batch entry and query head there are G groups. Group g has a list of rows and a list of
// keys; each row of the group attends to the group's keys. A list names regions of n tokens:
//
//   token(slot) = token slot % n of region[slot / n]        n = height width
//
// A region is a rectangle of an image (core/regions.h). Sequences are images of one row, with
// regions of one token. A slot beyond the image, or in a region that does not exist, has no token.
//
//   bi-level routing   groups are regions: rows = the region itself, keys = those the graph lists
//   k-means routing    groups are clusters: rows and keys are lists of tokens
//   mixture of heads   one group: rows = those with a gate, keys absent: all of them
//
// Scores, weights and results of a row are those of softmax/params.h; i and j are positions of
// tokens in the sequence there, in masks and biases too. Besides
//
//   pad_keys     a slot without token is a key 0 with the value 0 that is seen (score 0); without
//                it such a slot is not there. Rows without token never are. Goes with no
//                window to the left
//   mask_self    s_ij = kSelfScore where j = i + Sk - Sq, with d s_ij = 0
//
// A token may stand in several lists, and several times in one. Where rows may (by_slot), every
// slot has a result w of its own, and
//
//   o_i = sum_{slots of i} w_slot / (n_i + eps)           n_i slots that hold token i; n_i = 0: 0
//   d_w = d_o_i / (n_i + eps)                             made by the caller, or d_o and a factor
//   D_slot = <d_w_i, w_slot>
//
// Otherwise a token is in one list at most, and once: o, w and row statistics are written where the
// token is. Rows of tokens in no list are left alone; but where all keys go with one list, cpu
// clears them (w = 0, row +inf).
//
// Symbols beside those of softmax/params.h: G groups, N regions of a list, n tokens of a region,
// Wq, Wk slots of a list (N n; without lists Sq, Sk).
#pragma once

#include "softmax/mask.h"
#include "softmax/params.h"
#include "softmax/score.h"

#include "core/regions.h"

namespace hw::routing_attention {

using softmax::Mask;
using softmax::Range;

// exp(kSelfScore - L) is 0 beside any other key; finite, so that a row alone attends to itself.
inline constexpr double kSelfScore = -5e4;

// The score of a token with itself, where mask_self says so.
template <softmax::ScoreKind Base>
struct SelfScore : Base {
  static constexpr bool kSoftmax = true, kSets = true;
  static constexpr double kSetScore = kSelfScore;
  bool mask_self;

  HW_HOST_DEVICE HW_INLINE bool sets() const { return mask_self; }
  HW_HOST_DEVICE HW_INLINE int64_t set_key(const Mask& mask, int64_t row) const {
    return mask_self ? mask.diagonal(row) : kNoKey;
  }

 private:
  static constexpr int kNoKey = -1;
};
static_assert(softmax::ScoreKind<SelfScore<softmax::PlainScore>>);

// Lists of rows or of keys: absent, all tokens in their order are the one list.
struct Lists {
  Ref<const int64_t, 4> entries;  // [B, Hq, G, N] regions; zero strides where lists are shared
  RegionGrid grid;

  HW_HOST_DEVICE explicit operator bool() const { return static_cast<bool>(entries); }
  HW_HOST_DEVICE int64_t slots() const { return entries.size[3] * grid.size(); }
  HW_HOST_DEVICE int64_t token(int64_t b, int64_t head, int64_t group, int64_t slot) const {
    if (!entries) return slot;
    if (grid.single()) return grid.token(entries(b, head, group, slot), 0);
    const int64_t n = grid.size();
    return grid.token(entries(b, head, group, slot / n), slot % n);
  }
};

struct Routing {
  Lists rows, keys;
  bool by_slot, pad_keys, mask_self;
  double mean_eps;

  HW_HOST_DEVICE int64_t groups() const { return rows.entries.size[2]; }
};

// "routing_attention.forward". By slot: o [B, Sq, Hq, Dv] is the mean, w [B, G Wq, Hq, Dv] and row
// [B, Hq, G Wq] are those of slots, and there are no other read-outs. Slots without token: w = 0 is
// written, row is not read later (cpu writes +inf).
struct ForwardParams : softmax::ForwardParams, Routing {};

// "routing_attention.backward". By slot: row as left by forward, `slots` its w, delta absent, d_w
// [B, Sq, Hq, Dv]. Gradients are per token in any case. They are complete, 0 for tokens in no list;
// but not by slot, d_q and d_row_temperature of tokens in no list are treated as o is, and
// d_bias is added to or written where rows are listed: the caller hands over zeros. Of listed keys
// there are no d_bias, d_key_bias and d_key_gain: a key stands in several lists.
struct BackwardParams : softmax::BackwardParams, Routing {
  Ref<const void, 4> slots;  // [B, G Wq, Hq, Dv]
};

}  // namespace hw::routing_attention
