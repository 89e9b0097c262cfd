// SPDX-License-Identifier: Apache-2.0
// The backward pass of attention on the CPU, one block of queries: gradients of a tile, and the
// walk over the keys that the block sees.
//
// For each tile of keys p is replayed once; d_q of the block grows in scratch memory, d_k and d_v
// where the caller keeps them (KeySums). Five products per tile, one order of additions.
#pragma once

#include "softmax/cpu/tile.h"

namespace hw::softmax {
namespace {

// What a block of queries brings along besides the queries, and the tile of ds.
template <class T>
class Cotangents {
 public:
  using A = Accum<T>;
  using E = Multiplied<T>;
  using V = Vec<A>;

  HW_NOINLINE explicit Cotangents(const BackwardParams& p)
      : p_(p),
        d_w_(p.d_w.as<const T>()),
        factor_(p.factor.as<const A>()),
        delta_(p.delta.as<const A>()),
        v_(p.v.as<const T>()),
        replay_(p, p.row, p.rest),
        value_dim_(p.value_dim()),
        rows_(p.value_dim()) {
    Scratch& scratch = Scratch::of_thread();
    v_buffer_ = scratch.take<E>(operand_size<T>(kKeys, value_dim_));
    slope_ = scratch.take<A>(kTile);
  }

  static int64_t bytes(const BackwardParams& p) {
    return BlockRows<T>::bytes(p.value_dim()) +
           Scratch::bytes_of<E>(operand_size<T>(kKeys, p.value_dim())) +
           Scratch::bytes_of<A>(kTile);
  }

  int padded() const { return rows_.padded(); }       // Dv in whole vectors
  const E* over_rows() { return rows_.over_rows(); }  // d_w [steps(rows), padded()]

  // Loads d_w and the row statistics; false if nothing flows back through the block.
  template <class Source>
  HW_NOINLINE bool load_rows(const Block<Source>& block, int width) {
    alignas(64) A factor[kRows];
    for (int i = 0; factor_ && i < block.count(); ++i)
      factor[i] = factor_(block.batch(), block.number(i), block.head());
    rows_.load(d_w_, block, width, factor_ ? factor : nullptr);
    bool some = rows_.any();
    for (int i = 0; i < block.count(); ++i) {
      delta_of_[i] = delta_(block.batch(), block.head(), block.result(i));
      some |= delta_of_[i] != 0;
    }
    if (!some) return false;
    for (int i = block.count(); i < width; ++i) delta_of_[i] = 0;
    replay_.load_rows(block, width);
    return true;
  }

  // p in place of s, and ds.
  template <class Source>
  HW_NOINLINE void gradients(const Block<Source>& block, const Range& keys, const Lanes& lanes,
                             A* s, A* ds) {
    const int n = static_cast<int>(keys.count());
    const bool soft = is_softmax(p_.activation);
    if (soft)
      replay_.weights(n, lanes, s);
    else
      replay_.weights_and_slopes(n, lanes, s, slope_);
    const T* gathered[kKeys];
    const Rows<T> v = rows_of_keys(v_, block, block.key_batch(), keys, v_buffer_, gathered);
    multiply<false>(n, lanes.count(), steps<E>(value_dim_), over_width(v),
                    rows_.over_width() + lanes.begin, kRows, ds + lanes.begin, kRows);
    const A* slope = soft ? s : slope_;
    for (int j = 0; j < n; ++j)
      for (int l = lanes.begin; l < lanes.end; l += kLanes<A>) {
        const int at = j * kRows + l;
        store(ds + at, load(slope + at) * (load(ds + at) - load(delta_of_ + l)));
      }
  }

 private:
  const BackwardParams& p_;
  const Ref<const T, 4> d_w_;
  const Ref<const A, 3> factor_;
  const Ref<const A, 3> delta_;
  const Ref<const T, 4> v_;
  Replay<T> replay_;
  const int value_dim_;
  BlockRows<T> rows_;  // d_w
  E* v_buffer_;
  A* slope_;
  alignas(64) A delta_of_[kRows];
};

// Whether several (batch entry, head) pairs add to the same element of d_bias.
inline bool shares_bias(const BackwardParams& p) {
  return p.d_bias && ((p.d_bias.stride[0] == 0 && p.d_bias.size[0] > 1) ||
                      (p.d_bias.stride[1] == 0 && p.d_bias.size[1] > 1));
}

// d_bias of a tile, of `rows` rows from the lane `first` on: added to, in whatever shape it has.
template <class Source, class A>
HW_NOINLINE void add_bias_gradient(const Ref<void, 4>& d_bias, const Block<Source>& block,
                                   const Range& keys, int first, int rows, const A* ds) {
  const Ref<A, 4> to = d_bias.as<A>();
  const bool in_order = block.source->keys_in_order();
  if (in_order && Source::kInOrder && to.stride[2] == 1) {  // transposed, as the tile is
    for (int64_t j = 0; j < keys.count(); ++j) {
      A* column = to.at(block.batch(), block.head(), block.position(first), keys.begin + j);
      const A* from = ds + j * kRows + first;
      int i = 0;
      for (; i + kLanes<A> <= rows; i += kLanes<A>)
        store(column + i, load(column + i) + load(from + i));
      for (; i < rows; ++i) column[i] += from[i];
    }
    return;
  }
  for (int i = first; i < first + rows; ++i) {
    A* row = to.at(block.batch(), block.head(), block.position(i), in_order ? keys.begin : 0);
    for (int64_t j = 0; j < keys.count(); ++j) {
      const int64_t key = in_order ? j : block.key_position(keys.begin + j);
      if (in_order || key >= 0) row[key * to.stride[3]] += ds[j * kRows + i];
    }
  }
}

// Rows of d_k and d_v where a task adds to them, by key slot; who owns them adds them to tokens.
template <class A>
struct KeySums {
  A *d_k, *d_v;  // of the first key of the span
  int64_t d_k_ld, d_v_ld;
  bool in_place;  // where the results lie

