// SPDX-License-Identifier: Apache-2.0
// Backward pass of attention on the CPU.
//
// A task is a key head of one sequence. It walks the blocks of queries of its query heads, and for
// each block the keys it sees: p is replayed once, d_q of the block grows in scratch memory, d_k
// and d_v grow where they lie (fp32, one key head) or in a buffer of the task. Five products per
// tile, no atomics, one order of additions. With few heads the keys are cut into spans of their own
// d_k and d_v, and what each span gives to d_q is added up afterwards, in order.
//
// A bias that several batch entries or heads share would be added to by several tasks: its gradient
// is a second loop (SharedBias) whose tasks own rows of the bias and walk all that share them.
#pragma once

#include "ops/attention/attention_cpu_tile.h"

namespace hw::attention {
namespace {

constexpr int64_t kFewHeads = 8;       // fewer tasks than this: cut the keys
constexpr int64_t kSpanOfHead = 1024;  // shortest span of keys

// What a block of queries brings along besides the queries, and the tile of ds.
template <class T>
class Cotangents {
 public:
  using A = Accum<T>;
  using E = Multiplied<T>;
  using V = Vec<A>;

  explicit Cotangents(const BackwardParams& p)
      : p_(p),
        d_w_(p.d_w.as<const T>()),
        delta_(p.delta.as<const A>()),
        v_(p.v.as<const T>()),
        replay_(p, p.row),
        value_dim_(p.value_dim()),
        rows_(p.value_dim()) {
    Scratch& scratch = Scratch::of_thread();
    v_room_ = scratch.take<E>(operand_room<T>(kKeys, value_dim_));
    slope_ = scratch.take<A>(kTile);
  }

  static int64_t bytes(const BackwardParams& p) {
    return BlockRows<T>::bytes(p.value_dim()) +
           Scratch::bytes_of<E>(operand_room<T>(kKeys, p.value_dim())) +
           Scratch::bytes_of<A>(kTile);
  }

  int padded() const { return rows_.padded(); }       // Dv in whole vectors
  const E* over_rows() { return rows_.over_rows(); }  // d_w [steps(rows), padded()]

  // Loads d_w and the row statistics; false if nothing flows back through the block.
  bool load_rows(const Block& block, int width) {
    rows_.load(d_w_, block, width);
    bool some = rows_.any();
    for (int i = 0; i < block.count(); ++i) {
      delta_of_[i] = delta_ ? delta_(block.at.batch, block.head, block.row(i)) : A(0);
      some |= delta_of_[i] != 0;
    }
    if (!some) return false;
    for (int i = block.count(); i < width; ++i) delta_of_[i] = 0;
    replay_.load_rows(block, width);
    return true;
  }

  // p in place of s, and ds.
  void gradients(const Block& block, const Range& keys, int key_head, int width, A* s, A* ds) {
    const int n = static_cast<int>(keys.count());
    const bool soft = is_softmax(p_.activation);
    if (soft)
      replay_.weights(n, s);
    else
      replay_.weights_and_slopes(n, s, slope_);
    const Rows<T> v{v_, block.at.batch, block.key(keys.begin), n, key_head, v_room_};
    if (value_dim_ > 0)
      multiply<false>(n, width, steps<E>(value_dim_), over_width(v), rows_.over_width(), kRows, ds,
                      kRows);
    else
      std::fill_n(ds, n * kRows, A(0));
    const A* slope = soft ? s : slope_;
    for (int j = 0; j < n; ++j)
      for (int l = 0; l < width; l += kLanes<A>) {
        const int at = j * kRows + l;
        store(ds + at, load(slope + at) * (load(ds + at) - load(delta_of_ + l)));
      }
  }

 private:
  const BackwardParams& p_;
  const Ref<const T, 4> d_w_;
  const Ref<const A, 3> delta_;
  const Ref<const T, 4> v_;
  Replay<T> replay_;
  const int value_dim_;
  BlockRows<T> rows_;  // d_w
  E* v_room_;
  A* slope_;
  alignas(64) A delta_of_[kRows];
};

// Whether several (batch entry, head) pairs add to the same element of d_bias.
inline bool shares_bias(const BackwardParams& p) {
  return p.d_bias && ((p.d_bias.stride[0] == 0 && p.d_bias.size[0] > 1) ||
                      (p.d_bias.stride[1] == 0 && p.d_bias.size[1] > 1));
}

// d_bias of a tile: added to, in whatever shape it has.
template <class A>
void add_bias_gradient(const Ref<void, 4>& d_bias, const Block& block, const Range& keys,
                       const A* ds) {
  const Ref<A, 4> to = d_bias.as<A>();
  for (int i = 0; i < block.count(); ++i) {
    A* row = to.at(block.at.batch, block.head, block.rows.begin + i, keys.begin);
    for (int64_t j = 0; j < keys.count(); ++j) row[j * to.stride[3]] += ds[j * kRows + i];
  }
}

template <class T>
class Backward {
 public:
  using A = Accum<T>;
  using E = Multiplied<T>;
  using V = Vec<A>;

