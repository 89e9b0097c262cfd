// SPDX-License-Identifier: Apache-2.0
// Softmax-type attention on the CPU; the mathematics is in softmax/params.h. In softmax/cpu/:
//
//   tile.h          scores of 64 keys x 64 queries, and weights replayed from row statistics
//   forward.h       rows with a running softmax
//   along_keys.h    the same for a few rows, or for a few keys
//   row_sums.h      what is kept of a row; outputs.h what becomes of it
//   backward.h      gradients; walk.h those of one block of queries
//   columns.h       columns given the row statistics; single weights
//   row_dot.h       inner products of rows
//   sorted_source.h what is asked of where rows and keys come from
//   operands.h      blocks of rows, and rows of a tensor as operands of products; packed_keys.h
//                   those that tasks share
#include "softmax/cpu/backward.h"
#include "softmax/cpu/columns.h"
#include "softmax/cpu/forward.h"
#include "softmax/cpu/row_dot.h"

#include "core/host/registry.h"

namespace hw::attention {
namespace {

using namespace softmax;

template <class T>
void forward(const ForwardParams& p, const Call& call) {
  Forward<T>(p, call.context.num_threads).run();
}

template <class T>
void backward(const BackwardParams& p, const Call& call) {
  Backward<T>(p, call.context.num_threads).run();
  if (shares_bias(p)) SharedBias<T>(p, call.context.num_threads).run();
}

template <class T>
void columns(const ColumnsParams& p, const Call& call) {
  Columns<T>(p, call.context.num_threads).run();
}

template <class T>
void probs(const ProbsParams& p, const Call& call) {
  Probs<T>(p, call.context.num_threads).run();
}

template <class T>
void row_dot(const RowDotParams& p, const Call& call) {
  RowDot<T>(p, call.context.num_threads).run();
}

}  // namespace
}  // namespace hw::attention

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{entry<&attention::forward<T>>, entry<&attention::backward<T>>,
                                   entry<&attention::columns<T>>, entry<&attention::probs<T>>,
                                   entry<&attention::row_dot<T>>}};

}  // namespace
}  // namespace hw
