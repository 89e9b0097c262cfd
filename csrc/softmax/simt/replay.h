// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores: what a score is, and its weight by what a pass left of the row.
#pragma once

#include <limits>

#include "softmax/mask.h"
#include "softmax/score.h"

namespace hw::softmax::simt {

template <class A>
HW_DEVICE HW_INLINE A infinity() {
  return std::numeric_limits<A>::infinity();
}

// What replaying the row in `position` needs of its statistic: softmaxes L, with +inf for rows
// without weight; others 1 / n.
template <class A>
HW_DEVICE HW_INLINE A replayed(const ScoreParams& p, const Mask& mask, int64_t position, A row) {
  if (is_softmax(p.activation)) return row == -infinity<A>() ? infinity<A>() : row;
  if (p.normalizer == Normalizer::none) return A(1);
  const A n =
      p.normalizer == Normalizer::sum ? row : static_cast<A>(mask.visible_keys(position).count());
  return n != A(0) && n < infinity<A>() ? A(1) / n : A(0);
}

// The rest of its statistic, 0 where that is infinite.
template <class A>
HW_DEVICE HW_INLINE A replayed_rest(A row, A rest) {
  return row == infinity<A>() || row == -infinity<A>() ? A(0) : rest;
}

// p from s and what replayed() and replayed_rest() gave.
template <class A>
HW_DEVICE HW_INLINE A replay(const ScoreParams& p, A s, A row, A rest) {
  return is_softmax(p.activation) ? exp_of((s - row) - rest) : activation(p.activation, s) * row;
}

// A score and what its derivative needs.
template <class A>
struct Scored {
  A y, gain, s;  // gain: gamma_j, 0 for rows that it is not for
  bool met;      // row and key exist and meet
  bool set;      // s is a constant: no gradient
};

}  // namespace hw::softmax::simt