  explicit Backward(const Call& call)
      : p_(backward_params(call)),
        threads_(call.context.num_threads),
        heads_(p_.key_heads()),
        group_(p_.group()),
        dim_(p_.dim()),
        value_dim_(p_.value_dim()),
        padded_(round_up(dim_, kLanes<A>)),
        padded_values_(round_up(value_dim_, kLanes<A>)),
        pairs_(p_.sequences() * heads_) {
    if (pairs_ > 0 && pairs_ < kFewHeads)
      spans_ = std::max<int64_t>(1, std::min(ceil_div(kFewHeads, pairs_), p_.max_k / kSpanOfHead));
    span_ = round_up(ceil_div(std::max<int64_t>(p_.max_k, 1), spans_), static_cast<int64_t>(kKeys));
  }

  void run() {
    if (spans_ > 1) parts_.reserve(spans_ * part_size() * static_cast<int64_t>(sizeof(A)));
    parallel_tasks(pairs_ * spans_, threads_, [&](int64_t i) { work(i / spans_, i % spans_); });
    if (spans_ > 1)
      parallel_tasks(p_.sequences() * p_.query_heads(), threads_, [&](int64_t i) { add_parts(i); });
  }

 private:
  // Rows of d_k and d_v where a task adds to them.
  struct Sums {
    A *d_k, *d_v;  // of the first key of the span
    int64_t d_k_ld, d_v_ld;
    bool in_place;
  };

  // One span's part of d_q: [sequences or 1, max rows, query heads, padded_].
  int64_t part_rows() const { return p_.q.size[0] * p_.q.size[1]; }
  int64_t part_size() const { return part_rows() * p_.query_heads() * padded_; }
  A* part_of(const Block& b, int i, int64_t span) {
    const int64_t row = b.at.batch * p_.q.size[1] + b.row(i);
    return reinterpret_cast<A*>(parts_.data()) + span * part_size() +
           (row * p_.query_heads() + b.head) * padded_;
  }

  void work(int64_t pair, int64_t span) {
    const Sequence at = sequence(p_, pair / heads_);
    const int head = static_cast<int>(pair % heads_);
    const Range keys{std::min(span * span_, at.k_count), std::min((span + 1) * span_, at.k_count)};
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Tile<T>::bytes(p_) + Cotangents<T>::bytes(p_) + 3 * Scratch::bytes_of<A>(kTile) +
                  Scratch::bytes_of<A>(kRows * padded_) + Scratch::bytes_of<A>(padded_));
    Walk walk(*this);
    Buffer buffer;
    const Sums sums = prepare(at, head, keys, buffer);
    for (int h = head * group_; h < (head + 1) * group_; ++h) {
      clear_key_gradients(at, h, keys);
      for (int64_t begin = 0; begin < at.q_count; begin += kRows) {
        const Block block{
            at, mask_of(p_, at), h, {begin, std::min<int64_t>(begin + kRows, at.q_count)}};
        walk.block(block, keys, sums);
        write_queries(block, walk, span);
      }
    }
    if (!sums.in_place) write_keys(at, head, keys, sums);
  }

