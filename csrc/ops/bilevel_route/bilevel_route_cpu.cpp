// SPDX-License-Identifier: Apache-2.0
// Routing between regions on the CPU.
//
//   means    a task: a row of regions; the channels of a token are summed as one row, and an image
//            is read from front to back
//   scores   a task: the graph of a batch entry (and head); A = mq mk^T, a small matrix product
//            with mk transposed beforehand
#include "ops/bilevel_route/bilevel_route.h"

#include <algorithm>

#include "core/cpu/matmul.h"
#include "core/cpu/parallel.h"
#include "core/cpu/transpose.h"
#include "core/host/registry.h"

namespace hw::bilevel_route {
namespace {

template <class T>
class Means {
 public:
  using A = Accum<T>;

  Means(const MeansParams& p, int threads)
      : p_(p),
        x_(p_.x.as<const T>()),
        threads_(threads),
        heads_(p_.m.size[2]),
        width_(p_.m.size[3]),
        joined_(x_.stride[4] == 1 && (heads_ == 1 || x_.stride[3] == width_)) {}

  void run() const {
    const int64_t rows = ceil_div(p_.grid.rows_of_image, p_.grid.height);
    parallel_tasks(p_.x.size[0] * rows, threads_,
                   [&](int64_t task) { work(task / rows, task % rows * p_.grid.columns); });
  }

 private:
  // The regions of a row, from `first` on.
  HW_NOINLINE void work(int64_t batch, int64_t first) const {
    const Ref<A, 4> m = p_.m.template as<A>();
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Scratch::bytes_of<A>(p_.channels()));
    A* token = scratch.take<A>(p_.channels());
    std::fill_n(m.at(batch, first), p_.grid.columns * p_.channels(), A(0));
    const int64_t top = p_.part(first).y, bottom = p_.part(first).y_end;
    for (int64_t y = top; y < bottom; ++y)
      for (int64_t c = 0; c < p_.grid.columns; ++c) {
        const MeansParams::Part part = p_.part(first + c);
        for (int64_t x = part.x; x < part.x_end; ++x)
          add(m.at(batch, first + c), channels_of(batch, y, x, token));
      }
    for (int64_t c = 0; c < p_.grid.columns; ++c)
      divide(m.at(batch, first + c), p_.part(first + c).count());
  }

  // The channels of a token in a row, where they lie if that will do.
  HW_NOINLINE const A* channels_of(int64_t batch, int64_t y, int64_t x, A* buffer) const {
    if constexpr (std::is_same_v<T, A>)
      if (joined_) return x_.at(batch, y, x);
    if (joined_) {
      widen(buffer, x_.at(batch, y, x), p_.channels());
      return buffer;
    }
    for (int64_t h = 0; h < heads_; ++h)
      widen(buffer + h * width_, x_.at(batch, y, x, h), width_, x_.stride[4]);
    return buffer;
  }

  HW_NOINLINE void add(A* sum, const A* row) const {
    int64_t d = 0;
    for (; d + kLanes<A> <= p_.channels(); d += kLanes<A>)
      store(sum + d, load(sum + d) + load(row + d));
    for (; d < p_.channels(); ++d) sum[d] += row[d];
  }

  HW_NOINLINE void divide(A* sum, int64_t count) const {
    for (int64_t d = 0; d < p_.channels(); ++d) sum[d] /= static_cast<A>(count);
  }

  const MeansParams p_;
  const Ref<const T, 5> x_;
  const int threads_;
  const int64_t heads_, width_;
  const bool joined_;  // heads follow each other in memory
};

template <class A>
class Scores {
 public:
  Scores(const ScoresParams& p, int threads) : p_(p), threads_(threads) {}

  void run() const {
    const int64_t graphs = p_.a.size[1];
    parallel_tasks(p_.q.size[0] * graphs, threads_,
                   [&](int64_t task) { work(task / graphs, task % graphs); });
  }

 private:
  HW_NOINLINE void work(int64_t batch, int64_t graph) const {
    const Ref<const A, 4> q = p_.q.template as<const A>(), k = p_.k.template as<const A>();
    const Ref<A, 4> a = p_.a.template as<A>();
    const int rows = static_cast<int>(p_.a.size[2]), columns = static_cast<int>(p_.a.size[3]);
    const int width = static_cast<int>(q.size[3]), padded = round_up(columns, kLanes<A>);
    Scratch& scratch = Scratch::of_thread();
    const int64_t of_k = int64_t{padded} * width, of_sums = int64_t{rows} * padded;
    scratch.reset(Scratch::bytes_of<A>(of_k) + Scratch::bytes_of<A>(of_sums));
    A* k_columns = scratch.take<A>(of_k);  // [D, padded]
    A* sums = scratch.take<A>(of_sums);    // [R, padded]
    std::fill_n(sums, of_sums, A(0));
    for (int64_t h = p_.first_head(graph); h < p_.end_head(graph); ++h) {
      hw::transpose(k.at(batch, 0, h / p_.group()), k.stride[1], columns, width, k_columns, padded);
      clear_columns(k_columns, padded, width, columns, padded);
      const Operand<A> q_rows{q.at(batch, 0, h), q.stride[1], q.stride[3]};
      multiply<true>(rows, padded, width, q_rows, static_cast<const A*>(k_columns), padded, sums,
                     padded);
    }
    for (int i = 0; i < rows; ++i)
      narrow(a.at(batch, graph, i), sums + int64_t{i} * padded, columns, a.stride[3]);
  }

  const ScoresParams p_;
  const int threads_;
};

template <class T>
void means(const MeansParams& p, const Call& call) {
  Means<T>(p, call.context.num_threads).run();
}

// Means are of the accumulation type: half-precision instances never see them.
template <class T>
void scores(const ScoresParams& p, const Call& call) {
  Scores<Accum<T>>(p, call.context.num_threads).run();
}

}  // namespace
}  // namespace hw::bilevel_route

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {
    {entry<&bilevel_route::means<T>>, entry<&bilevel_route::scores<T>>}};

}  // namespace
}  // namespace hw
