// SPDX-License-Identifier: Apache-2.0
// Columns of the attention map on the CPU, given the row statistics: loop C, and single weights.
//
// A task of Columns owns 256 keys of one head and walks the blocks of queries that see them, so
// that queries are packed once per task and sums have one owner: no atomics, one order of
// additions.
#pragma once

#include "softmax/cpu/tile.h"

namespace hw::softmax {
namespace {

constexpr int kColumnKeys = 4 * kKeys;  // keys of a task

template <class T>
class Columns {
 public:
  using Block = softmax::Block<DenseSource>;
  using A = Accum<T>;
  using E = Multiplied<T>;
  using V = Vec<A>;

  Columns(const ColumnsParams& p, int threads)
      : p_(p),
        threads_(threads),
        x_(p_.x.as<const T>()),
        width_(x_ ? static_cast<int>(x_.size[3]) : 0),
        padded_(round_up(width_, kLanes<A>)),
        groups_(ceil_div<int64_t>(p_.max_k, kColumnKeys)) {}

  void run() {
    const int64_t heads = p_.query_heads();
    parallel_tasks(p_.sequences() * heads * groups_, threads_, [&](int64_t task) {
      const WorkItem w = DenseSource::work_item(p_, task / groups_ / heads,
                                                static_cast<int>(task / groups_ % heads));
      const int64_t begin = task % groups_ * kColumnKeys;
      const Range keys{begin, std::min<int64_t>(begin + kColumnKeys, w.at.k_count)};
      if (!keys.empty()) work(w, keys);
    });
  }

 private:
  // Sums of a task's keys: y [keys, padded_], sums and maxima [keys, lanes].
  struct Sums {
    A *y, *sum, *max;
  };

  void work(const WorkItem& w, const Range& keys) {
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Tile<T>::bytes(p_) + Scratch::bytes_of<A>(kTile) +
                  Scratch::bytes_of<E>(operand_size<T>(kRows, width_)) +
                  Scratch::bytes_of<A>(kColumnKeys * padded_) +
                  2 * Scratch::bytes_of<A>(kColumnKeys * kLanes<A>));
    Tile<T> tile(p_);
    Replay<T> replay(p_, p_.row, p_.rest);
    A* s = scratch.take<A>(kTile);
    E* buffer = scratch.take<E>(operand_size<T>(kRows, width_));
    const Sums sums{scratch.take<A>(kColumnKeys * padded_),
                    scratch.take<A>(kColumnKeys * kLanes<A>),
                    scratch.take<A>(kColumnKeys * kLanes<A>)};
    std::fill_n(sums.y, kColumnKeys * padded_, A(0));
    for (A* to : {sums.sum, sums.max}) std::fill_n(to, kColumnKeys * kLanes<A>, A(0));
    const DenseSource source;
    const Range rows = w.mask.rows_of(keys);
    for (int64_t i = rows.begin / kRows * kRows; i < rows.end; i += kRows) {
      const Block block{&source, w, {i, std::min<int64_t>(i + kRows, w.at.q_count)}};
      tile.load_queries(block);
      replay.load_rows(block, tile.width());
      add_block(block, keys, tile, replay, s, buffer, sums);
    }
    write(w.at, w.head, keys, sums);
  }

  HW_NOINLINE void add_block(const Block& block, const Range& keys, Tile<T>& tile,
                             const Replay<T>& replay, A* s, E* buffer, const Sums& sums) {
    alignas(64) A weight[kRows] = {};
    for (int i = 0; i < block.count(); ++i) weight[i] = weight_of(block, i);
    Panel<E> x{};
    if (x_)
      x = over_rows(
          Rows<T>{x_, block.batch(), block.token(0), block.count(), block.head(), buffer});
    for (int64_t j = keys.begin; j < keys.end; j += kKeys) {
      const Range some{j, std::min<int64_t>(j + kKeys, keys.end)};
      if (!tile.move_to(some)) continue;
      tile.products(some, s);
      tile.scores(some, s, s);
      replay.weights(some.count(), tile.lanes(), s);
      const int64_t at = j - keys.begin;
      if (p_.sum) add_sums(some, tile.lanes(), s, weight, sums.sum + at * kLanes<A>);
      if (p_.max) raise(some, tile.lanes().begin, tile.rows(), s, sums.max + at * kLanes<A>);
      const int n = static_cast<int>(some.count());
      if (x_)
        multiply<true>(n, padded_, steps<E>(tile.rows()), tile.p_over_rows(s, n),
                       x.data + tile.lanes().begin / kDepth<E> * x.ld, x.ld, sums.y + at * padded_,
                       padded_);
    }
  }

  A weight_of(const Block& block, int i) const {
    if (!p_.row_weight) return 1;
    return p_.row_weight.template as<const A>()(block.batch(), block.head(), block.number(i));
  }

