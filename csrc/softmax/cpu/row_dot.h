// SPDX-License-Identifier: Apache-2.0
// Inner products of rows on the CPU: dot_bhi = <x_bih, y_bih>.
#pragma once

#include "softmax/params.h"

#include "core/cpu/parallel.h"
#include "core/cpu/transpose.h"

namespace hw::softmax {
namespace {

template <class T>
class RowDot {
 public:
  using A = Accum<T>;

  RowDot(const RowDotParams& p, int threads)
      : x_(p.x.as<const T>()), y_(p.y.as<const T>()), dot_(p.dot.as<A>()), threads_(threads) {}

  void run() {
    const int64_t blocks = ceil_div<int64_t>(y_.size[1], kTokens);
    parallel_tasks(y_.size[0] * blocks, threads_, [&](int64_t task) {
      const int64_t begin = task % blocks * kTokens;
      work(task / blocks, begin, std::min(begin + kTokens, y_.size[1]));
    });
  }

 private:
  static constexpr int64_t kTokens = 64;  // of a task

  void work(int64_t batch, int64_t begin, int64_t end) {
    const int64_t width = y_.size[3];
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(2 * Scratch::bytes_of<A>(width));
    A *x = scratch.take<A>(width), *y = scratch.take<A>(width);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t head = 0; head < y_.size[2]; ++head)
        dot_(batch, head, i) =
            inner_product(row(x_, batch, i, head, x), row(y_, batch, i, head, y), width);
  }

  // A row [D] in the accumulation type: where it is, or widened into a buffer.
  static const A* row(const Ref<const T, 4>& of, int64_t batch, int64_t i, int64_t head,
                      A* buffer) {
    const T* from = of.at(batch, i, head);
    if constexpr (std::is_same_v<T, A>)
      if (of.stride[3] == 1) return from;
    widen(buffer, from, of.size[3], of.stride[3]);
    return buffer;
  }

  const Ref<const T, 4> x_, y_;  // [B, S, H, D]
  const Ref<A, 3> dot_;          // [B, H, S]
  const int threads_;
};

}  // namespace
}  // namespace hw::softmax
