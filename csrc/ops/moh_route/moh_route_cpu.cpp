// SPDX-License-Identifier: Apache-2.0
// Rows of mixture-of-heads attention on the CPU. A task has 8 heads of a batch entry, whose gates
// lie side by side, and walks the tokens: each is written as the next row of every head, and stays
// where the head was chosen.
#include "ops/moh_route/moh_route.h"

#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/host/registry.h"
#include "core/math.h"

namespace hw::moh_route {
namespace {

constexpr int64_t kHeads = 8;

template <class T>
void list_rows(const ForwardParams& p, int64_t batch, int64_t first) {
  const auto gate = p.gate.as<const T>();
  const int64_t heads = std::min(kHeads, p.heads() - first), stride = p.rows.stride[2];
  int64_t* next[kHeads];
  for (int64_t h = 0; h < heads; ++h) next[h] = p.rows.at(batch, first + h, 0);
  for (int64_t t = 0; t < p.tokens(); ++t) {
    const T* of_token = gate.at(batch, t, first);
    for (int64_t h = 0; h < heads; ++h) {
      *next[h] = t;
      next[h] += of_token[h * gate.stride[2]] != T(0) ? stride : 0;
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    int64_t* const end = p.rows.at(batch, first + h, 0) + p.tokens() * stride;
    for (int64_t* row = next[h]; row != end; row += stride) *row = -1;
  }
}

template <class T>
void forward(const ForwardParams& p, const Call& call) {
  const int64_t tasks = ceil_div(p.heads(), kHeads);
  if (p.tokens() == 0) return;
  parallel_tasks(p.batch() * tasks, call.context.num_threads,
                 [&](int64_t i) { list_rows<T>(p, i / tasks, i % tasks * kHeads); });
}

}  // namespace
}  // namespace hw::moh_route

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{entry<&moh_route::forward<T>>}};

}  // namespace
}  // namespace hw
