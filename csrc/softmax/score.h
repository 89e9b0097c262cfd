// SPDX-License-Identifier: Apache-2.0
// The score functor of softmax-type attention: from x = scale tau <q, k> to the score s and back,
// and the activations. Every loop of every backend goes through these lines, so that a replayed
// weight is the weight that was applied. The formulas are in softmax/params.h.
//
// What a score is besides the numbers of ScoreParams is the second axis of a loop, a ScoreKind:
//
//   PlainScore     scale > 0 times products, of a softmax: tensor-core kernels of their own
//   FullScore      every option of ScoreParams
//   of an operator one key of a row may have a constant for a score (kSets), which has no gradient:
//                  that of a token with itself
//
// V is a number (CUDA, one score) or a CPU vector (lanes are queries); A the accumulation type.
#pragma once

#include <concepts>

#include "softmax/mask.h"
#include "softmax/params.h"

#include "core/scalar_math.h"
#if defined(HW_ISA)  // a CPU instance
#include "core/cpu/simd_math.h"
#endif

namespace hw::softmax {

// kSoftmax: no call of the loop has another activation than a softmax.
// kSets: set_key(mask, row) is the position of the key whose score with a row is kSetScore, which
// never decreases from row to row; negative: there is none. sets(): whether any row of the call has
// one.
template <class S>
concept ScoreKind = requires {
  { S::kPlain } -> std::convertible_to<bool>;
  { S::kSoftmax } -> std::convertible_to<bool>;
  { S::kSets } -> std::convertible_to<bool>;
  requires !S::kPlain || S::kSoftmax;
  requires !S::kSets || S::kSoftmax;
  requires !S::kSets || requires(const S& s, const Mask& mask, int64_t row) {
    { S::kSetScore } -> std::convertible_to<double>;
    { s.sets() } -> std::same_as<bool>;
    { s.set_key(mask, row) } -> std::integral;
  };
};

struct PlainScore {
  static constexpr bool kPlain = true, kSoftmax = true, kSets = false;
};
struct FullScore {
  static constexpr bool kPlain = false, kSoftmax = false, kSets = false;
};
static_assert(ScoreKind<PlainScore> && ScoreKind<FullScore>);

// What a score needs besides x, fixed for a call.
template <class A>
struct ScoreShape {
  A cap = 0, inverse_cap = 0;  // 0: no softcap

  HW_HOST_DEVICE explicit ScoreShape(double softcap)
      : cap(static_cast<A>(softcap)),
        inverse_cap(softcap > 0 ? static_cast<A>(1 / softcap) : A(0)) {}

  template <class V>
  HW_HOST_DEVICE HW_INLINE V capped(V x) const {
    return cap > 0 ? cap * tanh_of(x * inverse_cap) : x;
  }

  // s of y: `gain` is 0 where there is none, `added` the sum of bias and key_bias.
  template <class V, class G, class B>
  HW_HOST_DEVICE HW_INLINE static V score(V y, G gain, B added) {
    return y + gain * abs_of(y) + added;
  }

  // dx / ds.
  template <class V, class G>
  HW_HOST_DEVICE HW_INLINE V slope(V y, G gain) const {
    const V ratio = y * inverse_cap;
    return (A(1) + gain * sign_of(y)) * (A(1) - ratio * ratio);
  }
};

// s_ij of one pair, from c_ij = <q_i, k_j>. `row`, `key`: where numbers of i and of j are.
template <class Element, class A>
HW_HOST_DEVICE HW_INLINE A score_of_pair(const ScoreParams& p, const ScoreShape<A>& shape,
                                         int64_t batch, int head, int64_t i, int64_t row,
                                         int64_t key, A c) {
  A x = static_cast<A>(p.scale) * c;
  if (p.row_temperature) x *= p.row_temperature.as<const A>()(batch, row, head);
  A gain = 0, added = 0;
  if (p.key_gain && i >= p.gain_begin && i < p.gain_end)
    gain = p.key_gain.as<const A>()(batch, head, key);
  if (p.bias) added = static_cast<A>(p.bias.as<const Element>()(batch, head, row, key));
  if (p.key_bias) added += p.key_bias.as<const A>()(batch, head, key);
  const A y = shape.capped(x);
  return p.key_gain ? shape.score(y, gain, added) : y + added;
}

// a(s) of the activations that are not softmaxes, and a'(s).
template <class V>
HW_HOST_DEVICE HW_INLINE V activation(Activation a, V s) {
  if (a == Activation::sigmoid) return sigmoid_of(s);
  const V r = positive_of(s);
  return a == Activation::relu ? r : r * r;
}

template <class V>
HW_HOST_DEVICE HW_INLINE V activation_slope(Activation a, V s) {
  if (a == Activation::sigmoid) {
    const V r = sigmoid_of(s);
    return r - r * r;
  }
  return a == Activation::relu ? step_of(s) : 2 * positive_of(s);
}

}  // namespace hw::softmax
