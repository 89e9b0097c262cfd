// SPDX-License-Identifier: Apache-2.0
// The one CPU loop of linear attention: a scan over the chunks of one segment, in either direction.
//
//   a side   rows of the output          b side   rows summed into the state
//   forward  a = queries, b = keys: each chunk reads the state of earlier keys, then adds its own
//   reverse  a = keys, b = queries: the same from the last chunk to the first
//
// Per chunk and head of the a side, with the state S = (kv [F, Dv], z [F]) of the b side so far:
//   apply   out_a = S_kv^T phi(x_a) + sum_b w_ab value_b     [z_a = S_z . phi(x_a) + sum_b w_ab]
//   grad    dphi_a = S_kv value_a + S_z extra_a,  dx_a = contract(dphi_a)
//           + scale * sum_b (<value_a, value_b> + extra_a extra_b) w'(s_ab) x_b
// where sum_b runs over the visible rows of the same chunk.
//
// The state is kept as prefix + local: `prefix` is what segments before this one left, `local` what
// this segment added, from zero. So a segment's total is the same sum whether segments run one
// after another or side by side, and results do not depend on the number of threads.
#pragma once

#include "ops/linear_attention/linear_attention_cpu_chunk.h"

namespace hw::linear_attention {
namespace {

constexpr int kRowBlock = 16;  // rows of a in one score tile; a multiple of every lane count

template <class A>
struct State {
  A* kv = nullptr;  // [F, Dvp]
  A* z = nullptr;   // [F]
  bool zero = true;

  static int64_t count(const FeatureSizes<A>& s) {
    return static_cast<int64_t>(s.features) * s.dvp + round_up(s.features, kLanes<A>);
  }
  static State at(const FeatureSizes<A>& s, A* memory) {
    return {memory, memory + static_cast<int64_t>(s.features) * s.dvp, true};
  }
};

// to += from, element by element.
template <class A>
HW_NOINLINE void accumulate(const FeatureSizes<A>& s, const State<A>& from, State<A>& to) {
  if (from.zero) return;
  const int64_t n = State<A>::count(s);
  for (int64_t i = 0; i < n; i += kLanes<A>)
    store(to.kv + i, to.zero ? load(from.kv + i) : load(to.kv + i) + load(from.kv + i));
  to.zero = false;
}

// What a scan is for, known at run time: its steps are long, and one copy of them is enough.
struct Pass {
  bool apply, grad, reverse;
};

template <class T>
class Scan {
 public:
  using A = Accum<T>;

  // Of batch entry `batch` and key head `head`.
  HW_NOINLINE Scan(const FeatureSizes<A>& shape, const BackwardParams& p, const Pass& pass,
                   int64_t batch, int head)
      : s_(shape), p_(p), pass_(pass), group_(p.group()), batch_(batch), head_(head) {
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(bytes());
    key_.take(scratch, s_);
    key_.c = key_coefficients(s_);
    query_.take(scratch, s_);
    query_.c = query_coefficients(s_);
    phi_ = scratch.take<A>(s_.features * s_.ld);
    dphi_ = scratch.take<A>(pass_.grad ? s_.features * s_.ld : 0);
    dxt_ = scratch.take<A>(pass_.grad ? s_.d * s_.ld : 0);
    dx_ = scratch.take<A>(s_.capacity * s_.dp);
    dx_state_ = scratch.take<A>(s_.capacity * s_.dp);
    out_ = scratch.take<A>(s_.capacity * s_.dvp);
    denominator_ = scratch.take<A>(s_.ld);
    weight_ = scratch.take<A>(kRowBlock * s_.ld);
    d_weight_ = scratch.take<A>(kRowBlock * s_.ld);
    local_ = State<A>::at(s_, scratch.take<A>(State<A>::count(s_)));
    total_ = State<A>::at(s_, scratch.take<A>(State<A>::count(s_)));
    row_ = scratch.take<A>(s_.dvp);
  }

  // Rows [begin, end). Reads the state prefix + local; afterwards local() is the segment's own
  // total if `want_local`.
  HW_NOINLINE void run(int64_t begin, int64_t end, const State<A>& prefix, Visible visible,
                       bool within_chunk, bool want_local) {
    local_.zero = true;
    const int64_t chunks = ceil_div<int64_t>(end - begin, s_.capacity);
    for (int64_t i = 0; i < chunks; ++i) {
      const Range rows = chunk(begin, end, i, chunks);
      const int n = rows.end - rows.begin;
      const State<A> state = current(prefix);
      for (int g = 0; g < (pass_.reverse ? 1 : group_); ++g)
        output_rows(g, begin + rows.begin, n, state, visible, within_chunk);
      if (want_local || (i + 1 < chunks && within_chunk)) add_chunk(begin + rows.begin, n);
    }
  }

