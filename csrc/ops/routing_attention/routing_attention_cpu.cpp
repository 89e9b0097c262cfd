// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on the CPU; the mathematics is in routing_attention.h.
//
//   _cpu_source.h   what a row and a key of a list are to the engine
//   _cpu_group.h    a group: its tokens by position, what each row sees, its keys side by side
//   _cpu_lists.h    groups with lists of keys: forward, backward
//   _cpu_mean.h     slots to tokens
//   _cpu_rows.h     all keys: rows of a list
#include "ops/routing_attention/routing_attention_cpu_lists.h"
#include "ops/routing_attention/routing_attention_cpu_mean.h"
#include "ops/routing_attention/routing_attention_cpu_rows.h"

#include "core/host/registry.h"

namespace hw::routing_attention {
namespace {

template <class T>
void forward(const ForwardParams& p, const Call& call) {
  if (!p.keys) return RowsForward<T>(p, call.context.num_threads).run();
  GroupsForward<T>(p, call.context.num_threads).run();
  if (p.by_slot) Mean<T>(p, call.context.num_threads).run();
}

template <class T>
void backward(const BackwardParams& p, const Call& call) {
  if (!p.keys) return RowsBackward<T>(p, call.context.num_threads).run();
  GroupsBackward<T>(p, call.context.num_threads).run();
}

}  // namespace
}  // namespace hw::routing_attention

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {
    {entry<&routing_attention::forward<T>>, entry<&routing_attention::backward<T>>}};

}  // namespace
}  // namespace hw
