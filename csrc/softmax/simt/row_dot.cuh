// SPDX-License-Identifier: Apache-2.0
// Inner products of rows in plain CUDA,
//
//   dot_bhi = <x_bth, y_bih>        t = token(b, h, i), the row of x that belongs to row i of y
//
// D of softmax/params.h where x is d_w and y is w. Memory is the bound: eight lanes have a row and
// read it 16 bytes at a time where rows allow it.
#pragma once

#include "softmax/params.h"

#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"
#include "core/gpu/vector.h"
#include "core/math.h"

namespace hw::softmax::simt {

// Rows that belong to each other have the same number.
struct SameRow {
  HW_DEVICE HW_INLINE int64_t operator()(int64_t, int64_t, int64_t i) const { return i; }
};

// Token: token(b, h, i), negative: there is none, and dot is 0.
template <class Element, class Token>
struct RowDotKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = 256, kMinBlocks = 4;  // it waits for memory
  static constexpr int kLanes = 8, kRows = kThreads / kLanes;
  struct Params {
    Token token;
    Ref<const Element, 4> x, y;  // [B, Sx, H, D], [B, S, H, D]
    Ref<A, 3> dot;               // [B, H, S]
    int64_t blocks;              // of the rows of a batch entry
    bool vectors;                // rows can be read 16 bytes at a time
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t b = dev::block_index_x() / p.blocks, heads = p.y.size[2];
    const int64_t index = dev::block_index_x() % p.blocks * kRows + dev::thread_index() / kLanes;
    const int64_t i = index / heads, head = index % heads;
    A sum = 0;
    if (i < p.y.size[1]) {
      const int64_t token = p.token(b, head, i);
      if (token >= 0) sum = share(p, p.x.at(b, token, head), p.y.at(b, i, head));
    }
    sum = dev::warp_sum<kLanes>(sum);
    if (i < p.y.size[1] && dev::lane() % kLanes == 0) p.dot(b, head, i) = sum;
  }

 private:
  // What the lane adds to <x, y>, of x and y [D].
  HW_DEVICE HW_INLINE static A share(const Params& p, const Element* x, const Element* y) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(Element));
    const int64_t columns = p.y.size[3], lane = dev::lane() % kLanes;
    A sum = 0;
    if (p.vectors) {
      HW_UNROLL_BY(2)
      for (int64_t c = lane * kVector; c < columns; c += kLanes * kVector) {
        const auto left = load_vector<kVector>(x + c), right = load_vector<kVector>(y + c);
        HW_UNROLL
        for (int n = 0; n < kVector; ++n)
          sum += static_cast<A>(left.v[n]) * static_cast<A>(right.v[n]);
      }
    } else {
      HW_UNROLL_BY(2)
      for (int64_t c = lane; c < columns; c += kLanes)
        sum += static_cast<A>(x[c * p.x.stride[3]]) * static_cast<A>(y[c * p.y.stride[3]]);
    }
    return sum;
  }
};

// x [B, Sx, H, D], y [B, S, H, D], dot [B, H, S].
template <class Element, class Token>
void launch_row_dot(const Token& token, const Ref<const void, 4>& x, const Ref<const void, 4>& y,
                    const Ref<Accum<Element>, 3>& dot, const Context& context) {
  using Kernel = RowDotKernel<Element, Token>;
  typename Kernel::Params p{token, x.as<const Element>(), y.as<const Element>(), dot, 0, false};
  p.blocks = ceil_div<int64_t>(p.y.size[1] * p.y.size[2], Kernel::kRows);
  p.vectors = has_vectors(p.x) && has_vectors(p.y);
  launch<Kernel>({p.y.size[0] * p.blocks, 1, 1}, 0, context, p);
}

template <class Element>
void row_dot(const RowDotParams& p, const Call& call) {
  launch_row_dot<Element>(SameRow{}, p.x, p.y, p.dot.as<Accum<Element>>(), call.context);
}

}  // namespace hw::softmax::simt