  // Only the sum over the b side, chunk by chunk in the order of run(): local() becomes the
  // segment's total. Once, and by a scan that has not run.
  HW_NOINLINE void total(int64_t begin, int64_t end) {
    const int64_t chunks = ceil_div<int64_t>(end - begin, s_.capacity);
    for (int64_t i = 0; i < chunks; ++i) {
      const Range rows = chunk(begin, end, i, chunks);
      add_chunk(begin + rows.begin, rows.end - rows.begin);
    }
  }

  const State<A>& local() const { return local_; }

 private:
  int64_t bytes() const {
    const int64_t f_ld = static_cast<int64_t>(s_.features) * s_.ld;
    const int64_t arrays = 2 * f_ld + s_.d * s_.ld + s_.capacity * (2 * s_.dp + s_.dvp) + s_.ld +
                           2 * kRowBlock * s_.ld + 2 * State<A>::count(s_) + s_.dvp;
    constexpr int64_t kRounding = 16 * 64;  // each array starts on a 64-byte line
    return 2 * ChunkOperands<A>::bytes(s_) + arrays * static_cast<int64_t>(sizeof(A)) + kRounding;
  }

  // Rows of the i-th chunk that the scan meets in [begin, end), counted from begin.
  Range chunk(int64_t begin, int64_t end, int64_t i, int64_t chunks) const {
    const int64_t first = (pass_.reverse ? chunks - 1 - i : i) * s_.capacity;
    return {static_cast<int>(first), static_cast<int>(min_of(first + s_.capacity, end - begin))};
  }

  // prefix + local, without a copy while one of them is empty.
  HW_NOINLINE State<A> current(const State<A>& prefix) {
    if (local_.zero) return prefix;
    if (prefix.zero) return local_;
    const int64_t n = State<A>::count(s_);
    for (int64_t i = 0; i < n; i += kLanes<A>)
      store(total_.kv + i, load(prefix.kv + i) + load(local_.kv + i));
    total_.zero = false;
    return total_;
  }

  // out = S_kv^T phi(x_a), dx = contract(S_kv value_a + S_z extra_a), then the chunk's own rows.
  HW_NOINLINE void output_rows(int g, int64_t first, int n, const State<A>& state, Visible visible,
                               bool within_chunk) {
    ChunkOperands<A>& a = pack_a(g, first, n);
    read_state(a, n, state);
    if (within_chunk)
      for (int h = 0; h < (pass_.reverse ? group_ : 1); ++h) {
        ChunkOperands<A>& b = pack_b(h, first, n);
        for (int r = 0; r < n; r += kRowBlock)
          read_chunk(a, b, r, min_of(n, r + kRowBlock), n, visible);
      }
    write_rows(g, first, n);
  }

  HW_NOINLINE void read_state(const ChunkOperands<A>& a, int n, const State<A>& state) {
    const int columns = round_up(n, kLanes<A>);
    if (state.zero) {
      if (pass_.apply) clear_columns(out_, s_.dvp, n, 0, s_.dvp);
      if (pass_.grad) clear_columns(dx_state_, s_.dp, n, 0, s_.dp);
      for (int i = 0; i < s_.ld; ++i) denominator_[i] = 0;
    } else {
      if (pass_.apply) {
        expand(s_, a.c, a.xt, n, phi_);
        multiply<false>(n, s_.dvp, s_.features, transposed(phi_, s_.ld), state.kv, s_.dvp, out_,
                        s_.dvp);
        if (!pass_.reverse)
          multiply<false>(1, columns, s_.features, row_major(state.z, 0), phi_, s_.ld, denominator_,
                          s_.ld);
      }
      if (pass_.grad) {
        multiply<false>(s_.features, columns, s_.dv, row_major(state.kv, s_.dvp), a.valuet, s_.ld,
                        dphi_, s_.ld);
        contract(s_, a.c, a.xt, n, dphi_, state.z, a.extra, dxt_);
        transpose(dxt_, s_.ld, s_.d, n, dx_state_, s_.dp);
      }
    }
    if (pass_.grad) clear_columns(dx_, s_.dp, n, 0, s_.dp);
  }

