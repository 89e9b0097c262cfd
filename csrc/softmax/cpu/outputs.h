// SPDX-License-Identifier: Apache-2.0
// The end of a row in the forward pass of attention on the CPU: o = g ((1 - u) w + u v), and w.
#pragma once

#include <algorithm>

#include "softmax/cpu/operands.h"

namespace hw::softmax {
namespace {

template <class T>
class Outputs {
 public:
  using A = Accum<T>;
  using V = Vec<A>;

  explicit Outputs(const ForwardParams& p)
      : p_(p), v_(p.v.as<const T>()), value_dim_(p.value_dim()) {}

  // Whether o = g w, and rows of both are whole vectors.
  bool writes_vectors() const {
    return std::is_same_v<T, A> && value_dim_ % kLanes<A> == 0 && !p_.identity_mix &&
           p_.o.stride[3] == 1 && (!p_.w || p_.w.stride[3] == 1);
  }

  // w [rows, Dv] times factors of the rows.
  template <class Source>
  HW_NOINLINE void write_vectors(const Block<Source>& block, int64_t batch, const A* factor,
                                 const A* values) const {
    const Ref<A, 2> o = rows_of_head(p_.o.template as<A>(), batch, block.head());
    const Ref<A, 2> w =
        p_.w ? rows_of_head(p_.w.template as<A>(), batch, block.head()) : Ref<A, 2>{};
    const auto gate = p_.head_gate.template as<const A>();
    const int width = value_dim_;
    for (int i = 0; i < block.count(); ++i) {
      const int64_t row = block.result(i);
      const A g = gate ? gate(batch, block.number(i), block.head()) : A(1);
      A *to_o = o.at(row), *to_w = w ? w.at(row) : nullptr;
      for (int d = 0; d < width; d += kLanes<A>) {
        const V x = load(values + i * width + d) * factor[i];
        if (to_w != nullptr) store(to_w + d, x);
        store(to_o + d, x * g);
      }
    }
  }

  // The rows of w^T times their factors, transposed on the way to w and o.
  template <class Source>
  HW_NOINLINE void write_rows(const Block<Source>& block, int64_t batch, const A* factor,
                              const A* values) const {
    constexpr int kSide = kLanes<A>;
    const Ref<A, 4> o = p_.o.template as<A>(), w = p_.w.template as<A>();
    const auto gate = p_.head_gate.template as<const A>();
    for (int l = 0; l < block.count(); l += kSide) {
      const int rows = std::min(kSide, block.count() - l);
      A *to_o[kSide], *to_w[kSide];
      A gates[kSide];
      for (int r = 0; r < rows; ++r) {
        const int64_t row = block.result(l + r);
        to_o[r] = o.at(batch, row, block.head());
        to_w[r] = w ? w.at(batch, row, block.head()) : nullptr;
        gates[r] = gate ? gate(batch, block.number(l + r), block.head()) : A(1);
      }
      const V own = load(factor + l);
      for (int d = 0; d < value_dim_; d += kSide) {
        V square[kSide];
        HW_UNROLL for (int r = 0; r < kSide; ++r) {
          square[r] = load(values + (d + r) * kRows + l) * own;
        }
        transpose_square<A>(square);
        HW_UNROLL for (int r = 0; r < kSide; ++r) {
          if (r < rows && w) store(to_w[r] + d, square[r]);
          if (r < rows) store(to_o[r] + d, square[r] * gates[r]);
        }
      }
    }
  }

  // o = g ((1 - u) w + u v)
  template <class Source>
  HW_NOINLINE void write_row(const Block<Source>& block, int64_t batch, int i, A* w,
                             A* v_row) const {
    const int64_t row = block.result(i);
    const int h = block.head();
    if (p_.w) {
      const Ref<T, 4> to = p_.w.template as<T>();
      narrow(to.at(batch, row, h), w, value_dim_, to.stride[3]);
    }
    if (p_.identity_mix) {
      const A u = p_.identity_mix.template as<const A>()(batch, h);
      widen(v_row, v_.at(batch, block.token(i), block.item.key_head), value_dim_, v_.stride[3]);
      for (int d = 0; d < value_dim_; ++d) w[d] = (1 - u) * w[d] + u * v_row[d];
    }
    if (p_.head_gate) {
      const A g = p_.head_gate.template as<const A>()(batch, block.number(i), h);
      for (int d = 0; d < value_dim_; ++d) w[d] *= g;
    }
    const Ref<T, 4> o = p_.o.template as<T>();
    narrow(o.at(batch, row, h), w, value_dim_, o.stride[3]);
  }

 private:
  const ForwardParams& p_;
  const Ref<const T, 4> v_;
  const int value_dim_;
};

}  // namespace
}  // namespace hw::softmax