  HW_NOINLINE static void add_sums(const Range& keys, const Lanes& lanes, const A* p,
                                   const A* weight, A* sum) {
    for (int64_t j = 0; j < keys.count(); ++j) {
      V total = load(sum + j * kLanes<A>);
      for (int l = lanes.begin; l < lanes.end; l += kLanes<A>)
        total = fma(load(p + j * kRows + l), load(weight + l), total);
      store(sum + j * kLanes<A>, total);
    }
  }

  // NaN is kept, whether it comes first or last.
  HW_NOINLINE static void raise(const Range& keys, int first, int rows, const A* p, A* max) {
    for (int64_t j = 0; j < keys.count(); ++j)
      for (int i = first; i < first + rows; ++i) {
        A& top = max[j * kLanes<A>];
        const A x = p[j * kRows + i];
        if (x > top || x != x) top = x;
      }
  }

  HW_NOINLINE void write(const Sequence& at, int head, const Range& keys, const Sums& sums) {
    for (int64_t j = 0; j < keys.count(); ++j) {
      const int64_t key = at.k_begin + keys.begin + j;
      if (p_.sum)
        p_.sum.template as<A>()(at.batch, head, key) = sum<A>(load(sums.sum + j * kLanes<A>));
      if (p_.max) p_.max.template as<A>()(at.batch, head, key) = sums.max[j * kLanes<A>];
      if (!x_) continue;
      const Ref<T, 4> y = p_.y.template as<T>();
      narrow(y.at(at.batch, key, head), sums.y + j * padded_, width_, y.stride[3]);
    }
  }

  const ColumnsParams p_;
  const int threads_;
  const Ref<const T, 4> x_;
  const int width_, padded_;
  const int64_t groups_;
};

// p of chosen pairs, one at a time: D multiplications each.
template <class T>
class Probs {
 public:
  using Block = softmax::Block<DenseSource>;
  using A = Accum<T>;
  using Statistic = typename Replay<T>::Statistic;

  Probs(const ProbsParams& p, int threads)
      : p_(p),
        threads_(threads),
        q_(p_.q.as<const T>()),
        k_(p_.k.as<const T>()),
        shape_(p_.softcap) {}

  void run() {
    const int64_t heads = p_.query_heads(), lines = p_.rows ? p_.rows.size[1] : p_.max_q;
    parallel_tasks(p_.sequences() * heads * lines, threads_, [&](int64_t task) {
      const WorkItem w =
          DenseSource::work_item(p_, task / lines / heads, static_cast<int>(task / lines % heads));
      if (p_.rows || task % lines < w.at.q_count) work(w, task % lines);
    });
  }

 private:
  // One row of one sequence: row `line`, or row rows[line], against the chosen keys or all.
  void work(const WorkItem& w, int64_t line) {
    const Sequence& at = w.at;
    const int head = w.head;
    const int64_t row = p_.rows ? p_.rows(at.batch, line) : line;
    const bool inside = row >= 0 && row < at.q_count;
    const DenseSource source;
    const Block block{&source, w, {inside ? row : 0, inside ? row + 1 : 1}};
    const int dim = p_.dim();
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(2 * Scratch::bytes_of<A>(dim));
    A* q = scratch.take<A>(dim);
    A* k = scratch.take<A>(dim);
    Statistic statistic;
    Range seen{0, 0};
    if (inside) {
      widen(q, q_.at(at.batch, block.token(0), head), dim, q_.stride[3]);
      statistic = Replay<T>(p_, p_.row, p_.rest).of(block, 0);
      seen = w.mask.visible_keys(row);
    }
    const Ref<A, 4> p = p_.p.template as<A>();
    A* out =
        p_.rows ? p.at(at.batch, head, line, at.k_begin) : p.at(at.batch, head, at.q_begin + line);
    const int64_t count = p_.rows ? at.k_count : p.size[3];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = key_of(block, i);
      const bool some = key >= seen.begin && key < seen.end;
      out[i * p.stride[3]] = some ? weight(block, key, q, k, statistic) : A(0);
    }
  }

  // Element i of the output's row as a key of the sequence.
  int64_t key_of(const Block& block, int64_t i) const {
    if (p_.rows) return i;
    if (p_.offsets) return block.item.mask.diagonal(block.rows.begin) + p_.offsets(i);
    return p_.keys(block.batch(), i);
  }

  HW_NOINLINE A weight(const Block& b, int64_t key, const A* q, A* k,
                       const Statistic& statistic) const {
    const int64_t batch = b.batch();
    widen(k, k_.at(batch, b.key_token(key), b.item.key_head), p_.dim(), k_.stride[3]);
    const A c = inner_product(q, k, p_.dim());
    const A s = score_of_pair<T>(p_, shape_, batch, b.head(), b.rows.begin, b.number(0),
                                 b.key_number(key), c);
    return replay_weight(p_, s, statistic);
  }

  const ProbsParams p_;
  const int threads_;
  const Ref<const T, 4> q_, k_;
  const ScoreShape<A> shape_;
};

}  // namespace
}  // namespace hw::softmax
