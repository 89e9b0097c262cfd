// SPDX-License-Identifier: Apache-2.0
// Forward pass of attention on the CPU for a few queries (decoding): loop R with the keys along the
// lanes.
//
// With the queries along the lanes a single one would leave all lanes but one idle. Here a row at a
// time meets the tile of keys, which stays in L1 for the next row:
//
//   x [keys]    = k [keys, D] q [D]        one row: the partial sums of as many keys as a vector has
//                                          lanes are transposed, and their sum is a vector of scores;
//                                          several: the tile is transposed, once for all of them
//   w [Dv]     += p [keys] v [keys, Dv]
//
// With several rows both are matrix products of whole register tiles, where lanes of queries would be
// one vector, too few to hide the latency of an addition.
//
// Sums of a row, masks and scores are those of attention_cpu_forward.h.
#pragma once

#include "ops/attention/attention_cpu_tile.h"

namespace hw::attention {
namespace {

constexpr int64_t kFewRows = 4;  // blocks of up to here; from 5 on the lanes of a tile pay

// The horizontal maximum.
template <class A>
HW_INLINE A largest(Vec<A> v) {
  A top = v[0];
  for (int i = 1; i < kLanes<A>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

template <class T, class Sums>
class FewRows {
 public:
  using A = Accum<T>;
  using V = Vec<A>;
  static constexpr int kVectors = kKeys / kLanes<A>;

  // `values`: batch entries that share the scores.
  FewRows(const ForwardParams& p, int64_t values)
      : p_(p),
        q_(p.q.as<const T>()),
        k_(p.k.as<const T>()),
        v_(p.v.as<const T>()),
        bias_(p.bias.as<const T>()),
        shape_(p.softcap),
        soft_(is_softmax(p.activation)),
        padded_(round_up(p.dim(), kLanes<A>)),
        padded_values_(round_up(std::max(p.value_dim(), 1), kLanes<A>)),
        values_(values) {
    Scratch& scratch = Scratch::of_thread();
    q_rows_ = scratch.take<A>(kFewRows * padded_);
    k_room_ = scratch.take<A>(kKeys * padded_);
    v_room_ = scratch.take<A>(kKeys * padded_values_);
    columns_ = scratch.take<A>(kKeys * padded_);
    w_ = scratch.take<A>(values_ * kFewRows * padded_values_);
  }

  // Scratch memory that the constructor takes.
  static int64_t bytes(const ForwardParams& p, int64_t values) {
    const int64_t d = round_up(p.dim(), kLanes<A>);
    const int64_t dv = round_up(std::max(p.value_dim(), 1), kLanes<A>);
    return Scratch::bytes_of<A>(kFewRows * d) + Scratch::bytes_of<A>(kKeys * d) +
           Scratch::bytes_of<A>(kKeys * dv) + Scratch::bytes_of<A>(kKeys * d) +
           Scratch::bytes_of<A>(values * kFewRows * dv);
  }

  // Adds the keys to the sums of the block's rows and to `values`, w^T [values, Dv, kRows].
  void walk(const Block& block, const Range& keys, Sums& sums, A* values) {
    load_queries(block);
    std::fill_n(w_, values_ * kFewRows * padded_values_, A(0));
    for (int64_t j = keys.begin; j < keys.end; j += kKeys)
      tile(block, {j, std::min<int64_t>(j + kKeys, keys.end)}, sums);
    const int dv = p_.value_dim();
    for (int64_t n = 0; n < values_; ++n)
      hw::transpose(w_of(n, 0), padded_values_, block.count(), dv, values + n * dv * kRows, kRows);
  }

 private:
  A* w_of(int64_t n, int i) { return w_ + (n * kFewRows + i) * padded_values_; }  // [Dv]

  // q times scale tau, padded with zeros.
  void load_queries(const Block& block) {
    const Ref<const A, 3> tau = p_.row_temperature.template as<const A>();
    for (int i = 0; i < block.count(); ++i) {
      const int64_t b = block.at.batch, row = block.row(i);
      const A scale = static_cast<A>(p_.scale);
      const A factor = tau ? scale * tau(b, row, block.head) : scale;
      A* to = q_rows_ + i * padded_;
      widen(to, q_.at(b, row, block.head), p_.dim(), q_.stride[3]);
      for (int d = 0; d < p_.dim(); ++d) to[d] *= factor;
      std::fill(to + p_.dim(), to + padded_, A(0));
    }
  }

  void tile(const Block& block, const Range& keys, Sums& sums) {
    const int n = static_cast<int>(keys.count()), key_head = block.head / p_.group();
    const Panel<A> k = rows_of(k_, block, block.at.batch, keys, key_head, k_room_);
    alignas(64) A p[kFewRows][kKeys];
    bool any[kFewRows] = {};
    if (block.count() == 1)
      products(k, q_rows_, n, p[0]);
    else
      products_of_rows(k, block.count(), n, p[0]);
    for (int i = 0; i < block.count(); ++i) {
      scores(block, keys, i, p[i]);
      any[i] = soft_ ? soften(block, keys, i, p[i], sums) : activate(i, p[i], sums);
    }
    for (int64_t b = 0; v_ && b < values_; ++b) {
      const Panel<A> v = rows_of(v_, block, block.at.batch + b, keys, key_head, v_room_);
      if (block.count() > 1 && std::all_of(any, any + block.count(), [](bool x) { return x; })) {
        multiply<true>(block.count(), padded_values_, n, row_major<A>(p[0], kKeys), v.data, v.ld,
                       w_of(b, 0), padded_values_);
        continue;
      }
      for (int i = 0; i < block.count(); ++i)
        if (any[i]) add_values(v, n, p[i], w_of(b, i));
    }
  }

  static Panel<A> rows_of(const Ref<const T, 4>& x, const Block& block, int64_t batch,
                          const Range& keys, int head, A* room) {
    const int n = static_cast<int>(keys.count());
    const Ref<const T, 2> rows = rows_of_head(x, batch, head);
    for (int64_t j = keys.begin + kKeys; j < std::min(keys.end + kKeys, block.at.k_count); ++j)
      prefetch_row(rows, block.key(j));
    return vector_rows(x, batch, block.key(keys.begin), n, head, room);
  }

  // x of n keys, in lanes; 0 beyond.
  void products(const Panel<A>& k, const A* q, int n, A* x) const {
    for (int j = 0; j < kKeys; j += kLanes<A>) {
      V part[kLanes<A>];
      HW_UNROLL for (int l = 0; l < kLanes<A>; ++l) {
        part[l] = V{};
        if (j + l >= n) continue;
        const A* row = k.data + (j + l) * k.ld;
        for (int d = 0; d < padded_; d += kLanes<A>)
          part[l] = fma(load(row + d), load(q + d), part[l]);
      }
      transpose_square<A>(part);
      HW_UNROLL for (int step = kLanes<A> / 2; step > 0; step /= 2) {
        HW_UNROLL for (int l = 0; l < step; ++l) part[l] += part[l + step];
      }
      store(x + j, part[0]);
    }
  }

  // x [rows, kKeys] of n keys, in lanes; beyond, of whole vectors, 0.
  void products_of_rows(const Panel<A>& k, int rows, int n, A* x) const {
    hw::transpose(k.data, k.ld, n, p_.dim(), columns_, kKeys);
    const int wide = round_up(n, kLanes<A>);
    clear_columns(columns_, kKeys, p_.dim(), n, wide);
    multiply<false>(rows, wide, p_.dim(), row_major(static_cast<const A*>(q_rows_), padded_),
                    static_cast<const A*>(columns_), kKeys, x, kKeys);
  }

  // s of x in place; -inf where the row does not see a key.
  void scores(const Block& block, const Range& keys, int i, A* x) const {
    if (p_.softcap > 0 || bias_ || p_.key_bias || p_.key_gain) shape(block, keys, i, x);
    if (block.self) put_own(block, keys, i, x);
    const Range seen = block.visible_keys(i);
    const int64_t begin = std::clamp<int64_t>(seen.begin - keys.begin, 0, kKeys);
    const int64_t end =
        std::clamp<int64_t>(std::min(seen.end, keys.end) - keys.begin, begin, kKeys);
    std::fill(x, x + begin, -kInfinity<A>);
    std::fill(x + end, x + kKeys, -kInfinity<A>);
  }

  static void put_own(const Block& block, const Range& keys, int i, A* x) {
    const Range own = block.self[block.rows.begin + i];
    const int64_t end = std::min(own.end, keys.end);
    for (int64_t j = std::max(own.begin, keys.begin); j < end; ++j) x[j - keys.begin] = kSelf<A>;
  }

  void shape(const Block& block, const Range& keys, int i, A* x) const {
    const int64_t b = block.at.batch, in_sequence = block.place(i);
    const Ref<const A, 3> key_bias = p_.key_bias.template as<const A>(),
                          key_gain = p_.key_gain.template as<const A>();
    const bool gains = key_gain && in_sequence >= p_.gain_begin && in_sequence < p_.gain_end;
    alignas(64) A added[kKeys] = {}, gain[kKeys] = {};
    for (int64_t j = 0; j < keys.count(); ++j) {
      const int64_t key = block.key(keys.begin + j);
      if (bias_) added[j] = static_cast<A>(bias_(b, block.head, in_sequence, keys.begin + j));
      if (key_bias) added[j] += key_bias(b, block.head, key);
      if (gains) gain[j] = key_gain(b, block.head, key);
    }
    for (int l = 0; l < kKeys; l += kLanes<A>) {
      const V y = shape_.capped(load(x + l));
      store(x + l, gains ? shape_.score(y, load(gain + l), load(added + l)) : y + load(added + l));
    }
  }

  // e^(s - shift) in place of s; the sums and w move to the new maximum.
  bool soften(const Block& block, const Range& keys, int i, A* s, Sums& sums) {
    V top = load(s);
    for (int l = kLanes<A>; l < kKeys; l += kLanes<A>) top = larger(load(s + l), top);
    const A before = sums.max[i], most = largest<A>(top);
    const A to = !(before >= most) ? most : before;  // NaN is kept
    const A factor = sums.move(i, to);
    for (int64_t n = 0; to != before && n < values_; ++n)
      for (int d = 0; d < padded_values_; d += kLanes<A>)
        store(w_of(n, i) + d, load(w_of(n, i) + d) * factor);
    const A shift = to == -kInfinity<A> ? A(0) : to;
    V total{}, tilt{}, squares{};
    for (int l = 0; l < kKeys; l += kLanes<A>) {
      const V d = load(s + l) - shift, e = exp_of(d);
      total += e;
      if (p_.entropy) tilt += e * (d < A(-1e4) ? V{} : d);
      squares = fma(e, e, squares);
      store(s + l, e);
    }
    sums.sum[i] += sum<A>(total);
    sums.tilt[i] += sum<A>(tilt);
    sums.squares[i] += sum<A>(squares);
    if (p_.mass) sums.mass[i] += mass(block, keys, s);
    return true;
  }

  A mass(const Block& block, const Range& keys, const A* e) const {
    const Ref<const A, 3> m = p_.mass_keys.template as<const A>();
    A total = 0;
    for (int64_t j = 0; j < keys.count(); ++j)
      total += e[j] * m(block.at.batch, block.head, block.key(keys.begin + j));
    return total;
  }

  // a(s) in place of s; false if all of it is zero.
  bool activate(int i, A* s, Sums& sums) const {
    V total{};
    for (int l = 0; l < kKeys; l += kLanes<A>) {
      const V a = activation(p_.activation, load(s + l));
      total += a;
      store(s + l, a);
    }
    const A all = sum<A>(total);
    sums.sum[i] += all;
    return all != 0;
  }

  // w [Dv] += p [n] v [n, Dv], kAtOnce vectors of columns at a time.
  template <int kAtOnce = 8>
  void add_values(const Panel<A>& v, int n, const A* p, A* w, int column = 0) const {
    constexpr int kColumns = kAtOnce * kLanes<A>;
    for (; column + kColumns <= padded_values_; column += kColumns) {
      V sums[kAtOnce];
      HW_UNROLL for (int c = 0; c < kAtOnce; ++c) sums[c] = load(w + column + c * kLanes<A>);
      for (int j = 0; j < n; ++j) {
        const A* row = v.data + j * v.ld + column;
        const V x = splat(p[j]);
        HW_UNROLL for (int c = 0; c < kAtOnce; ++c) sums[c] =
            fma(x, load(row + c * kLanes<A>), sums[c]);
      }
      HW_UNROLL for (int c = 0; c < kAtOnce; ++c) store(w + column + c * kLanes<A>, sums[c]);
    }
    if constexpr (kAtOnce > 1)
      if (column < padded_values_) add_values<kAtOnce / 2>(v, n, p, w, column);
  }

  const ForwardParams& p_;
  const Ref<const T, 4> q_, k_, v_, bias_;
  const ScoreShape<A> shape_;
  const bool soft_;
  const int padded_, padded_values_;
  const int64_t values_;
  A *q_rows_, *k_room_, *v_room_, *columns_, *w_;  // columns: k of a tile, [D, kKeys]
};

}  // namespace
}  // namespace hw::attention
