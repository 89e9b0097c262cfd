// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores: what is summed along a row, and what becomes of it at the end.
#pragma once

#include <cmath>

#include "softmax/online.h"
#include "softmax/simt/loop.cuh"

namespace hw::softmax::simt {

// The sums of a row in a block: the maximum is that of the row, the others are a lane's share.
template <class A>
struct LaneSums : RowSums<A> {
  using RowSums<A>::max, RowSums<A>::sum, RowSums<A>::tilt, RowSums<A>::squares, RowSums<A>::mass;
  using RowSums<A>::move_to;

  // What was summed over other keys, whatever its maximum.
  HW_DEVICE HW_INLINE void merge(LaneSums part) {
    const A top = dev::larger(max, part.max);
    move_to(top);
    part.move_to(top);
    this->add(part);
  }

  // From shares of the lanes that have a row in common to the whole.
  HW_DEVICE HW_INLINE void add_lanes() {
    sum = dev::warp_sum<kLanes>(sum);
    tilt = dev::warp_sum<kLanes>(tilt);
    squares = dev::warp_sum<kLanes>(squares);
    mass = dev::warp_sum<kLanes>(mass);
  }

  HW_DEVICE HW_INLINE void store(A* to) const {
    to[0] = max, to[1] = sum, to[2] = tilt, to[3] = squares, to[4] = mass;
  }
  HW_DEVICE HW_INLINE static LaneSums loaded(const A* from) {
    return {{from[0], from[1], from[2], from[3], from[4]}};
  }
};

// Nobody can see the row whose numbers are at `row`: its gate is 0, or u = 1; or there is none.
template <class Element>
HW_DEVICE HW_INLINE bool is_dead(const ForwardParams& f, int64_t batch, int head, int64_t row) {
  using A = Accum<Element>;
  if (row < 0) return true;
  if (f.identity_mix && f.identity_mix.template as<const A>()(batch, head) == A(1)) return true;
  return f.head_gate && f.head_gate.template as<const A>()(batch, row, head) == A(0);
}

// The end of the row of a slot: statistics, division, mix and gate. Where it lies is found once: in
// lists that takes divisions.
template <class Element, KeySource Source>
class RowEpilogue {
 public:
  using A = Accum<Element>;
  using WorkItem = typename Source::WorkItem;

  HW_DEVICE HW_INLINE RowEpilogue(const ForwardParams& params, const Source& s,
                                  const WorkItem& item, int64_t slot, int64_t token)
      : f(params),
        w(item),
        position(Source::kInOrder ? slot : s.row_position(item, slot, token)),
        at(s.row_result(item, slot, token)),
        exists(!Source::kGathers || token >= 0),
        own(f.identity_mix ? own_key(s, item, slot, token) : 0),
        key_batch(s.key_batch(item)) {}

  // A slot without token may have a result, and a row may have none.
  HW_DEVICE HW_INLINE bool has_result() const { return !Source::kGathers || at >= 0; }

  // Writes statistics if asked to; returns the factor of the row's values.
  HW_DEVICE HW_INLINE A finalize(const RowSums<A>& r, bool writes) const {
    return is_softmax(f.activation) ? finalize_row(r, writes) : normalize(r, writes);
  }

  // o = g ((1 - u) w + u v) for kCount columns of w.
  template <int kCount>
  HW_DEVICE HW_INLINE void write(int column, int width, A (&x)[kCount], bool o_vectors,
                                 bool w_vectors) const {
    const int64_t b = w.at.batch;
    const int available = width - column;
    if (f.w) {
      const Ref<Element, 4> to = f.w.template as<Element>();
      store_columns(to.at(b, at, w.head, column), to.stride[3], w_vectors, available, x);
    }
    if (f.identity_mix) {
      const A u = f.identity_mix.template as<const A>()(b, w.head);
      const Ref<const Element, 4> v = f.v.template as<const Element>();
      const Element* own_value = v.at(key_batch, own, w.key_head, column);
      HW_UNROLL
      for (int c = 0; c < kCount; ++c)
        if (c < available)
          x[c] = (A(1) - u) * x[c] + u * static_cast<A>(own_value[c * v.stride[3]]);
    }
    if (f.head_gate && exists) {
      const A g = f.head_gate.template as<const A>()(b, w.at.q_begin + position, w.head);
      HW_UNROLL
      for (int c = 0; c < kCount; ++c) x[c] *= g;
    }
    const Ref<Element, 4> to = f.o.template as<Element>();
    store_columns(to.at(b, at, w.head, column), to.stride[3], o_vectors, available, x);
  }

 private:
  HW_DEVICE HW_INLINE A finalize_row(const RowSums<A>& r, bool writes) const {
    const RowResult<A> x = finalize_softmax(r, extra_logit<A>(f, w.at.batch, w.head));
    if (writes) {
      put(f.row, x.row);
      put(f.rest, x.rest);
      put(f.entropy, x.entropy);
      put(f.p_max, x.p_max);
      put(f.sq_norm, x.sq_norm);
      put(f.mass, x.mass);
    }
    return x.factor;
  }

  HW_DEVICE HW_INLINE A normalize(const RowSums<A>& r, bool writes) const {
    A n = A(1);
    if (f.normalizer == Normalizer::length)
      n = static_cast<A>(w.mask.visible_keys(position).count());
    if (f.normalizer == Normalizer::sum) {
      n = r.sum;
      if (writes) put(f.row, n);
      if (writes) put(f.rest, A(0));
    }
    return n != A(0) ? A(1) / n : A(0);
  }

  HW_DEVICE HW_INLINE void put(const Ref<void, 3>& to, A value) const {
    if (to) to.template as<A>()(w.at.batch, w.head, at) = value;
  }

  // The token of the key that is where the row is.
  HW_DEVICE HW_INLINE static int64_t own_key(const Source& s, const WorkItem& item, int64_t slot,
                                             int64_t token) {
    if constexpr (Source::kGathers && Source::kInOrder)
      return s.key_token(item, slot, s.key_entry(item, slot));
    return token;
  }

  const ForwardParams& f;
  const WorkItem& w;
  const int64_t position, at;  // at: of its results
  const bool exists;           // there is a token
  const int64_t own, key_batch;
};

}  // namespace hw::softmax::simt
