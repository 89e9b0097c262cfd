// SPDX-License-Identifier: Apache-2.0
// Softmax-type attention in plain CUDA: every dtype, every D and Dv, every option, sm_75 and later.
// The mathematics is in softmax/params.h. In softmax/simt/:
//
//   layout.h       tile sizes, cut into blocks, workspace
//   tile.cuh       positions, loading, the two products
//   replay.h       weights from scores and row statistics
//   loop.cuh       the walk over tiles, scores and back
//   rows.cuh       sums of a row and its end         forward.cuh   loop R, merge of spans
//   gradient.cuh   gradients of a tile               backward.cuh  loops R2 and C
//   columns.cuh    loop C: sums, maxima, P^T x; single pairs
//   row_dot.cuh    inner products of rows
//
// Compile-time choices: the dtype; whether rows or keys are owned, which decides what all indices
// mean; 16 or 64 rows forward, since decoding would compute 64 for one; one or two slices of d_k
// and d_v, since both together cost 64 registers. That is nine kernels. All options are run-time
// flags, the same for all threads, looked at per score and not in the products, which are D times
// as long.
#pragma once

#include "softmax/simt/backward.cuh"
#include "softmax/simt/columns.cuh"
#include "softmax/simt/forward.cuh"
#include "softmax/simt/row_dot.cuh"

namespace hw::attention {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& forward = softmax::simt::forward<Element>;
  static constexpr auto& backward = softmax::simt::backward<Element>;
  static constexpr auto& columns = softmax::simt::columns<Element>;
  static constexpr auto& probs = softmax::simt::probs<Element>;
  static constexpr auto& row_dot = softmax::simt::row_dot<Element>;
};

}  // namespace hw::attention