  // Those of a later span that begins `key` keys on.
  KeySums from(int64_t key) const {
    return {d_k + key * d_k_ld, d_v + key * d_v_ld, d_k_ld, d_v_ld, in_place};
  }
};

// The loop over one block's keys.
template <class T, SortedSource Source = DenseSource, ScoreKind Score = FullScore>
class BlockGradients {
 public:
  using Block = softmax::Block<Source>;
  using A = Accum<T>;
  using E = Multiplied<T>;
  using V = Vec<A>;

  HW_NOINLINE explicit BlockGradients(const BackwardParams& p, const Score& score = {})
      : p_(p), padded_(round_up(p.dim(), kLanes<A>)), tile_(p, score), cotangents_(p) {
    Scratch& scratch = Scratch::of_thread();
    x_ = scratch.take<A>(kTile);
    s_ = scratch.take<A>(kTile);
    ds_ = scratch.take<A>(kTile);
    d_q_ = scratch.take<A>(kRows * padded_);
    row_ = scratch.take<A>(padded_);
  }

  // Scratch memory that the constructor takes.
  static int64_t bytes(const BackwardParams& p) {
    const int padded = round_up(p.dim(), kLanes<A>);
    return Tile<T, Source, Score>::bytes(p) + Cotangents<T>::bytes(p) +
           3 * Scratch::bytes_of<A>(kTile) + Scratch::bytes_of<A>(kRows * padded) +
           Scratch::bytes_of<A>(padded);
  }

  A* d_q() { return d_q_; }  // [rows, padded], still to be multiplied by scale tau
  A* row() { return row_; }
  A factor(int i) const { return tile_.factor(i); }

  // Of the keys of `span`: d_k and d_v are added to the sums, d_q() is of this span alone.
  HW_NOINLINE void add(const Block& block, const Range& span, const KeySums<A>& sums) {
    std::fill_n(d_q_, kRows * padded_, A(0));
    tile_.load_queries(block);
    if (!cotangents_.load_rows(block, tile_.width())) return;
    q_ = tile_.q_over_rows();
    d_w_ = cotangents_.over_rows();
    Range keys = block.keys();
    keys.begin = std::max(keys.begin / kKeys * kKeys, span.begin);
    keys.end = std::min(keys.end, span.end);
    for (int64_t j = keys.begin; j < keys.end; j += kKeys)
      step(block, {j, std::min<int64_t>(j + kKeys, keys.end)}, span.begin, sums);
  }

 private:
  HW_NOINLINE void step(const Block& block, const Range& keys, int64_t first,
                        const KeySums<A>& sums) {
    if (!tile_.move_to(keys)) return;
    const Lanes lanes = tile_.lanes();
    const int n = static_cast<int>(keys.count()), rows = tile_.rows();
    const int64_t skipped = lanes.begin / kDepth<E>;  // rows of the operands over rows
    tile_.products(keys, x_);
    tile_.scores(keys, x_, s_);
    cotangents_.gradients(block, keys, lanes, s_, ds_);
    tile_.clear_set(keys, ds_);
    const int64_t at = keys.begin - first;
    if (p_.d_v)
      multiply<true>(n, cotangents_.padded(), steps<E>(rows), tile_.p_over_rows(s_, n),
                     d_w_ + skipped * cotangents_.padded(), cotangents_.padded(),
                     sums.d_v + at * sums.d_v_ld, sums.d_v_ld);
    if (p_.d_bias && !shares_bias(p_))
      add_bias_gradient(p_.d_bias, block, keys, lanes.begin, rows, ds_);
    if (p_.d_key_bias) add_key_bias(block, keys);
    if (tile_.shapes_gradients()) shape(block, keys);
    multiply<true>(n, padded_, steps<E>(rows), tile_.dc_over_rows(ds_, n),
                   q_ + skipped * tile_.padded(), tile_.padded(), sums.d_k + at * sums.d_k_ld,
                   sums.d_k_ld);
    const Panel<E> k = tile_.k_over_keys(keys);
    multiply<true>(rows, padded_, steps<E>(n), hw::transposed(tile_.over_keys(ds_, n), kRows),
                   k.data, k.ld, d_q_ + lanes.begin * padded_, padded_);
  }

  HW_NOINLINE void add_key_bias(const Block& block, const Range& keys) {
    const Ref<A, 3> to = p_.d_key_bias.template as<A>();
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      V total{};
      for (int l = tile_.lanes().begin; l < tile_.lanes().end; l += kLanes<A>)
        total += load(ds_ + (j - keys.begin) * kRows + l);
      if (const int64_t key = block.key_number(j); key >= 0)
        to(block.batch(), block.head(), key) += sum<A>(total);
    }
  }

  HW_NOINLINE void shape(const Block& block, const Range& keys) {
    alignas(64) A d_gain[kKeys] = {};
    tile_.chain(keys, x_, ds_, d_gain);
    const Ref<A, 3> to = p_.d_key_gain.template as<A>();
    for (int64_t j = keys.begin; to && j < keys.end; ++j)
      if (const int64_t key = block.key_number(j); key >= 0)
        to(block.batch(), block.head(), key) += d_gain[j - keys.begin];
  }

  const BackwardParams& p_;
  const int padded_;  // D in whole vectors
  Tile<T, Source, Score> tile_;
  Cotangents<T> cotangents_;
  A *x_, *s_, *ds_, *d_q_, *row_;
  const E *q_ = nullptr, *d_w_ = nullptr;  // of the block, [steps(rows), padded]
};

}  // namespace
}  // namespace hw::softmax
