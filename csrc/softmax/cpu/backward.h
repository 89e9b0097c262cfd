// SPDX-License-Identifier: Apache-2.0
// Backward pass of attention on the CPU.
//
// A task is a key head of one sequence. It walks the blocks of queries of its query heads, and for
// each block the keys it sees: p is replayed once, d_q of the block grows in scratch memory, d_k
// and d_v grow where they lie (fp32, one key head) or in a buffer of the task. Five products per
// tile, no atomics, one order of additions. With few heads the keys are cut into spans of their own
// d_k and d_v, and what each span gives to d_q is added up in order: afterwards, if spans are tasks
// of their own, which the number of sequences may decide, for the sums are the same.
//
// A bias that several batch entries or heads share would be added to by several tasks: its gradient
// is a second loop (SharedBias) whose tasks own rows of the bias and walk all that share them.
#pragma once

#include "softmax/cpu/block_gradients.h"

namespace hw::softmax {
namespace {

constexpr int64_t kFewHeads = 8;       // fewer than this: cut the keys
constexpr int64_t kSpanOfHead = 1024;  // shortest span of keys

template <class T, SortedSource Source = DenseSource, ScoreKind Score = FullScore>
class Backward {
 public:
  using Block = softmax::Block<Source>;
  using WorkItem = typename Source::WorkItem;
  using Gradients = BlockGradients<T, Source, Score>;
  using A = Accum<T>;
  using E = Multiplied<T>;
  using V = Vec<A>;

  // Each token of a key head has one slot at most, where its gradients come from.
  HW_NOINLINE Backward(const BackwardParams& p, int threads, const Source& source = {},
                       const Score& score = {})
      : p_(p),
        threads_(threads),
        source_(source),
        score_(score),
        heads_(p_.key_heads()),
        group_(p_.group()),
        dim_(p_.dim()),
        value_dim_(p_.value_dim()),
        padded_(round_up(dim_, kLanes<A>)),
        padded_values_(round_up(value_dim_, kLanes<A>)),
        sequence_heads_(p_.sequences() * heads_) {
    if (sequence_heads_ >= kFewHeads) return;
    for (int64_t n = 0; n < p_.sequences() && heads_ > 0; ++n)
      for (int head = 0; head < heads_; ++head)
        spans_ = std::max(spans_, cut_of(item_of(n * heads_ + head)).spans);
  }

  void run() {
    if (spans_ == 1) {
      parallel_tasks(sequence_heads_, threads_,
                     [&](int64_t sequence_head) { work(sequence_head); });
      return;
    }
    parts_.reserve(spans_ * part_size() * static_cast<int64_t>(sizeof(A)));
    parallel_tasks(sequence_heads_ * spans_, threads_,
                   [&](int64_t i) { work_span(i / spans_, i % spans_); });
    parallel_tasks(p_.sequences() * p_.query_heads(), threads_, [&](int64_t i) { add_parts(i); });
  }

 private:
  // Spans of the keys of a sequence, and keys of one.
  struct Cut {
    int64_t spans, length;

    Range span(int64_t i, int64_t keys) const {
      return {std::min(i * length, keys), std::min((i + 1) * length, keys)};
    }
  };

  HW_NOINLINE Cut cut_of(const WorkItem& w) const {
    const int64_t count = source_.keys(w);
    int64_t spans = 1;
    if (heads_ > 0 && heads_ < kFewHeads)
      spans =
          std::max<int64_t>(1, std::min(ceil_div<int64_t>(kFewHeads, heads_), count / kSpanOfHead));
    const int64_t keys = std::max<int64_t>(count, 1);
    return {spans, round_up(ceil_div(keys, spans), static_cast<int64_t>(kKeys))};
  }

