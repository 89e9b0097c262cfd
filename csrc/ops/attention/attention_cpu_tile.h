// SPDX-License-Identifier: Apache-2.0
// The tile that every CPU loop of attention works on: scores of up to 64 keys x 64 queries.
//
// Tiles are [keys, kRows] with the queries along the lanes. So nothing is summed across lanes: the
// running maximum and sum of a row are elements of vectors. And nothing is packed but the queries,
// once per block: in all products the operand whose elements are broadcast may lie anywhere,
//
//   x^T   [keys, rows] = k [keys, D]      q^T [D, rows]
//   w^T   [Dv, rows]  += v^T [Dv, keys]   p^T [keys, rows]
//   dp^T  [keys, rows] = v [keys, Dv]     d_w^T [Dv, rows]
//   d_v   [keys, Dv]  += p^T [keys, rows] d_w [rows, Dv]
//   d_k   [keys, D]   += dx^T [keys, rows] q [rows, D]
//   d_q   [rows, D]   += dx [rows, keys]  k [keys, D]
//
// q is multiplied by scale tau_i when it is packed.
#pragma once

#include <algorithm>
#include <limits>

#include "ops/attention/attention_score.h"

#include "core/matmul.h"
#include "core/parallel.h"
#include "core/simd_math.h"
#include "core/transpose.h"

namespace hw::attention {
namespace {

constexpr int kRows = 64;  // queries of a block: distance of two keys in a tile
constexpr int kKeys = 64;  // keys of a tile
constexpr int kTile = kKeys * kRows;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// Queries of one head of one sequence; `rows` and all key ranges count from the sequence's start.
struct Block {
  Sequence at;
  Mask mask;
  int head;
  Range rows;

  int count() const { return static_cast<int>(rows.count()); }
  int64_t row(int64_t i) const { return at.q_begin + rows.begin + i; }  // lane -> row of the tensor
  int64_t key(int64_t j) const { return at.k_begin + j; }
};

// [S, width] of one head.
template <class T>
Ref<const T, 2> rows_of_head(const Ref<const T, 4>& x, int64_t batch, int head) {
  return {x.at(batch, 0, head), {x.size[1], x.size[3]}, {x.stride[1], x.stride[3]}};
}

// Rows of one head of a tensor as the broadcast operand of a product: in place if they have the
// accumulation type, else widened into `room` [n, width].
template <class T>
Operand<Accum<T>> broadcast_rows(const Ref<const T, 4>& x, int64_t batch, int64_t first, int n,
                                 int head, Accum<T>* room) {
  const Ref<const T, 2> rows = rows_of_head(x, batch, head);
  for (int i = 0; i < n; ++i) prefetch_row(rows, first + i + kKeys);
  if constexpr (std::is_same_v<T, Accum<T>>) {
    return {x.at(batch, first, head), x.stride[1], x.stride[3]};
  } else {
    const int64_t width = x.size[3];
    for (int i = 0; i < n; ++i)
      widen(room + i * width, x.at(batch, first + i, head), width, x.stride[3]);
    return {room, width, 1};
  }
}

template <class A>
Operand<A> transposed(const Operand<A>& a) {
  return {a.data, a.col, a.row};
}

// The same as the operand that is read in vectors: rows padded with zeros to whole ones.
template <class A>
struct Panel {
  const A* data;
  int64_t ld;
};

template <class T>
Panel<Accum<T>> vector_rows(const Ref<const T, 4>& x, int64_t batch, int64_t first, int n, int head,
                            Accum<T>* room) {
  using A = Accum<T>;
  const int width = static_cast<int>(x.size[3]), padded = round_up(width, kLanes<A>);
  if constexpr (std::is_same_v<T, A>) {
    if (x.stride[3] == 1 && width == padded) return {x.at(batch, first, head), x.stride[1]};
  }
  for (int i = 0; i < n; ++i)
    widen(room + i * padded, x.at(batch, first + i, head), width, x.stride[3]);
  clear_columns(room, padded, n, width, padded);
  return {room, padded};
}

template <class T>
class Tile {
 public:
  using A = Accum<T>;
  using V = Vec<A>;

  explicit Tile(const ScoreParams& p)
      : p_(p),
        q_(p.q.as<const T>()),
        k_(p.k.as<const T>()),
        bias_(p.bias.as<const T>()),
        key_bias_(p.key_bias.as<const A>()),
        key_gain_(p.key_gain.as<const A>()),
        temperature_(p.row_temperature.as<const A>()),
        shape_(p.softcap),
        dim_(p.dim()),
        padded_(round_up(p.dim(), kLanes<A>)) {
    Scratch& scratch = Scratch::of_thread();
    q_rows_ = scratch.take<A>(kRows * padded_);
    q_columns_ = scratch.take<A>(std::max(dim_, 1) * kRows);
    k_room_ = scratch.take<A>(kKeys * padded_);
    if (bias_) {
      bias_rows_ = scratch.take<A>(kTile);
      bias_tile_ = scratch.take<A>(kTile);
    }
  }

