// SPDX-License-Identifier: Apache-2.0
// The tile that every CPU loop of attention works on: scores of up to 64 keys x 64 queries.
//
// Tiles are [keys, kRows] with the queries along the lanes. So nothing is summed across lanes: the
// running maximum and sum of a row are elements of vectors. And nothing of the accumulation type is
// packed but the queries, once per block: in all products the operand whose elements are broadcast
// may lie anywhere,
//
//   x^T   [keys, rows] = k [keys, D]      q^T [D, rows]
//   w^T   [Dv, rows]  += v^T [Dv, keys]   p^T [keys, rows]
//   dp^T  [keys, rows] = v [keys, Dv]     d_w^T [Dv, rows]
//   d_v   [keys, Dv]  += p^T [keys, rows] d_w [rows, Dv]
//   d_k   [keys, D]   += dc^T [keys, rows] q [rows, D]
//   d_q   [rows, D]   += dx [rows, keys]  k [keys, D]
//
// d_q is multiplied by scale tau_i at the end, q when it is packed: then dx takes the place of dc.
// How operands are made, and what differs where pairs of bf16 are multiplied, is in
// cpu/operands.h.
#pragma once

#include <algorithm>
#include <limits>

#include "softmax/cpu/operands.h"
#include "softmax/cpu/packed_keys.h"
#include "softmax/score.h"

#include "core/cpu/simd_math.h"

namespace hw::softmax {
namespace {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class T, SortedSource Source = DenseSource, ScoreKind Score = FullScore>
class Tile {
 public:
  using Block = softmax::Block<Source>;
  using A = Accum<T>;
  using E = Multiplied<T>;
  using V = Vec<A>;

  HW_NOINLINE explicit Tile(const ScoreParams& p, const Score& score = {})
      : p_(p),
        score_(score),
        q_(p.q.as<const T>()),
        k_(p.k.as<const T>()),
        bias_(p.bias.as<const T>()),
        key_bias_(p.key_bias.as<const A>()),
        key_gain_(p.key_gain.as<const A>()),
        temperature_(p.row_temperature.as<const A>()),
        shape_(p.softcap),
        dim_(p.dim()),
        queries_(p.dim()) {
    Scratch& scratch = Scratch::of_thread();
    k_buffer_ = scratch.take<E>(operand_size<T>(kKeys, dim_));
    if (kPaired<T>) tile_buffer_ = scratch.take<E>(kTile / 2);
    if (bias_) {
      bias_rows_ = scratch.take<A>(kTile);
      bias_tile_ = scratch.take<A>(kTile);
    }
  }

  // Scratch memory that the constructor takes.
  static int64_t bytes(const ScoreParams& p) {
    return BlockRows<T>::bytes(p.dim()) + Scratch::bytes_of<E>(operand_size<T>(kKeys, p.dim())) +
           (kPaired<T> ? Scratch::bytes_of<E>(kTile / 2) : 0) + 2 * Scratch::bytes_of<A>(kTile);
  }

  // Whether s differs from x (masks apart), and by the bias alone; whether dx differs from ds.
  bool shapes_scores() const { return p_.softcap > 0 || key_gain_ || key_bias_ || bias_; }
  bool only_bias() const { return bias_ && !(p_.softcap > 0 || key_gain_ || key_bias_); }
  bool shapes_gradients() const { return p_.softcap > 0 || key_gain_; }

  PackedKeys<T>* packed = nullptr;  // of the block's head: k is kept there once it is made
  Prefetches prefetches;  // served during the products with k, and with v where the caller says so

  const Block& block() const { return block_; }
  int width() const { return width_; }              // lanes of the block, whole vectors
  Lanes lanes() const { return lanes_; }            // of them, those that see keys of the tile
  int padded() const { return queries_.padded(); }  // D in whole vectors
  A factor(int i) const { return factor_[i]; }      // scale tau of lane i