  // One span's part of d_q: [sequences or 1, max rows, query heads, padded_].
  int64_t part_rows() const { return p_.q.size[0] * p_.q.size[1]; }
  int64_t part_size() const { return part_rows() * p_.query_heads() * padded_; }
  HW_NOINLINE A* part_of(const Block& b, int i, int64_t span) {
    const int64_t row = b.batch() * p_.q.size[1] + b.token(i);
    return reinterpret_cast<A*>(parts_.data()) + span * part_size() +
           (row * p_.query_heads() + b.head()) * padded_;
  }

  // Of the first query head of a key head.
  WorkItem item_of(int64_t sequence_head) const {
    return source_.work_item(p_, sequence_head / heads_,
                             static_cast<int>(sequence_head % heads_) * group_);
  }

  // A key head whose spans are worked on one after another, for each block of queries.
  void work(int64_t sequence_head) {
    const WorkItem w = item_of(sequence_head);
    const Cut cut = cut_of(w);
    const int64_t count = source_.keys(w);
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Gradients::bytes(p_) + Scratch::bytes_of<A>(kRows * padded_));
    Gradients gradients(p_, score_);
    A* total = scratch.take<A>(kRows * padded_);
    each_block(sequence_head, {0, count}, [&](const Block& block, const KeySums<A>& sums) {
      gradients.add(block, cut.span(0, count), sums);
      if (cut.spans > 1) std::copy_n(gradients.d_q(), block.count() * padded_, total);
      for (int64_t i = 1; i < cut.spans; ++i) {
        const Range keys = cut.span(i, count);
        gradients.add(block, keys, sums.from(keys.begin));
        for (int d = 0; d < block.count() * padded_; ++d) total[d] += gradients.d_q()[d];
      }
      write_queries(block, cut.spans > 1 ? total : gradients.d_q(), gradients);
    });
  }

  void work_span(int64_t sequence_head, int64_t span) {
    const WorkItem w = item_of(sequence_head);
    const Cut cut = cut_of(w);
    if (span >= cut.spans) return;
    Scratch::of_thread().reset(Gradients::bytes(p_));
    Gradients gradients(p_, score_);
    const Range keys = cut.span(span, source_.keys(w));
    each_block(sequence_head, keys, [&](const Block& block, const KeySums<A>& sums) {
      gradients.add(block, keys, sums);
      for (int i = 0; i < block.count(); ++i)
        std::copy_n(gradients.d_q() + i * padded_, padded_, part_of(block, i, span));
    });
  }

  // f(block, sums) for every block of queries of a key head, with the sums of `keys`.
  template <class F>
  void each_block(int64_t sequence_head, const Range& keys, const F& f) {
    Buffer buffer;
    const Block of_head{&source_, item_of(sequence_head), {}};
    const KeySums<A> sums = prepare(of_head, keys, buffer);
    for (int h = of_head.head(); h < of_head.head() + group_; ++h) {
      Block block{&source_, source_.work_item(p_, sequence_head / heads_, h), {}};
      clear_key_gradients(block, keys);
      const int64_t rows = block.row_count();
      for (int64_t i = 0; i * kRows < rows; ++i) {
        block.rows = rows_of_block<Source>(i, rows);
        f(block, sums);
      }
    }
    if (!sums.in_place) write_keys(of_head, keys, sums);
  }

  // Zeroed rows of d_k and d_v for the span.
  HW_NOINLINE KeySums<A> prepare(const Block& block, const Range& keys, Buffer& buffer) {
    const Ref<T, 4> d_k = p_.d_k.template as<T>(), d_v = p_.d_v.template as<T>();
    KeySums<A> s{};
    if constexpr (std::is_same_v<T, A>) {
      s.in_place = block.keys_adjacent() && source_.keys_in_order() && padded_ == dim_ &&
                   padded_values_ == value_dim_ && d_k.stride[3] == 1 && d_v && d_v.stride[3] == 1;
      if (s.in_place) {
        const int64_t first = block.key_result(keys.begin);
        s.d_k = d_k.at(block.key_batch(), first, block.item.key_head);
        s.d_v = d_v.at(block.key_batch(), first, block.item.key_head);
        s.d_k_ld = d_k.stride[1];
        s.d_v_ld = d_v.stride[1];
      }
    }
    if (!s.in_place) {
      buffer.reserve(keys.count() * (padded_ + padded_values_) * static_cast<int64_t>(sizeof(A)));
      s.d_k = reinterpret_cast<A*>(buffer.data());
      s.d_v = s.d_k + keys.count() * padded_;
      s.d_k_ld = padded_;
      s.d_v_ld = padded_values_;
    }
    for (int64_t j = 0; j < keys.count(); ++j) {
      std::fill_n(s.d_k + j * s.d_k_ld, s.in_place ? dim_ : padded_, A(0));
      std::fill_n(s.d_v + j * s.d_v_ld, s.in_place ? value_dim_ : padded_values_, A(0));
    }
    return s;
  }

