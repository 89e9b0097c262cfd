// SPDX-License-Identifier: Apache-2.0
// Forward pass of attention on the CPU with the keys along the lanes: loop R for a few queries
// (decoding), or for a few keys, wherever those lie.
//
//   x [rows, keys] = q [rows, D] k^T [D, keys]    a tile of keys is transposed, once for all rows;
//                                                 for a single row sums across lanes take its place
//   w [rows, Dv]  += p [rows, keys] v [keys, Dv]
//
// With the queries along the lanes few of them would leave lanes idle, or make one vector, too few
// to hide the latency of an addition. And where all keys are one tile, neither v nor w is
// transposed here, and keys are read where they lie.
//
// Sums of a row, masks and scores are those of cpu/forward.h.
#pragma once

#include "softmax/cpu/row_sums.h"
#include "softmax/cpu/tile.h"

namespace hw::softmax {
namespace {

constexpr int64_t kFewRows = 4;  // blocks of up to here, of any keys and scores

template <class T, SortedSource Source = DenseSource, ScoreKind Score = FullScore>
class AlongKeys {
 public:
  using Block = softmax::Block<Source>;
  using A = Accum<T>;
  using V = Vec<A>;
  static constexpr int kSide = kLanes<A>;

  // Whether blocks of `rows` rows that see `keys` keys are best walked here.
  HW_NOINLINE static bool serves(const ForwardParams& p, int64_t rows, int64_t keys) {
    if (rows <= kFewRows) return true;
    const bool plain = !(p.softcap > 0 || p.bias || p.key_bias || p.key_gain || p.mass);
    return std::is_same_v<T, A> && plain && (rows <= kSide / 2 || keys <= kKeys);
  }

  // Whether keys that are gathered are best read where they lie: in vectors, or widened from there.
  static bool reads_anywhere(const Ref<const T, 4>& x) {
    return !x || (x.stride[3] == 1 && (!std::is_same_v<T, A> || x.size[3] % kSide == 0));
  }

  // `values`: batch entries that share the scores.
  HW_NOINLINE AlongKeys(const ForwardParams& p, int64_t values, const Score& score = {})
      : p_(p),
        score_(score),
        q_(p.q.as<const T>()),
        k_(p.k.as<const T>()),
        v_(p.v.as<const T>()),
        bias_(p.bias.as<const T>()),
        shape_(p.softcap),
        shaped_(p.softcap > 0 || p.bias || p.key_bias || p.key_gain),
        soft_(is_softmax(p.activation)),
        padded_(round_up(p.dim(), kSide)),
        padded_values_(round_up(std::max(p.value_dim(), 1), kSide)),
        values_(values) {
    Scratch& scratch = Scratch::of_thread();
    q_rows_ = scratch.take<A>(kRows * padded_);
    k_buffer_ = scratch.take<A>(kKeys * padded_);
    v_buffer_ = scratch.take<A>(kKeys * padded_values_);
    columns_ = scratch.take<A>(kKeys * padded_);
    p_tile_ = scratch.take<A>(kTile);
    zeros_ = scratch.take<A>(std::max(padded_, padded_values_));
    std::fill_n(zeros_, std::max(padded_, padded_values_), A(0));
  }

  // Scratch memory that the constructor takes.
  static int64_t bytes(const ForwardParams& p) {
    const int64_t d = round_up(p.dim(), kSide), dv = round_up(std::max(p.value_dim(), 1), kSide);
    return Scratch::bytes_of<A>(kRows * d) + 2 * Scratch::bytes_of<A>(kKeys * d) +
           Scratch::bytes_of<A>(kKeys * dv) + Scratch::bytes_of<A>(kTile) +
           Scratch::bytes_of<A>(std::max(d, dv));
  }

  // Adds the keys to the sums of the block's rows, and makes w of them, [values, kRows, padded Dv].
  // To be called once: w is empty before.
  HW_NOINLINE void walk(const Block& block, const Range& keys, BlockSums<A>& sums, A* w,
                        Prefetches& prefetches) {
    w_ = w;
    load_queries(block);
    for (int64_t j = keys.begin; j < keys.end; j += kKeys)
      tile(block, {j, std::min<int64_t>(j + kKeys, keys.end)}, sums, prefetches);
    if (empty_) clear(block.count());
    prefetches.rest();
  }

 private:
  A* w_of(int64_t n, int i) { return w_ + (n * kRows + i) * padded_values_; }  // [Dv]

  HW_NOINLINE void clear(int rows) {
    for (int64_t n = 0; n < values_; ++n) std::fill_n(w_of(n, 0), rows * padded_values_, A(0));
  }