  HW_NOINLINE void load_queries(const Block& block) {
    block_ = block;
    width_ = round_up(block.count(), kLanes<A>);
    const A scale = static_cast<A>(p_.scale);
    for (int i = 0; i < block.count(); ++i) {
      factor_[i] =
          temperature_ ? scale * temperature_(block.batch(), block.number(i), block.head()) : scale;
      const int64_t position = block.position(i);
      gain_rows_[i] = position >= p_.gain_begin && position < p_.gain_end ? A(1) : A(0);
    }
    for (int i = block.count(); i < width_; ++i) factor_[i] = gain_rows_[i] = 0;
    queries_.load(q_, block, width_, kPaired<T> ? nullptr : factor_);
  }

  // The tile is that of the keys [keys.begin, keys.end), at most kKeys. False if no row sees any.
  // All that follows touches the tile's lanes alone.
  bool move_to(const Range& keys) {
    lanes_ = block_.lanes(keys, kLanes<A>);
    return !lanes_.empty();
  }

  // x of its keys.
  HW_NOINLINE void products(const Range& keys, A* x) {
    Rows<T> k = key_rows(keys);
    if (packed != nullptr) packed->find_k(keys, k);
    multiply<false>(k.n, lanes_.count(), steps<E>(dim_), over_width(k),
                    queries_.over_width() + lanes_.begin, kRows, x + lanes_.begin, kRows,
                    factors().from(lanes_.begin), &prefetches);
  }

  // s from x, which may be the same array; -inf where a row does not see a key.
  HW_NOINLINE void scores(const Range& keys, const A* x, A* s) {
    // Lanes beyond the block's rows are hidden as well: 0 times an infinite k is NaN there.
    const bool masked = !block_.sees_whole(keys) || block_.count() < lanes_.end;
    if (masked) find_limits(keys);
    if (!shapes_scores()) {
      if (x != s) copy(keys, x, s);
      return finish(keys, masked, s);
    }
    if (only_bias()) {
      if (x != s) copy(keys, x, s);
      transpose_bias<true>(keys, s);
      return finish(keys, masked, s);
    }
    if (bias_) transpose_bias<false>(keys, bias_tile_);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const int64_t at = (j - keys.begin) * kRows;
      const A gain = number_of(key_gain_, j), added = number_of(key_bias_, j);
      for (int l = lanes_.begin; l < lanes_.end; l += kLanes<A>) {
        const V y = shape_.capped(load(x + at + l));
        const V sum = bias_ ? load(bias_tile_ + at + l) + added : splat(added);
        store(s + at + l, key_gain_ ? shape_.score(y, in_gain_rows(gain, l), sum) : y + sum);
      }
    }
    finish(keys, masked, s);
  }

  // ds of scores that are set: they are constants.
  void clear_set(const Range& keys, A* ds) const {
    if constexpr (Score::kSets)
      if (score_.sets()) set_scores(block_, score_, keys, ds, A(0));
  }

  // dx from ds in place; x as products() left it. `d_gain`: per key of the tile, added to, or null.
  HW_NOINLINE void chain(const Range& keys, const A* x, A* ds, A* d_gain) {
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const int64_t at = (j - keys.begin) * kRows;
      const A gain = number_of(key_gain_, j);
      V total{};
      for (int l = lanes_.begin; l < lanes_.end; l += kLanes<A>) {
        const V y = shape_.capped(load(x + at + l)), g = load(gain_rows_ + l),
                d = load(ds + at + l);
        total = fma(d * g, abs_of(y), total);
        store(ds + at + l, d * shape_.slope(y, in_gain_rows(gain, l)));
      }
      if (d_gain != nullptr) d_gain[j - keys.begin] += sum<A>(total);
    }
  }

  // Operands of the other products, see cpu/operands.h, from the first of the tile's lanes
  // on. Those made of a tile of n keys, p or dx, stay until the next is made.
  const E* q_over_rows() { return queries_.over_rows(); }  // all of the block's
  Panel<E> k_over_keys(const Range& keys) { return over_rows(key_rows(keys)); }
  // Room for p as pairs, as over_keys() makes it.
  E* pairs() { return tile_buffer_; }
  const E* over_keys(const A* tile, int n) {
    return pairs_over_keys<E>(tile + lanes_.begin, n, lanes_.count(), tile_buffer_);
  }
  Operand<E> p_over_rows(const A* p, int n) {
    return pairs_over_rows<E>(p + lanes_.begin, n, rows(), NoFactors{}, tile_buffer_);
  }
  Operand<E> dc_over_rows(const A* dx, int n) {
    return pairs_over_rows<E>(dx + lanes_.begin, n, rows(), factors().from(lanes_.begin),
                              tile_buffer_);
  }
  int rows() const { return std::min(lanes_.end, block_.count()) - lanes_.begin; }