  HW_NOINLINE void write_keys(const Block& block, const Range& keys, const KeySums<A>& s) {
    const Ref<T, 4> d_k = p_.d_k.template as<T>(), d_v = p_.d_v.template as<T>();
    for (int64_t j = 0; j < keys.count(); ++j) {
      const int64_t key = block.key_result(keys.begin + j), b = block.key_batch();
      const int head = block.item.key_head;
      if (key < 0) continue;
      narrow(d_k.at(b, key, head), s.d_k + j * s.d_k_ld, dim_, d_k.stride[3]);
      if (d_v) narrow(d_v.at(b, key, head), s.d_v + j * s.d_v_ld, value_dim_, d_v.stride[3]);
    }
  }

  HW_NOINLINE void clear_key_gradients(const Block& block, const Range& keys) {
    for (const Ref<void, 3>* to : {&p_.d_key_bias, &p_.d_key_gain})
      for (int64_t j = keys.begin; *to && j < keys.end; ++j)
        if (const int64_t key = block.key_number(j); key >= 0)
          to->template as<A>()(block.batch(), block.head(), key) = 0;
  }

  // `sums` [rows, padded]: of all keys.
  void write_queries(const Block& block, A* sums, Gradients& gradients) {
    for (int i = 0; i < block.count(); ++i)
      write_query(block, i, sums + i * padded_, gradients.factor(i), gradients.row());
  }

  // d_q = scale tau sum, d_tau = scale <sum, q>
  HW_NOINLINE void write_query(const Block& block, int i, A* sum, A factor, A* q_row) {
    const int64_t batch = block.batch(), row = block.token(i), result = block.result(i);
    const int head = block.head();
    if (p_.d_row_temperature) {
      const Ref<const T, 4> q = p_.q.template as<const T>();
      widen(q_row, q.at(batch, row, head), dim_, q.stride[3]);
      p_.d_row_temperature.template as<A>()(batch, result, head) =
          static_cast<A>(p_.scale) * inner_product(sum, q_row, dim_);
    }
    for (int d = 0; d < dim_; ++d) sum[d] *= factor;
    const Ref<T, 4> d_q = p_.d_q.template as<T>();
    narrow(d_q.at(batch, result, head), sum, dim_, d_q.stride[3]);
  }

  void add_parts(int64_t i) {
    const int head = static_cast<int>(i % p_.query_heads());
    Block block{&source_, source_.work_item(p_, i / p_.query_heads(), head), {}};
    block.rows = {0, block.row_count()};
    const Ref<const A, 3> tau = p_.row_temperature.template as<const A>();
    const Cut cut = cut_of(block.item);
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Scratch::bytes_of<A>(padded_));
    A* q_row = scratch.take<A>(padded_);
    for (int64_t r = 0; r < block.rows.end; ++r) {
      A* total = part_of(block, static_cast<int>(r), 0);
      for (int64_t span = 1; span < cut.spans; ++span) {
        const A* part = part_of(block, static_cast<int>(r), span);
        for (int d = 0; d < padded_; ++d) total[d] += part[d];
      }
      const A factor =
          static_cast<A>(p_.scale) * (tau ? tau(block.batch(), block.number(r), head) : A(1));
      write_query(block, static_cast<int>(r), total, factor, q_row);
    }
  }

