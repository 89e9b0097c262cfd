// SPDX-License-Identifier: Apache-2.0
// Attention inside the windows of an image on the CPU; the mathematics is in window_attention.h.
//
//   _cpu_source.h     windows by their shapes, what a slot is to the engine, the bias of a shape
//   Forward           a task: a block of rows of a window, of a query head
//   Backward          a task: a part of the windows of a key head, one after the other, which adds
//                     up a gradient of the table of its own
#include <algorithm>
#include <optional>

#include "ops/window_attention/window_attention_cpu_source.h"
#include "softmax/cpu/block_gradients.h"
#include "softmax/cpu/forward.h"

#include "core/host/registry.h"

namespace hw::window_attention {
namespace {

// Windows of a part, where there are enough: making a table of sums costs as much as making them.
constexpr int64_t kFewWindows = 8;

template <class T>
class Forward {
  using Pass = softmax::Forward<T, WindowSource>;

 public:
  Forward(const ForwardParams& p, int threads)
      : p_(p), threads_(threads), shapes_(p), heads_(p.query_heads()) {}

  void run() {
    const int64_t blocks = ceil_div<int64_t>(p_.max_q, softmax::kRows);
    parallel_walks(p_.batch() * shapes_.windows() * heads_ * blocks, heads_ * blocks, threads_,
                   [&](auto next) {
                     std::optional<Pass> passes[Shapes<T>::kMost];
                     for (int64_t task = next(); task >= 0; task = next())
                       attend(task / blocks, task % blocks, passes);
                   });
  }

 private:
  void attend(int64_t window_head, int64_t block, std::optional<Pass> (&passes)[4]) const {
    const int64_t n = window_head / heads_;
    const int shape = shapes_.shape_of(n);
    const int64_t slots = shapes_.slots(shape);
    const Range rows{block * softmax::kRows, std::min((block + 1) * softmax::kRows, slots)};
    if (rows.empty()) return;
    const WindowSource source = shapes_.source();
    const auto item = source.work_item(p_, n, static_cast<int>(window_head % heads_));
    if (!passes[shape]) {
      softmax::ForwardParams f = p_;
      f.bias = shapes_.bias(shape);
      passes[shape].emplace(f, threads_, shapes_.windows(), softmax::FullScore{});
    }
    passes[shape]->run_block({&source, item, rows});
  }

  const ForwardParams& p_;
  const int threads_;
  const Shapes<T> shapes_;
  const int64_t heads_;
};

template <class T>
class Backward {
  using A = Accum<T>;
  using Block = softmax::Block<WindowSource>;
  using Gradients = softmax::BlockGradients<T, WindowSource>;

 public:
  Backward(const BackwardParams& p, int threads)
      : p_(p),
        threads_(threads),
        shapes_(p),
        source_(shapes_.source()),
        heads_(p.key_heads()),
        group_(p.group()),
        windows_(p.batch() * shapes_.windows()),
        parts_(std::max(std::min(windows_, kFewWindows), windows_ / kFewWindows)),
        padded_(round_up(p.dim(), kLanes<A>)),
        padded_values_(round_up(p.value_dim(), kLanes<A>)) {}

  void run() {
    if (p_.d_bias_table) tables_.reserve(parts_ * table_size() * bytes_of_sum());
    parallel_tasks(parts_ * heads_, threads_,
                   [&](int64_t task) { work(task / heads_, static_cast<int>(task % heads_)); });
    if (p_.d_bias_table) add_tables();
  }

 private:
  static constexpr int64_t bytes_of_sum() { return static_cast<int64_t>(sizeof(A)); }
  int64_t table_size() const { return p_.query_heads() * p_.bins; }
  A* table_of(int64_t part, int64_t head) const {  // [M]
    return reinterpret_cast<A*>(tables_.data()) + part * table_size() + head * p_.bins;
  }

  // A part of the windows, shape by shape, for the query heads of a key head.
  void work(int64_t part, int key_head) {
    const Range all{windows_ * part / parts_, windows_ * (part + 1) / parts_};
    if (p_.d_bias_table) std::fill_n(table_of(part, key_head * group_), group_ * p_.bins, A(0));
    for (int shape = 0; shape < Shapes<T>::kMost; ++shape) {
      int64_t n = shapes_.next(all.begin, shape);
      if (n >= all.end) continue;
      const int64_t slots = shapes_.slots(shape);
      Buffer memory;
      softmax::BackwardParams b = engine_params(shape, slots, key_head, memory);
      Scratch& scratch = Scratch::of_thread();
      scratch.reset(Gradients::bytes(b) + Scratch::bytes_of<A>(slots * (padded_ + padded_values_)));
      Gradients gradients(b);
      A* const d_k = scratch.take<A>(slots * (padded_ + padded_values_));
      const softmax::KeySums<A> sums{d_k, d_k + slots * padded_, padded_, padded_values_, false};
      for (; n < all.end; n = shapes_.next(n + 1, shape)) add_window(n, key_head, sums, gradients);
      if (b.d_bias) fold(b.d_bias, shape, part, key_head);
    }
  }