 private:
  Rows<T> key_rows(const Range& keys) {
    return rows_of_keys(k_, block_, block_.key_batch(), keys, k_buffer_, gathered_);
  }

  HW_INLINE void finish(const Range& keys, bool masked, A* s) {
    if constexpr (Score::kSets)
      if (score_.sets()) set_scores(block_, score_, keys, s, A(Score::kSetScore));
    if (masked) hide(keys, s);
  }

  // What products with q have to be multiplied by still.
  auto factors() const {
    if constexpr (kPaired<T>)
      return LaneFactors<A>{factor_};
    else
      return NoFactors{};
  }

  // Of a key; 0 where it has none.
  A number_of(const Ref<const A, 3>& numbers, int64_t j) const {
    const int64_t key = numbers ? block_.key_number(j) : kZeroKey;
    return key < 0 ? A(0) : numbers(block_.batch(), block_.head(), key);
  }
  // Of lanes: the gain, 0 for rows that it is not for, whatever it is.
  V in_gain_rows(A gain, int l) const { return load(gain_rows_ + l) > A(0) ? splat(gain) : V{}; }

  HW_NOINLINE void copy(const Range& keys, const A* x, A* s) {
    for (int64_t j = 0; j < keys.count(); ++j)
      for (int l = lanes_.begin; l < lanes_.end; l += kLanes<A>)
        store(s + j * kRows + l, load(x + j * kRows + l));
  }

  // Bias of the tile, transposed, from where it lies or through rows of the accumulation type;
  // written or added to what is there.
  template <bool kAdd>
  HW_NOINLINE void transpose_bias(const Range& keys, A* to) {
    const int n = static_cast<int>(keys.count());
    const A* from = bias_rows_;
    int64_t ld = kKeys;
    for (int r = 0; r < rows(); ++r) {
      const int i = lanes_.begin + r;
      if (!block_.source->keys_in_order()) {
        gather_bias(keys, block_.position(i), bias_rows_ + r * kKeys);
        continue;
      }
      const T* row = bias_.at(block_.batch(), block_.head(), block_.position(i), keys.begin);
      if (bias_.stride[3] == 1) prefetch(row + kKeys, kKeys * static_cast<int64_t>(sizeof(T)));
      if constexpr (std::is_same_v<T, A> && Source::kInOrder) {
        if (bias_.stride[3] == 1) {
          if (r == 0) from = row, ld = bias_.stride[2];
          continue;
        }
      }
      widen(bias_rows_ + r * kKeys, row, n, bias_.stride[3]);
    }
    hw::transpose<kAdd>(from, ld, rows(), n, to + lanes_.begin, kRows);
  }

  // Bias of a row where keys are anywhere.
  HW_NOINLINE void gather_bias(const Range& keys, int64_t row, A* to) const {
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const int64_t key = block_.key_position(j);
      to[j - keys.begin] =
          key < 0 ? A(0) : static_cast<A>(bias_(block_.batch(), block_.head(), row, key));
    }
  }

  // Lane i sees the keys [first_[i], last_[i]) of the tile.
  HW_NOINLINE void find_limits(const Range& keys) {
    for (int i = lanes_.begin; i < lanes_.end; ++i) {
      Range seen{0, 0};
      if (i < block_.count()) seen = block_.visible_keys(i);
      first_[i] = static_cast<A>(std::clamp<int64_t>(seen.begin - keys.begin, 0, kKeys));
      last_[i] = static_cast<A>(std::clamp<int64_t>(seen.end - keys.begin, 0, kKeys));
    }
  }

  HW_NOINLINE void hide(const Range& keys, A* s) {
    for (int j = 0; j < keys.count(); ++j) {
      const A key = static_cast<A>(j);
      for (int l = lanes_.begin; l < lanes_.end; l += kLanes<A>) {
        V x = load(s + j * kRows + l);
        x = load(first_ + l) > key ? splat(-kInfinity<A>) : x;
        x = load(last_ + l) <= key ? splat(-kInfinity<A>) : x;
        store(s + j * kRows + l, x);
      }
    }
  }

  const ScoreParams& p_;
  const Score score_;
  const Ref<const T, 4> q_, k_, bias_;
  const Ref<const A, 3> key_bias_, key_gain_, temperature_;
  const ScoreShape<A> shape_;
  const int dim_;
  BlockRows<T> queries_;  // times scale tau, if not of pairs

  Block block_{};
  int width_ = 0;
  Lanes lanes_{};
  E *k_buffer_, *tile_buffer_ = nullptr;
  const T* gathered_[kKeys];  // where keys of the tile are, if they are gathered
  A *bias_rows_ = nullptr, *bias_tile_ = nullptr;
  alignas(64) A factor_[kRows], gain_rows_[kRows], first_[kRows], last_[kRows];
};