  const BackwardParams p_;
  const int threads_;
  const Source source_;
  const Score score_;
  const int heads_, group_, dim_, value_dim_, padded_, padded_values_;
  const int64_t sequence_heads_;
  int64_t spans_ = 1;  // tasks of a key head: the most spans of any, or one for all of them
  Buffer parts_;
};

// d_bias where (batch entry, head) pairs share it. A task owns a block of rows of one slice of the
// bias and visits, in order, every pair that reads the slice.
template <class T, SortedSource Source = DenseSource, ScoreKind Score = FullScore>
class SharedBias {
 public:
  using A = Accum<T>;

  // p.max_q: positions of rows.
  SharedBias(const BackwardParams& p, int threads, const Source& source = {},
             const Score& score = {})
      : p_(p), threads_(threads), source_(source), score_(score) {
    const Ref<void, 4>& b = p_.d_bias;
    batches_ = b.stride[0] == 0 ? 1 : p_.batch();
    heads_ = b.stride[1] == 0 ? 1 : p_.query_heads();
    blocks_ = ceil_div<int64_t>(p_.max_q, kRows);
  }

  void run() {
    parallel_tasks(batches_ * heads_ * blocks_, threads_, [&](int64_t task) {
      const int64_t block = task % blocks_, h = task / blocks_ % heads_,
                    b = task / blocks_ / heads_;
      Scratch& scratch = Scratch::of_thread();
      scratch.reset(Tile<T, Source, Score>::bytes(p_) + Cotangents<T>::bytes(p_) +
                    2 * Scratch::bytes_of<A>(kTile));
      Tile<T, Source, Score> tile(p_, score_);
      Cotangents<T> cotangents(p_);
      A* s = scratch.take<A>(kTile);
      A* ds = scratch.take<A>(kTile);
      for (int64_t batch = b; batch < p_.batch(); batch += batches_)
        for (int64_t head = h; head < p_.query_heads(); head += heads_)
          visit(batch, static_cast<int>(head), block, tile, cotangents, s, ds);
    });
  }

 private:
  HW_NOINLINE void visit(int64_t batch, int head, int64_t index, Tile<T, Source, Score>& tile,
                         Cotangents<T>& cotangents, A* s, A* ds) {
    Block<Source> block{&source_, source_.work_item(p_, batch, head), {}};
    const Range rows = rows_at(block, {index * kRows, (index + 1) * kRows});
    // More of them than positions where a list names a token several times.
    for (int64_t i = rows.begin; i < rows.end; i += kRows) {
      block.rows = {i, std::min<int64_t>(i + kRows, rows.end)};
      add(block, tile, cotangents, s, ds);
    }
  }

  HW_NOINLINE void add(const Block<Source>& block, Tile<T, Source, Score>& tile,
                       Cotangents<T>& cotangents, A* s, A* ds) {
    tile.load_queries(block);
    if (!cotangents.load_rows(block, tile.width())) return;
    const Range keys = block.keys();
    for (int64_t j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
      const Range some{j, std::min<int64_t>(j + kKeys, keys.end)};
      if (!tile.move_to(some)) continue;
      tile.products(some, s);
      tile.scores(some, s, s);
      cotangents.gradients(block, some, tile.lanes(), s, ds);
      tile.clear_set(some, ds);
      add_bias_gradient(p_.d_bias, block, some, tile.lanes().begin, tile.rows(), ds);
    }
  }

  // The rows at some positions.
  static Range rows_at(const Block<Source>& all, const Range& positions) {
    if constexpr (Source::kInOrder)
      return {positions.begin, std::min(positions.end, all.row_count())};
    else
      return all.source->row_slots(all.item, positions);
  }

  const BackwardParams p_;
  const int threads_;
  const Source source_;
  const Score score_;
  int64_t batches_, heads_, blocks_;
};

}  // namespace
}  // namespace hw::softmax