  // The engine's parameters, with sums of the bias of a shape in `memory`: [group, n, n],
  // transposed, as tiles of the engine are; a table has the same bin both ways.
  softmax::BackwardParams engine_params(int shape, int64_t slots, int key_head, Buffer& memory) {
    softmax::BackwardParams b = p_;
    b.bias = shapes_.bias(shape);
    if (!p_.d_bias_table) return b;
    const int64_t square = slots * slots;
    memory.reserve(group_ * square * bytes_of_sum());
    A* const sums = reinterpret_cast<A*>(memory.data());
    std::fill_n(sums, group_ * square, A(0));
    b.d_bias = {sums - key_head * group_ * square,
                {1, p_.query_heads(), slots, slots},
                {0, square, 1, slots}};
    return b;
  }

  void add_window(int64_t n, int key_head, const softmax::KeySums<A>& sums, Gradients& gradients) {
    Block block{&source_, source_.work_item(p_, n, key_head * static_cast<int>(group_)), {}};
    const int64_t slots = block.row_count();
    std::fill_n(sums.d_k, slots * (padded_ + padded_values_), A(0));
    for (int h = 0; h < group_; ++h) {
      block.item.head = key_head * static_cast<int>(group_) + h;
      for (int64_t i = 0; i * softmax::kRows < slots; ++i) {
        block.rows = softmax::rows_of_block<WindowSource>(i, slots);
        gradients.add(block, {0, slots}, sums);
        write_queries(block, gradients);
      }
    }
    write_keys(block, sums);
  }

  void write_queries(const Block& block, Gradients& gradients) const {
    const Ref<T, 4> d_q = p_.d_q.template as<T>();
    for (int i = 0; i < block.count(); ++i) {
      A* sum = gradients.d_q() + i * padded_;
      for (int d = 0; d < p_.dim(); ++d) sum[d] *= gradients.factor(i);
      narrow(d_q.at(block.batch(), block.token(i), block.head()), sum, p_.dim(), d_q.stride[3]);
    }
  }

  void write_keys(const Block& block, const softmax::KeySums<A>& sums) const {
    const Ref<T, 4> d_k = p_.d_k.template as<T>(), d_v = p_.d_v.template as<T>();
    const int head = block.item.key_head;
    for (int64_t j = 0; j < block.key_count(); ++j) {
      const int64_t token = block.key_token(j);
      narrow(d_k.at(block.batch(), token, head), sums.d_k + j * padded_, p_.dim(), d_k.stride[3]);
      narrow(d_v.at(block.batch(), token, head), sums.d_v + j * padded_values_, p_.value_dim(),
             d_v.stride[3]);
    }
  }

  // Adds the sums of the bias of a shape to the part's table.
  void fold(const Ref<void, 4>& d_bias, int shape, int64_t part, int key_head) const {
    for (int64_t head = key_head * group_; head < (key_head + 1) * group_; ++head) {
      A* const table = table_of(part, head);
      const A* from = d_bias.as<const A>().at(0, head);
      shapes_.each_pair(shape, [&](int64_t bin) { table[bin] += *from++; });
    }
  }

  void add_tables() const {
    const Ref<A, 2> to = p_.d_bias_table.template as<A>();
    for (int64_t head = 0; head < p_.query_heads(); ++head)
      for (int64_t b = 0; b < p_.bins; ++b) {
        A sum = 0;
        for (int64_t part = 0; part < parts_; ++part) sum += table_of(part, head)[b];
        to(head, b) = sum;
      }
  }

  const BackwardParams& p_;
  const int threads_;
  const Shapes<T> shapes_;
  const WindowSource source_;
  const int64_t heads_, group_;  // key heads; query heads that share one
  const int64_t windows_, parts_;
  const int64_t padded_, padded_values_;
  Buffer tables_;  // [parts, Hq, M]
};

template <class T>
void forward(const ForwardParams& p, const Call& call) {
  Forward<T>(p, call.context.num_threads).run();
}

template <class T>
void backward(const BackwardParams& p, const Call& call) {
  Backward<T>(p, call.context.num_threads).run();
}

}  // namespace
}  // namespace hw::window_attention

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {
    {entry<&window_attention::forward<T>>, entry<&window_attention::backward<T>>}};

}  // namespace
}  // namespace hw