  // Zeroed rows of d_k and d_v for the span.
  Sums prepare(const Sequence& at, int head, const Range& keys, Buffer& buffer) {
    const Ref<T, 4> d_k = p_.d_k.template as<T>(), d_v = p_.d_v.template as<T>();
    Sums s{};
    if constexpr (std::is_same_v<T, A>) {
      s.in_place = padded_ == dim_ && padded_values_ == value_dim_ && d_k.stride[3] == 1 && d_v &&
                   d_v.stride[3] == 1;
      if (s.in_place) {
        s.d_k = d_k.at(at.batch, at.k_begin + keys.begin, head);
        s.d_v = d_v.at(at.batch, at.k_begin + keys.begin, head);
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

  void write_keys(const Sequence& at, int head, const Range& keys, const Sums& s) {
    const Ref<T, 4> d_k = p_.d_k.template as<T>(), d_v = p_.d_v.template as<T>();
    for (int64_t j = 0; j < keys.count(); ++j) {
      const int64_t key = at.k_begin + keys.begin + j;
      narrow(d_k.at(at.batch, key, head), s.d_k + j * s.d_k_ld, dim_, d_k.stride[3]);
      if (d_v) narrow(d_v.at(at.batch, key, head), s.d_v + j * s.d_v_ld, value_dim_, d_v.stride[3]);
    }
  }

  void clear_key_gradients(const Sequence& at, int head, const Range& keys) {
    for (const Ref<void, 3>* to : {&p_.d_key_bias, &p_.d_key_gain})
      for (int64_t j = keys.begin; *to && j < keys.end; ++j)
        to->template as<A>()(at.batch, head, at.k_begin + j) = 0;
  }

  // The loop over one block's keys.
  class Walk {
   public:
    explicit Walk(Backward& pass) : pass_(pass), p_(pass.p_), tile_(pass.p_), cotangents_(pass.p_) {
      Scratch& scratch = Scratch::of_thread();
      x_ = scratch.take<A>(kTile);
      s_ = scratch.take<A>(kTile);
      ds_ = scratch.take<A>(kTile);
      d_q_ = scratch.take<A>(kRows * pass.padded_);
      row_ = scratch.take<A>(pass.padded_);
    }

    A* d_q() { return d_q_; }  // [rows, padded], still to be multiplied by scale tau
    A* row() { return row_; }
    A factor(int i) const { return tile_.factor(i); }

    void block(const Block& block, const Range& span, const Sums& sums) {
      std::fill_n(d_q_, kRows * pass_.padded_, A(0));
      tile_.load_queries(block);
      if (!cotangents_.load_rows(block, tile_.width())) return;
      q_ = tile_.q_over_rows();
      d_w_ = cotangents_.over_rows();
      Range keys = block.mask.keys_of(block.rows);
      keys.begin = std::max(keys.begin / kKeys * kKeys, span.begin);
      keys.end = std::min(keys.end, span.end);
      for (int64_t j = keys.begin; j < keys.end; j += kKeys)
        step(block, {j, std::min<int64_t>(j + kKeys, keys.end)}, span.begin, sums);
    }

   private:
    void step(const Block& block, const Range& keys, int64_t first, const Sums& sums) {
      const int n = static_cast<int>(keys.count()), rows = block.count();
      tile_.products(keys, x_);
      tile_.scores(keys, x_, s_);
      cotangents_.gradients(block, keys, tile_.key_head(), tile_.width(), s_, ds_);
      const int64_t at = keys.begin - first;
      if (p_.d_v)
        multiply<true>(n, cotangents_.padded(), steps<E>(rows), tile_.p_over_rows(s_, n), d_w_,
                       cotangents_.padded(), sums.d_v + at * sums.d_v_ld, sums.d_v_ld);
      if (p_.d_bias && !shares_bias(p_)) add_bias_gradient(p_.d_bias, block, keys, ds_);
      if (p_.d_key_bias) add_key_bias(block, keys);
      if (tile_.shapes_gradients()) shape(block, keys);
      multiply<true>(n, pass_.padded_, steps<E>(rows), tile_.dc_over_rows(ds_, n), q_,
                     tile_.padded(), sums.d_k + at * sums.d_k_ld, sums.d_k_ld);
      const Panel<E> k = tile_.k_over_keys(keys);
      multiply<true>(rows, pass_.padded_, steps<E>(n),
                     hw::transposed(tile_.over_keys(ds_, n), kRows), k.data, k.ld, d_q_,
                     pass_.padded_);
    }

    void add_key_bias(const Block& block, const Range& keys) {
      const Ref<A, 3> to = p_.d_key_bias.template as<A>();
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        V total{};
        for (int l = 0; l < tile_.width(); l += kLanes<A>)
          total += load(ds_ + (j - keys.begin) * kRows + l);
        to(block.at.batch, block.head, block.key(j)) += sum<A>(total);
      }
    }

    void shape(const Block& block, const Range& keys) {
      alignas(64) A d_gain[kKeys] = {};
      tile_.chain(keys, x_, ds_, d_gain);
      const Ref<A, 3> to = p_.d_key_gain.template as<A>();
      for (int64_t j = keys.begin; to && j < keys.end; ++j)
        to(block.at.batch, block.head, block.key(j)) += d_gain[j - keys.begin];
    }

    Backward& pass_;
    const BackwardParams& p_;
    Tile<T> tile_;
    Cotangents<T> cotangents_;
    A *x_, *s_, *ds_, *d_q_, *row_;
    const E *q_ = nullptr, *d_w_ = nullptr;  // of the block, [steps(rows), padded]
  };

  void write_queries(const Block& block, Walk& walk, int64_t span) {
    for (int i = 0; i < block.count(); ++i) {
      A* row = walk.d_q() + i * padded_;
      if (spans_ > 1)
        std::copy_n(row, padded_, part_of(block, i, span));
      else
        write_query(block, i, row, walk.factor(i), walk.row());
    }
  }

  // d_q = scale tau sum, d_tau = scale <sum, q>
  void write_query(const Block& block, int i, A* sum, A factor, A* q_row) {
    const int64_t batch = block.at.batch, row = block.row(i);
    if (p_.d_row_temperature) {
      const Ref<const T, 4> q = p_.q.template as<const T>();
      widen(q_row, q.at(batch, row, block.head), dim_, q.stride[3]);
      p_.d_row_temperature.template as<A>()(batch, row, block.head) =
          static_cast<A>(p_.scale) * inner_product(sum, q_row, dim_);
    }
    for (int d = 0; d < dim_; ++d) sum[d] *= factor;
    const Ref<T, 4> d_q = p_.d_q.template as<T>();
    narrow(d_q.at(batch, row, block.head), sum, dim_, d_q.stride[3]);
  }

  void add_parts(int64_t i) {
    const Sequence at = sequence(p_, i / p_.query_heads());
    const Block block{at, {}, static_cast<int>(i % p_.query_heads()), {0, at.q_count}};
    const Ref<const A, 3> tau = p_.row_temperature.template as<const A>();
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Scratch::bytes_of<A>(padded_));
    A* q_row = scratch.take<A>(padded_);
    for (int64_t r = 0; r < at.q_count; ++r) {
      A* total = part_of(block, static_cast<int>(r), 0);
      for (int64_t span = 1; span < spans_; ++span) {
        const A* part = part_of(block, static_cast<int>(r), span);
        for (int d = 0; d < padded_; ++d) total[d] += part[d];
      }
      const A factor =
          static_cast<A>(p_.scale) * (tau ? tau(at.batch, at.q_begin + r, block.head) : A(1));
      write_query(block, static_cast<int>(r), total, factor, q_row);
    }
  }

  const BackwardParams p_;
  const int threads_, heads_, group_, dim_, value_dim_, padded_, padded_values_;
  const int64_t pairs_;
  int64_t spans_ = 1, span_ = 0;
  Buffer parts_;
};

// d_bias where (batch entry, head) pairs share it. A task owns a block of rows of one slice of the
// bias and visits, in order, every pair that reads the slice.
template <class T>
class SharedBias {
 public:
  using A = Accum<T>;