  // Rows [r0, r1) of a against the visible rows of b, both of the same chunk.
  HW_NOINLINE void read_chunk(const ChunkOperands<A>& a, const ChunkOperands<A>& b, int r0, int r1,
                              int n, Visible visible) {
    const Range seen = columns_of(visible, r0, r1, n);
    const int count = seen.end - seen.begin, columns = round_up(count, kLanes<A>), rows = r1 - r0;
    multiply<false>(rows, columns, s_.d, transposed(a.xt + r0, s_.ld), b.xt + seen.begin, s_.ld,
                    weight_, s_.ld);
    if (pass_.grad) {
      multiply<false>(rows, columns, s_.dv, row_major(a.value + r0 * s_.dvp, s_.dvp),
                      b.valuet + seen.begin, s_.ld, d_weight_, s_.ld);
      scores_to_gradients(rows, columns, a.extra + r0, b.extra + seen.begin);
      mask(visible, r0, r1, seen, d_weight_, s_.ld);
      multiply<true>(rows, s_.dp, count, row_major(d_weight_, s_.ld), b.x + seen.begin * s_.dp,
                     s_.dp, dx_ + r0 * s_.dp, s_.dp);
    }
    if (pass_.apply) {
      scores_to_weights(rows, columns);
      mask(visible, r0, r1, seen, weight_, s_.ld);
      if (!pass_.reverse) add_denominators(r0, rows, count);
      multiply<true>(rows, s_.dvp, count, row_major(weight_, s_.ld), b.value + seen.begin * s_.dvp,
                     s_.dvp, out_ + r0 * s_.dvp, s_.dvp);
    }
  }

  // weight: <x_a, x_b> -> w(scale <x_a, x_b>)
  HW_NOINLINE void scores_to_weights(int rows, int columns) {
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < columns; j += kLanes<A>) {
        A* at = weight_ + r * s_.ld + j;
        const Vec<A> score = s_.scale * load(at);
        store(at, s_.map == FeatureMap::taylor2 ? A(1) + score + A(0.5) * score * score : score);
      }
  }

  // d_weight: <value_a, value_b> -> scale * dw * w'(s), dw = <value_a, value_b> + extra_a extra_b,
  // with s from the raw products in weight_
  HW_NOINLINE void scores_to_gradients(int rows, int columns, const A* extra_a, const A* extra_b) {
    const bool quadratic = s_.map == FeatureMap::taylor2;
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < columns; j += kLanes<A>) {
        A* at = d_weight_ + r * s_.ld + j;
        const Vec<A> d_w = fma(splat(extra_a[r]), load(extra_b + j), load(at));
        const Vec<A> score = s_.scale * load(weight_ + r * s_.ld + j), d = s_.scale * d_w;
        store(at, quadratic ? d * (A(1) + score) : d);
      }
  }

  HW_NOINLINE void add_denominators(int r0, int rows, int count) {
    for (int r = 0; r < rows; ++r) {
      const A* w = weight_ + r * s_.ld;
      Vec<A> lanes{};
      int j = 0;
      for (; j + kLanes<A> <= count; j += kLanes<A>) lanes += load(w + j);
      A rest = 0;
      for (; j < count; ++j) rest += w[j];
      denominator_[r0 + r] += sum<A>(lanes) + rest;
    }
  }

  // local += the features of the b side's rows, outer product with their values.
  HW_NOINLINE void add_chunk(int64_t first, int n) {
    for (int h = 0; h < (pass_.reverse ? group_ : 1); ++h) {
      ChunkOperands<A>& b = pack_b(h, first, n);
      expand(s_, b.c, b.xt, n, phi_);
      if (local_.zero) {
        multiply<false>(s_.features, s_.dvp, n, row_major(phi_, s_.ld), b.value, s_.dvp, local_.kv,
                        s_.dvp);
        for (int f = 0; f < round_up(s_.features, kLanes<A>); ++f) local_.z[f] = 0;
      } else {
        multiply<true>(s_.features, s_.dvp, n, row_major(phi_, s_.ld), b.value, s_.dvp, local_.kv,
                       s_.dvp);
      }
      add_rows(s_, phi_, b.extra, n, local_.z);
      local_.zero = false;
    }
  }

  int64_t ahead() const { return pass_.reverse ? -s_.capacity : s_.capacity; }

  // ---- packing: which tensors make the two sides ----

  ChunkOperands<A>& pack_a(int g, int64_t first, int n) {
    return pass_.reverse ? pack_key(first, n) : pack_query(g, first, n);
  }
  ChunkOperands<A>& pack_b(int g, int64_t first, int n) {
    return pass_.reverse ? pack_query(g, first, n) : pack_key(first, n);
  }

  HW_NOINLINE ChunkOperands<A>& pack_query(int g, int64_t first, int n) {
    if (first == query_first_ && g == query_group_) return query_;
    query_first_ = first, query_group_ = g;
    const int head = head_ * group_ + g;
    pack_x<T>(s_, rows_of<const T>(p_.q, head), first, n, ahead(), query_);
    if (pass_.grad || pass_.reverse) {
      const Ref<const A, 1> z = p_.normalize ? column_of<const A>(p_.z, head) : Ref<const A, 1>{};
      pack_cotangent<T>(s_, rows_of<const T>(p_.d_o, head), rows_of<const T>(p_.o, head), z, first,
                        n, ahead(), row_, query_);
      pack_value_transposed(s_, n, query_);
    }
    return query_;
  }