  // Scratch memory that the constructor takes.
  static int64_t bytes(const ScoreParams& p) {
    const int64_t padded = round_up(p.dim(), kLanes<A>);
    return Scratch::bytes_of<A>(kRows * padded) +
           Scratch::bytes_of<A>(std::max(p.dim(), 1) * kRows) +
           Scratch::bytes_of<A>(kKeys * padded) + 2 * Scratch::bytes_of<A>(kTile);
  }

  // Whether s differs from x (masks apart), and whether dx differs from ds.
  bool shapes_scores() const { return p_.softcap > 0 || key_gain_ || key_bias_ || bias_; }
  bool shapes_gradients() const { return p_.softcap > 0 || key_gain_; }

  const Block& block() const { return block_; }
  int width() const { return width_; }          // lanes in use, whole vectors
  int padded() const { return padded_; }        // D in whole vectors
  const A* queries() const { return q_rows_; }  // [rows, padded()], times scale tau
  A factor(int i) const { return factor_[i]; }  // scale tau of lane i

  void load_queries(const Block& block) {
    block_ = block;
    width_ = round_up(block.count(), kLanes<A>);
    const A scale = static_cast<A>(p_.scale);
    for (int i = 0; i < block.count(); ++i) {
      const int64_t row = block.row(i);
      factor_[i] = temperature_ ? scale * temperature_(block.at.batch, row, block.head) : scale;
      A* to = q_rows_ + i * padded_;
      widen(to, q_.at(block.at.batch, row, block.head), dim_, q_.stride[3]);
      for (int d = 0; d < dim_; ++d) to[d] *= factor_[i];
      const int64_t in_sequence = block.rows.begin + i;
      gain_rows_[i] = in_sequence >= p_.gain_begin && in_sequence < p_.gain_end ? A(1) : A(0);
    }
    clear_columns(q_rows_, padded_, block.count(), dim_, padded_);
    hw::transpose(q_rows_, padded_, block.count(), dim_, q_columns_, kRows);
    clear_columns(q_columns_, kRows, dim_, block.count(), width_);
    for (int i = block.count(); i < width_; ++i) gain_rows_[i] = 0;
  }

  // x of the keys [keys.begin, keys.end), at most kKeys.
  void products(const Range& keys, A* x) {
    const int n = static_cast<int>(keys.count());
    const Operand<A> k =
        broadcast_rows(k_, block_.at.batch, block_.key(keys.begin), n, key_head(), k_room_);
    if (dim_ > 0)
      multiply<false>(n, width_, dim_, k, q_columns_, kRows, x, kRows);
    else
      std::fill_n(x, n * kRows, A(0));
  }

  // s from x, which may be the same array; -inf where a row does not see a key.
  void scores(const Range& keys, const A* x, A* s) {
    const bool masked = !block_.mask.whole(block_.rows, keys);
    if (masked) find_limits(keys);
    if (!shapes_scores()) {
      if (x != s) copy(keys, x, s);
      if (masked) hide(keys, s);
      return;
    }
    if (bias_) load_bias(keys);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const int64_t at = (j - keys.begin) * kRows;
      const A gain = gain_of(j), added = key_bias_ ? key_bias_of(j) : A(0);
      for (int l = 0; l < width_; l += kLanes<A>) {
        const V y = shape_.capped(load(x + at + l));
        const V sum = bias_ ? load(bias_tile_ + at + l) + added : splat(added);
        store(s + at + l, key_gain_ ? shape_.score(y, gain * load(gain_rows_ + l), sum) : y + sum);
      }
    }
    if (masked) hide(keys, s);
  }

  // dx from ds in place; x as products() left it. `d_gain`: per key of the tile, added to, or null.
  void chain(const Range& keys, const A* x, A* ds, A* d_gain) {
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const int64_t at = (j - keys.begin) * kRows;
      const A gain = gain_of(j);
      V total{};
      for (int l = 0; l < width_; l += kLanes<A>) {
        const V y = shape_.capped(load(x + at + l)), g = load(gain_rows_ + l),
                d = load(ds + at + l);
        total = fma(d * g, abs_of(y), total);
        store(ds + at + l, d * shape_.slope(y, gain * g));
      }
      if (d_gain != nullptr) d_gain[j - keys.begin] += sum<A>(total);
    }
  }

  // k of the tile as products() read it, and as the operand that is read in vectors.
  Panel<A> keys_in_vectors(const Range& keys) {
    return vector_rows(k_, block_.at.batch, block_.key(keys.begin), static_cast<int>(keys.count()),
                       key_head(), k_room_);
  }

  int key_head() const { return block_.head / p_.group(); }

 private:
  A gain_of(int64_t j) const {
    return key_gain_ ? key_gain_(block_.at.batch, block_.head, block_.key(j)) : A(0);
  }
  A key_bias_of(int64_t j) const { return key_bias_(block_.at.batch, block_.head, block_.key(j)); }