  // q times scale tau, padded with zeros. Where a Tile multiplies pairs, x takes the factor after
  // the product, as there: weights that a Tile makes again must be those of here (scores near 1e7
  // are apart by whole numbers).
  HW_NOINLINE void load_queries(const Block& block) {
    const Ref<const A, 3> tau = p_.row_temperature.template as<const A>();
    const Ref<const T, 2> q = rows_of_head(q_, block.batch(), block.head());
    const A scale = static_cast<A>(p_.scale);
    const int dim = p_.dim();
    for (int i = 0; i < block.count(); ++i) {
      const A whole = tau ? scale * tau(block.batch(), block.number(i), block.head()) : scale;
      const A factor = kPaired<T> ? A(1) : whole;
      factor_[i] = whole;
      const T* from = q.at(block.token(i));
      if (i + kRowsAhead < block.count()) prefetch_row(q, block.token(i + kRowsAhead));
      A* to = q_rows_ + i * padded_;
      if constexpr (std::is_same_v<T, A>)
        if (q.stride[1] == 1 && dim == padded_) {
          for (int d = 0; d < dim; d += kSide) store(to + d, load(from + d) * factor);
          continue;
        }
      widen(to, from, dim, q.stride[1]);
      for (int d = 0; d < dim; ++d) to[d] *= factor;
      std::fill(to + dim, to + padded_, A(0));
    }
  }

  void tile(const Block& block, const Range& keys, BlockSums<A>& sums, Prefetches& prefetches) {
    const int n = static_cast<int>(keys.count());
    with_rows(k_, block, block.key_batch(), keys, k_buffer_,
              [&](const auto& k) { products(k, block.count(), n, prefetches); });
    if constexpr (kPaired<T>)
      for (int i = 0; i < block.count(); ++i)
        for (int l = 0; l < kKeys; l += kSide) store(p_of(i) + l, load(p_of(i) + l) * factor_[i]);
    const bool open = n == kKeys && block.sees_whole(keys);
    for (int i = 0; i < block.count(); ++i) {
      if (shaped_) shape(block, keys, i, p_of(i));
      if constexpr (Score::kSets)
        if (score_.sets()) set_scores(block, keys, i, p_of(i));
      if (!open) hide(block, keys, i, p_of(i));
    }
    bool all = true;
    bool any[kRows];
    if (soft_)
      for (int i = 0; i < block.count(); i += kSide) exponentiate(block, keys, i, sums);
    else
      for (int i = 0; i < block.count(); ++i) all &= any[i] = activate(i, sums);
    for (int64_t b = 0; v_ && b < values_; ++b)
      with_rows(v_, block, block.key_batch() + b, keys, v_buffer_, [&](const auto& v) {
        if (all)
          add_values(v, block.count(), n, w_of(b, 0), prefetches);
        else
          add_values_of(any, v, block.count(), n, b);
      });
    empty_ &= !(v_ && values_ > 0);
  }

  A* p_of(int i) { return p_tile_ + i * kKeys; }

  // f(rows) with the tile's rows of x in vectors.
  template <class F>
  void with_rows(const Ref<const T, 4>& x, const Block& block, int64_t batch, const Range& keys,
                 A* buffer, F f) const {
    const T* gathered[kKeys];
    const T* zeros = nullptr;
    if constexpr (std::is_same_v<T, A>)
      if (x.stride[3] == 1) zeros = zeros_;
    const Rows<T> some = rows_of_keys<T>(x, block, batch, keys, nullptr, gathered, zeros);
    if constexpr (std::is_same_v<T, A> && Source::kGathers)
      if (some.gathered != nullptr && reads_anywhere(x)) return f(RowPointers<A>{gathered});
    if (some.gathered == nullptr) {
      const Ref<const T, 2> rows = rows_of_head(x, batch, some.head);
      for (int64_t j = keys.begin + kKeys; j < std::min(keys.end + kKeys, block.key_count()); ++j)
        prefetch_row(rows, block.key_token(j));
    }
    if constexpr (std::is_same_v<T, A>)
      if (some.gathered == nullptr && reads_anywhere(x))
        return f(Panel<A>{some.row(0), x.stride[1]});
    f(vector_rows(some, buffer));
  }

  // x of n keys in lanes; beyond them in whole vectors anything, which is hidden.
  template <class K>
  void products(const K& k, int rows, int n, Prefetches& prefetches) {
    if (rows == 1) return products_of_row(k, n, p_tile_);
    hw::transpose(k, n, p_.dim(), columns_, kKeys);
    multiply<false>(rows, round_up(n, kSide), p_.dim(),
                    row_major(static_cast<const A*>(q_rows_), padded_), Panel<A>{columns_, kKeys},
                    p_tile_, kKeys, NoFactors{}, &prefetches);
  }

