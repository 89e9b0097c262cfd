// SPDX-License-Identifier: Apache-2.0
// Softmax-type attention on the CPU; the mathematics is in attention.h.
//
//   _cpu_tile.h       scores of 64 keys x 64 queries, and weights replayed from row statistics
//   _cpu_forward.h    rows with a running softmax; _cpu_row_sums.h what is kept of a row,
//                     _cpu_outputs.h what becomes of it;
//                     _cpu_along_keys.h the same for a few rows, or for a few keys
//   _cpu_backward.h   gradients; _cpu_walk.h those of one block of queries
//   _cpu_columns.h    columns given the row statistics; single weights
#include "ops/attention/attention_cpu_backward.h"
#include "ops/attention/attention_cpu_columns.h"
#include "ops/attention/attention_cpu_forward.h"

#include "core/registry.h"

namespace hw::attention {
namespace {

template <class T>
void forward(const Call& call) {
  Forward<T>(call).run();
}

template <class T>
void backward(const Call& call) {
  const BackwardParams p = backward_params(call);
  Backward<T>(p, call.context.num_threads).run();
  if (shares_bias(p)) SharedBias<T>(p, call.context.num_threads).run();
}

template <class T>
void columns(const Call& call) {
  Columns<T>(call).run();
}

template <class T>
void probs(const Call& call) {
  Probs<T>(call).run();
}

}  // namespace
}  // namespace hw::attention

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{&attention::forward<T>, &attention::backward<T>,
                                   &attention::columns<T>, &attention::probs<T>}};

}  // namespace
}  // namespace hw