  void copy(const Range& keys, const A* x, A* s) {
    for (int64_t j = 0; j < keys.count(); ++j)
      for (int l = 0; l < width_; l += kLanes<A>) store(s + j * kRows + l, load(x + j * kRows + l));
  }

  // Bias of the tile, transposed.
  void load_bias(const Range& keys) {
    const int n = static_cast<int>(keys.count());
    for (int i = 0; i < block_.count(); ++i) {
      const T* row = bias_.at(block_.at.batch, block_.head, block_.rows.begin + i, keys.begin);
      if (bias_.stride[3] == 1) prefetch(row + kKeys, kKeys * static_cast<int64_t>(sizeof(T)));
      widen(bias_rows_ + i * kKeys, row, n, bias_.stride[3]);
    }
    hw::transpose(bias_rows_, kKeys, block_.count(), n, bias_tile_, kRows);
    clear_columns(bias_tile_, kRows, n, block_.count(), width_);
  }

  // Lane i sees the keys [first_[i], last_[i]) of the tile.
  void find_limits(const Range& keys) {
    for (int i = 0; i < width_; ++i) {
      Range seen{0, 0};
      if (i < block_.count()) seen = block_.mask.visible_keys(block_.rows.begin + i);
      first_[i] = static_cast<A>(std::clamp<int64_t>(seen.begin - keys.begin, 0, kKeys));
      last_[i] = static_cast<A>(std::clamp<int64_t>(seen.end - keys.begin, 0, kKeys));
    }
  }

  void hide(const Range& keys, A* s) {
    for (int j = 0; j < keys.count(); ++j) {
      const A key = static_cast<A>(j);
      for (int l = 0; l < width_; l += kLanes<A>) {
        V x = load(s + j * kRows + l);
        x = load(first_ + l) > key ? splat(-kInfinity<A>) : x;
        x = load(last_ + l) <= key ? splat(-kInfinity<A>) : x;
        store(s + j * kRows + l, x);
      }
    }
  }

  const ScoreParams& p_;
  const Ref<const T, 4> q_, k_, bias_;
  const Ref<const A, 3> key_bias_, key_gain_, temperature_;
  const ScoreShape<A> shape_;
  const int dim_, padded_;

  Block block_{};
  int width_ = 0;
  A *q_rows_, *q_columns_, *k_room_;
  A *bias_rows_ = nullptr, *bias_tile_ = nullptr;
  alignas(64) A factor_[kRows], gain_rows_[kRows], first_[kRows], last_[kRows];
};

// p of a tile from s in place, replayed from the row statistic of its block.
template <class T>
class Replay {
 public:
  using A = Accum<T>;
  using V = Vec<A>;

  Replay(const ScoreParams& p, const Ref<const void, 3>& row) : p_(p), row_(row.as<const A>()) {}

  void load_rows(const Block& block, int width) {
    width_ = width;
    for (int i = 0; i < width; ++i) row_of_[i] = i < block.count() ? of(block, i) : A(0);
  }

  // What of the row is used: softmaxes L, with +inf for rows without weight; others 1 / n.
  A of(const Block& block, int i) const {
    const A row = row_ ? row_(block.at.batch, block.head, block.row(i)) : A(1);
    if (is_softmax(p_.activation)) return row == -kInfinity<A> ? kInfinity<A> : row;
    if (p_.normalizer == Normalizer::none) return 1;
    if (p_.normalizer == Normalizer::sum) return row != 0 && row < kInfinity<A> ? 1 / row : A(0);
    const int64_t seen = block.mask.visible_keys(block.rows.begin + i).count();
    return seen > 0 ? 1 / static_cast<A>(seen) : A(0);
  }

  void weights(int64_t keys, A* s) const {
    const bool soft = is_softmax(p_.activation);
    for (int64_t j = 0; j < keys; ++j)
      for (int l = 0; l < width_; l += kLanes<A>) {
        A* at = s + j * kRows + l;
        const V row = load(row_of_ + l), x = load(at);
        store(at, soft ? exp_of(x - row) : activation(p_.activation, x) * row);
      }
  }

  // p in place of s, and da / ds / n  into `slope` (not for softmaxes, where it would be p).
  void weights_and_slopes(int64_t keys, A* s, A* slope) const {
    for (int64_t j = 0; j < keys; ++j)
      for (int l = 0; l < width_; l += kLanes<A>) {
        A* at = s + j * kRows + l;
        const V row = load(row_of_ + l), x = load(at);
        store(slope + j * kRows + l, activation_slope(p_.activation, x) * row);
        store(at, activation(p_.activation, x) * row);
      }
  }

 private:
  const ScoreParams& p_;
  const Ref<const A, 3> row_;
  int width_ = 0;
  alignas(64) A row_of_[kRows];
};

// The scalar form of the same: one pair of a block.
template <class A>
A replay_weight(const ScoreParams& p, A s, A row) {
  return is_softmax(p.activation) ? exp_of(s - row) : activation(p.activation, s) * row;
}

}  // namespace
}  // namespace hw::attention