  HW_NOINLINE ChunkOperands<A>& pack_key(int64_t first, int n) {
    if (first == key_first_) return key_;
    key_first_ = first;
    pack_x<T>(s_, rows_of<const T>(p_.k, head_), first, n, ahead(), key_);
    pack_value<T>(s_, rows_of<const T>(p_.v, head_), first, n, ahead(), key_);
    if (pass_.grad) pack_value_transposed(s_, n, key_);
    return key_;
  }

  // ---- writing the rows of the a side ----

  HW_NOINLINE void write_rows(int g, int64_t first, int n) {
    const int head = head_ * group_ + g;
    if (pass_.grad) {
      if (pass_.reverse)
        write_dx(rows_of<const T>(p_.k, head_), rows_of<T>(p_.d_k, head_), first, n);
      else
        write_dx(rows_of<const T>(p_.q, head), rows_of<T>(p_.d_q, head), first, n);
    }
    if (pass_.apply && pass_.reverse) {
      const Ref<T, 2> d_v = rows_of<T>(p_.d_v, head_);
      for (int i = 0; i < n; ++i) {
        prefetch_row<true>(d_v, first + i + ahead());
        narrow(d_v.at(first + i), out_ + i * s_.dvp, s_.dv, d_v.stride[1]);
      }
    }
    if (pass_.apply && !pass_.reverse) write_output(head, first, n);
  }

  // o = out / z, z = denominator + eps; a row whose z is 0 gives 0.
  HW_NOINLINE void write_output(int head, int64_t first, int n) {
    const Ref<T, 2> o = rows_of<T>(p_.o, head);
    const Ref<A, 1> z = column_of<A>(p_.z, head);
    for (int i = 0; i < n; ++i) {
      A* row = out_ + i * s_.dvp;
      prefetch_row<true>(o, first + i + ahead());
      if (p_.normalize) {
        const A z_i = denominator_[i] + static_cast<A>(p_.eps);
        const A inverse = 1 / z_i;
        for (int j = 0; j < s_.dv; ++j) row[j] = z_i != 0 ? row[j] * inverse : A(0);
        if (z) z(first + i) = z_i;
      }
      narrow(o.at(first + i), row, s_.dv, o.stride[1]);
    }
  }

  // dx * pre'(x), the part from the state and the part from the chunk together.
  HW_NOINLINE void write_dx(Ref<const T, 2> x, Ref<T, 2> d_x, int64_t first, int n) {
    for (int i = 0; i < n; ++i) {
      A* row = dx_ + i * s_.dp;
      for (int a = 0; a < s_.d; ++a) row[a] += dx_state_[i * s_.dp + a];
      if (s_.map == FeatureMap::elu1 || s_.map == FeatureMap::relu)
        for (int a = 0; a < s_.d; ++a)
          row[a] *= pre_map_derivative(s_.map, static_cast<A>(x(first + i, a)));
      narrow(d_x.at(first + i), row, s_.d, d_x.stride[1]);
    }
  }

  // Tensor [B, S, H, D] at this batch entry and a head, as [S, D]; [B, S, H] as [S].
  template <class U, class V>
  Ref<U, 2> rows_of(const Ref<V, 4>& t, int head) const {
    Ref<U, 2> r;
    r.data = t.template as<U>().at(batch_, 0, head);
    r.size[0] = t.size[1], r.size[1] = t.size[3];
    r.stride[0] = t.stride[1], r.stride[1] = t.stride[3];
    return r;
  }
  template <class U, class V>
  Ref<U, 1> column_of(const Ref<V, 3>& t, int head) const {
    Ref<U, 1> r;
    if (!t) return r;
    r.data = t.template as<U>().at(batch_, 0, head);
    r.size[0] = t.size[1], r.stride[0] = t.stride[1];
    return r;
  }

  const FeatureSizes<A> s_;
  const BackwardParams& p_;
  const Pass pass_;
  const int group_;
  const int64_t batch_;
  const int head_;

  ChunkOperands<A> key_, query_;  // what they hold: the chunk that begins at
  int64_t key_first_ = -1, query_first_ = -1;
  int query_group_ = -1;

  A* phi_;          // [F, ld]
  A* dphi_;         // [F, ld]
  A* dxt_;          // [D, ld]
  A* dx_;           // [capacity, Dp]   from the chunk
  A* dx_state_;     // [capacity, Dp]   from the state
  A* out_;          // [capacity, Dvp]
  A* denominator_;  // [ld]
  A* weight_;       // [kRowBlock, ld]
  A* d_weight_;     // [kRowBlock, ld]
  A* row_;          // [Dvp]
  State<A> local_, total_;
};

}  // namespace
}  // namespace hw::linear_attention