// p of a tile from s in place, replayed from the row statistic of its block.
template <class T>
class Replay {
 public:
  using A = Accum<T>;
  using V = Vec<A>;

  // What of a row is used.
  struct Statistic {
    A row = 0, rest = 0;  // softmaxes: L and its rest, +inf for rows without weight; others: 1 / n
  };

  // `rest`: of the row statistic, or absent.
  Replay(const ScoreParams& p, const Ref<const void, 3>& row, const Ref<const void, 3>& rest)
      : p_(p), row_(row.as<const A>()), rest_(rest.as<const A>()) {}

  template <class Source>
  HW_NOINLINE void load_rows(const Block<Source>& block, int width) {
    for (int i = 0; i < width; ++i) {
      const Statistic of_row = i < block.count() ? of(block, i) : Statistic{};
      row_of_[i] = of_row.row, rest_of_[i] = of_row.rest;
    }
  }

  template <class Source>
  HW_NOINLINE Statistic of(const Block<Source>& block, int i) const {
    const A row = row_ ? row_(block.batch(), block.head(), block.result(i)) : A(1);
    if (is_softmax(p_.activation)) {
      if (std::abs(row) == kInfinity<A>) return {kInfinity<A>, 0};
      return {row, rest_ ? rest_(block.batch(), block.head(), block.result(i)) : A(0)};
    }
    if (p_.normalizer == Normalizer::none) return {1};
    if (p_.normalizer == Normalizer::sum) return {row != 0 && row < kInfinity<A> ? 1 / row : A(0)};
    const int64_t seen = block.visible_keys(i).count();
    return {seen > 0 ? 1 / static_cast<A>(seen) : A(0)};
  }

  HW_NOINLINE void weights(int64_t keys, const Lanes& lanes, A* s) const {
    const bool soft = is_softmax(p_.activation);
    for (int64_t j = 0; j < keys; ++j)
      for (int l = lanes.begin; l < lanes.end; l += kLanes<A>) {
        A* at = s + j * kRows + l;
        const V row = load(row_of_ + l), x = load(at);
        store(at,
              soft ? exp_of((x - row) - load(rest_of_ + l)) : activation(p_.activation, x) * row);
      }
  }

  // p in place of s, and da / ds / n  into `slope` (not for softmaxes, where it would be p).
  HW_NOINLINE void weights_and_slopes(int64_t keys, const Lanes& lanes, A* s, A* slope) const {
    for (int64_t j = 0; j < keys; ++j)
      for (int l = lanes.begin; l < lanes.end; l += kLanes<A>) {
        A* at = s + j * kRows + l;
        const V row = load(row_of_ + l), x = load(at);
        store(slope + j * kRows + l, activation_slope(p_.activation, x) * row);
        store(at, activation(p_.activation, x) * row);
      }
  }

 private:
  const ScoreParams& p_;
  const Ref<const A, 3> row_, rest_;
  alignas(64) A row_of_[kRows], rest_of_[kRows];
};

// The scalar form of the same: one pair of a block.
template <class A, class Statistic>
A replay_weight(const ScoreParams& p, A s, const Statistic& of) {
  return is_softmax(p.activation) ? exp_of((s - of.row) - of.rest)
                                  : activation(p.activation, s) * of.row;
}

}  // namespace
}  // namespace hw::softmax