  explicit SharedBias(const Call& call)
      : p_(backward_params(call)), threads_(call.context.num_threads) {
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
      scratch.reset(Tile<T>::bytes(p_) + Cotangents<T>::bytes(p_) +
                    2 * Scratch::bytes_of<A>(kTile));
      Tile<T> tile(p_);
      Cotangents<T> cotangents(p_);
      A* s = scratch.take<A>(kTile);
      A* ds = scratch.take<A>(kTile);
      for (int64_t batch = b; batch < p_.batch(); batch += batches_)
        for (int64_t head = h; head < p_.query_heads(); head += heads_)
          visit(batch, static_cast<int>(head), block, tile, cotangents, s, ds);
    });
  }

 private:
  void visit(int64_t batch, int head, int64_t index, Tile<T>& tile, Cotangents<T>& cotangents, A* s,
             A* ds) {
    const Sequence at = sequence(p_, batch);
    const Block block{at,
                      mask_of(p_, at),
                      head,
                      {index * kRows, std::min<int64_t>((index + 1) * kRows, at.q_count)}};
    tile.load_queries(block);
    if (!cotangents.load_rows(block, tile.width())) return;
    const Range keys = block.mask.keys_of(block.rows);
    for (int64_t j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
      const Range some{j, std::min<int64_t>(j + kKeys, keys.end)};
      tile.products(some, s);
      tile.scores(some, s, s);
      cotangents.gradients(block, some, tile.key_head(), tile.width(), s, ds);
      add_bias_gradient(p_.d_bias, block, some, ds);
    }
  }

  const BackwardParams p_;
  const int threads_;
  int64_t batches_, heads_, blocks_;
};

}  // namespace
}  // namespace hw::attention