  template <class K>
  void products_of_row(const K& k, int n, A* x) const {
    for (int j = 0; j < n; j += kSide) {
      V part[kSide];
      HW_UNROLL for (int l = 0; l < kSide; ++l) {
        part[l] = V{};
        if (j + l >= n) continue;
        const A* row = k.row(j + l);
        for (int d = 0; d < padded_; d += kSide)
          part[l] = fma(load(row + d), load(q_rows_ + d), part[l]);
      }
      store(x + j, across<A>(part, [](V a, V b) { return a + b; }));
    }
  }

  // -inf where the row does not see a key, and beyond the keys.
  HW_NOINLINE void hide(const Block& block, const Range& keys, int i, A* s) const {
    const Range seen = block.visible_keys(i);
    const int64_t begin = std::clamp<int64_t>(seen.begin - keys.begin, 0, kKeys);
    const int64_t end =
        std::clamp<int64_t>(std::min(seen.end, keys.end) - keys.begin, begin, kKeys);
    std::fill(s, s + begin, -kInfinity<A>);
    std::fill(s + end, s + kKeys, -kInfinity<A>);
  }

  HW_NOINLINE void set_scores(const Block& block, const Range& keys, int i, A* s) const {
    const Range some = block.set_keys(score_, i);
    const int64_t end = std::min(some.end, keys.end);
    for (int64_t j = std::max(some.begin, keys.begin); j < end; ++j)
      s[j - keys.begin] = A(Score::kSetScore);
  }

  // s of x in place, masks apart.
  HW_NOINLINE void shape(const Block& block, const Range& keys, int i, A* x) const {
    const int64_t b = block.batch(), row = block.position(i);
    const int h = block.head();
    const Ref<const A, 3> key_bias = p_.key_bias.template as<const A>(),
                          key_gain = p_.key_gain.template as<const A>();
    const bool gains = key_gain && row >= p_.gain_begin && row < p_.gain_end;
    alignas(64) A added[kKeys] = {}, gain[kKeys] = {};
    for (int64_t j = 0; j < keys.count(); ++j) {
      const int64_t slot = keys.begin + j, key = block.key_number(slot);
      if (key < 0) continue;
      if (bias_) added[j] = static_cast<A>(bias_(b, h, row, block.key_position(slot)));
      if (key_bias) added[j] += key_bias(b, h, key);
      if (gains) gain[j] = key_gain(b, h, key);
    }
    for (int l = 0; l < keys.count(); l += kSide) {
      const V y = shape_.capped(load(x + l));
      store(x + l, gains ? shape_.score(y, load(gain + l), load(added + l)) : y + load(added + l));
    }
  }

  // e^(s - shift) in place of s, of a vector of rows from i on; their sums and w move to the new
  // maximum. What is summed across lanes is so for all of them at once.
  HW_NOINLINE void exponentiate(const Block& block, const Range& keys, int i, BlockSums<A>& sums) {
    const int rows = std::min(kSide, block.count() - i);
    const int wide = round_up(static_cast<int>(keys.count()), kSide);
    V most[kSide];
    for (int r = 0; r < kSide; ++r) most[r] = r < rows ? top(p_of(i + r), wide) : V{};
    const V before = load(sums.max + i);
    const V to = larger(across<A>(most, [](V a, V b) { return larger(a, b); }), before);
    alignas(64) A factor[kSide], shift[kSide];
    V moved{};
    store(factor, sums.move(i, to, moved));
    store(shift, to == -kInfinity<A> ? V{} : to);
    if (!empty_ && sum<A>(moved) != 0) rescale(i, rows, factor);
    V total[kSide] = {};
    if (p_.entropy || p_.sq_norm) {
      V tilt[kSide] = {}, squares[kSide] = {};
      for (int r = 0; r < rows; ++r)
        total[r] = weigh(p_of(i + r), shift[r], wide, [&](V d, V e) {
          tilt[r] += e * (d < A(-1e4) ? V{} : d);
          squares[r] = fma(e, e, squares[r]);
        });
      add_across(sums.tilt + i, tilt);
      add_across(sums.squares + i, squares);
    } else {
      for (int r = 0; r < rows; ++r) total[r] = weigh(p_of(i + r), shift[r], wide, [](V, V) {});
    }
    add_across(sums.sum + i, total);
    for (int r = 0; p_.mass && r < rows; ++r) sums.mass[i + r] += mass(block, keys, p_of(i + r));
  }

  static V top(const A* s, int wide) {
    V most = load(s);
    for (int l = kSide; l < wide; l += kSide) most = larger(load(s + l), most);
    return most;
  }

  // e^(s - shift) in place of s, and their sum in lanes; visit(s - shift, e) on the way.
  template <class Visit>
  static V weigh(A* s, A shift, int wide, Visit visit) {
    V total{};
    for (int l = 0; l < wide; l += kSide) {
      const V d = load(s + l) - shift, e = exp_of(d);
      total += e;
      visit(d, e);
      store(s + l, e);
    }
    return total;
  }

  static void add_across(A* to, V (&rows)[kSide]) {
    store(to, load(to) + across<A>(rows, [](V a, V b) { return a + b; }));
  }

  HW_NOINLINE void rescale(int i, int rows, const A* factor) {
    for (int64_t n = 0; n < values_; ++n)
      for (int r = 0; r < rows; ++r)
        for (int d = 0; d < padded_values_; d += kSide)
          store(w_of(n, i + r) + d, load(w_of(n, i + r) + d) * factor[r]);
  }

  HW_NOINLINE A mass(const Block& block, const Range& keys, const A* e) const {
    const Ref<const A, 3> m = p_.mass_keys.template as<const A>();
    A total = 0;
    for (int64_t j = 0; j < keys.count(); ++j)
      if (const int64_t key = block.key_number(keys.begin + j); key >= 0)
        total += e[j] * m(block.batch(), block.head(), key);
    return total;
  }

  // a(s) in place of s; false if all of it is zero.
  HW_NOINLINE bool activate(int i, BlockSums<A>& sums) {
    V total{};
    for (int l = 0; l < kKeys; l += kSide) {
      A* s = p_of(i) + l;
      const V a = activation(p_.activation, load(s));
      total += a;
      store(s, a);
    }
    const A all = sum<A>(total);
    sums.sum[i] += all;
    return all != 0;
  }

  // w [rows, Dv] += p [rows, n] v [n, Dv]
  template <class Values>
  void add_values(const Values& v, int rows, int n, A* w, Prefetches& prefetches) {
    if (rows == 1) {
      if (empty_) std::fill_n(w, padded_values_, A(0));
      return add_values_of_row(v, n, p_tile_, w);
    }
    const Operand<A> p = row_major(static_cast<const A*>(p_tile_), kKeys);
    if (empty_)
      multiply<false>(rows, padded_values_, n, p, v, w, padded_values_, NoFactors{}, &prefetches);
    else
      multiply<true>(rows, padded_values_, n, p, v, w, padded_values_, NoFactors{}, &prefetches);
  }

  // The same of the rows that have `any` weight.
  template <class Values>
  HW_NOINLINE void add_values_of(const bool* any, const Values& v, int rows, int n, int64_t b) {
    if (empty_ && b == 0) clear(rows);
    for (int i = 0; i < rows; ++i)
      if (any[i]) add_values_of_row(v, n, p_of(i), w_of(b, i));
  }

  // kAtOnce vectors of columns at a time.
  template <int kAtOnce = 8, class Values>
  void add_values_of_row(const Values& v, int n, const A* p, A* w, int column = 0) const {
    constexpr int kColumns = kAtOnce * kSide;
    for (; column + kColumns <= padded_values_; column += kColumns) {
      V sums[kAtOnce];
      HW_UNROLL for (int c = 0; c < kAtOnce; ++c) sums[c] = load(w + column + c * kSide);
      for (int j = 0; j < n; ++j) {
        const A* row = v.row(j) + column;
        const V x = splat(p[j]);
        HW_UNROLL for (int c = 0; c < kAtOnce; ++c) sums[c] =
            fma(x, load(row + c * kSide), sums[c]);
      }
      HW_UNROLL for (int c = 0; c < kAtOnce; ++c) store(w + column + c * kSide, sums[c]);
    }
    if constexpr (kAtOnce > 1)
      if (column < padded_values_) add_values_of_row<kAtOnce / 2>(v, n, p, w, column);
  }

  const ForwardParams& p_;
  const Score score_;
  const Ref<const T, 4> q_, k_, v_, bias_;
  const ScoreShape<A> shape_;
  const bool shaped_, soft_;
  const int padded_, padded_values_;
  const int64_t values_;
  A* q_rows_;  // [kRows, padded D]
  A *k_buffer_,
      *v_buffer_;      // a tile's rows where they are not read in place, [kKeys, padded D | Dv]
  A* columns_;         // k of a tile, [D, kKeys]
  A* p_tile_;          // [rows, kKeys]
  A* zeros_;           // the row of a zero key, [padded D or Dv]
  A* w_ = nullptr;     // [values, kRows, padded Dv]
  bool empty_ = true;  // nothing was added to w
  A factor_[kRows];    // scale tau
};

}  // namespace
}  // namespace hw::softmax
