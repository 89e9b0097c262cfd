// SPDX-License-Identifier: Apache-2.0
// Key-only softmax scan on the CPU; the mathematics is in key_scan.h.
//
// A head is a chain over time, vectorised over Dv. With many (batch, head) pairs each pair is one
// task; with few, time is cut into segments: (a) each segment scans from an empty state, (b) the
// segments' ends are combined in order, (c) each segment scans again from its true start. The
// choice depends on the shape alone, never on the number of threads, so neither do the results.
#include "ops/key_scan/key_scan.h"

#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "core/registry.h"
#include "core/simd.h"

namespace hw::key_scan {
namespace {

constexpr int64_t kSegment = 1024;  // tokens
constexpr int64_t kManyPairs = 8;   // pairs from which time is not cut
template <class A>
constexpr A kNone = -std::numeric_limits<A>::infinity();  // the log-sum of no keys

// e^{from - to} for from <= to; 0 where nothing was summed yet.
template <class A>
A decay(A from, A to) {
  return from == kNone<A> ? A(0) : std::exp(from - to);
}

// One step of the chain: L' = logaddexp(L, s), keep = e^{L - L'}, take = e^{s - L'}.
template <class A>
struct Mix {
  A lse, keep, take;
};

template <class A>
Mix<A> mix(A lse, A s) {
  if (s == kNone<A>) return {lse, 1, 0};
  if (lse == kNone<A>) return {s, 0, 1};
  const A d = s - lse;
  if (d <= 0) {
    const A e = std::exp(d), whole = 1 + e;
    return {lse + std::log1p(e), 1 / whole, e / whole};
  }
  const A e = std::exp(-d), whole = 1 + e;
  return {s + std::log1p(e), e / whole, 1 / whole};
}

// to = a to + b from
template <class A>
void blend(A a, A* __restrict to, A b, const A* __restrict from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = a * to[j] + b * from[j];
}

template <class A>
A dot(const A* x, const A* y, int64_t n) {
  A lanes[kLanes<A>] = {};
  int64_t j = 0;
  for (; j + kLanes<A> <= n; j += kLanes<A>)
    for (int l = 0; l < kLanes<A>; ++l) lanes[l] += x[j + l] * y[j + l];
  A total = 0;
  for (int l = 0; l < kLanes<A>; ++l) total += lanes[l];
  for (; j < n; ++j) total += x[j] * y[j];
  return total;
}

// The segments of one (batch, head) pair.
struct Segments {
  int64_t tokens, length;
  Segments(int64_t pairs, int64_t tokens)
      : tokens(tokens), length(pairs >= kManyPairs ? (tokens > 0 ? tokens : 1) : kSegment) {}
  int64_t count() const { return (tokens + length - 1) / length; }
  int64_t begin(int64_t i) const { return i * length; }
  int64_t end(int64_t i) const { return begin(i) + length < tokens ? begin(i) + length : tokens; }
};

// One accumulated row and one number per (pair, segment).
template <class A>
class Boundaries {
 public:
  Boundaries(int64_t pairs, int64_t segments, int64_t width)
      : segments_(segments), stride_(width + 1), data_(new A[pairs * segments * stride_]()) {}
  Boundaries(const Boundaries&) = delete;
  Boundaries& operator=(const Boundaries&) = delete;
  ~Boundaries() { delete[] data_; }
  A& number(int64_t pair, int64_t segment) { return *at(pair, segment); }
  A* row(int64_t pair, int64_t segment) { return at(pair, segment) + 1; }

 private:
  A* at(int64_t pair, int64_t segment) { return data_ + (pair * segments_ + segment) * stride_; }
  const int64_t segments_, stride_;
  A* const data_;
};

template <class T>
class Forward {
 public:
  using A = Accum<T>;
  explicit Forward(const Call& call)
      : p_(forward_params(call)),
        threads_(call.context.num_threads),
        heads_(p_.v.size[2]),
        width_(p_.v.size[3]),
        pairs_(p_.v.size[0] * heads_),
        segments_(pairs_, p_.v.size[1]) {}

  void run() {
    const int64_t count = segments_.count();
    Boundaries<A> start(pairs_, count + 1, width_);
    parallel_tasks(pairs_, threads_, [&](int64_t pair) { load_start(pair, start); });
    if (count > 1) {
      Boundaries<A> own(pairs_, count, width_);
      parallel_tasks(pairs_ * count, threads_, [&](int64_t task) {
        const int64_t pair = task / count, i = task % count;
        own.number(pair, i) = scan<false>(pair, i, kNone<A>, own.row(pair, i));
      });
      parallel_tasks(pairs_, threads_, [&](int64_t pair) {
        for (int64_t i = 0; i < count; ++i) combine(pair, i, start, own);
      });
    }
    parallel_tasks(pairs_ * count, threads_, [&](int64_t task) {
      const int64_t pair = task / count, i = task % count;
      A* o = start.row(pair, i);
      const A lse = scan<true>(pair, i, start.number(pair, i), o);
      if (i + 1 == count) store_end(pair, lse, o);
    });
    if (count == 0)
      for (int64_t pair = 0; pair < pairs_; ++pair)
        store_end(pair, start.number(pair, 0), start.row(pair, 0));
  }

 private:
  void load_start(int64_t pair, Boundaries<A>& start) {
    const int64_t b = pair / heads_, h = pair % heads_;
    start.number(pair, 0) = p_.lse0 ? p_.lse0.as<const A>()(b, h) : kNone<A>;
    if (p_.o0) widen(start.row(pair, 0), p_.o0.as<const A>().at(b, h), width_, p_.o0.stride[2]);
  }

  // start[i + 1] = start[i] followed by segment i.
  void combine(int64_t pair, int64_t i, Boundaries<A>& start, Boundaries<A>& own) {
    const Mix<A> m = mix(start.number(pair, i), own.number(pair, i));
    A* next = start.row(pair, i + 1);
    const A* before = start.row(pair, i);
    const A* segment = own.row(pair, i);
    for (int64_t j = 0; j < width_; ++j) next[j] = m.keep * before[j] + m.take * segment[j];
    start.number(pair, i + 1) = m.lse;
  }

  // Rows of segment i from (lse, o); o and the returned lse are the state after it.
  template <bool kWrite>
  A scan(int64_t pair, int64_t i, A lse, A* o) {
    const int64_t b = pair / heads_, h = pair % heads_;
    const Ref<const T, 3> s = p_.s.as<const T>();
    const Ref<const T, 4> v = p_.v.as<const T>();
    const Ref<T, 4> out = p_.o.as<T>();
    const Ref<A, 3> log_sums = p_.lse.as<A>();
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Scratch::bytes_of<A>(width_));
    A* row = scratch.take<A>(width_);
    for (int64_t t = segments_.begin(i); t < segments_.end(i); ++t) {
      const Mix<A> m = mix(lse, static_cast<A>(s(b, t, h)));
      lse = m.lse;
      if (m.take != 0) {
        widen(row, v.at(b, t, h), width_, v.stride[3]);
        blend(m.keep, o, m.take, row, width_);
      }
      if constexpr (kWrite) {
        narrow(out.at(b, t, h), o, width_, out.stride[3]);
        log_sums(b, t, h) = lse;
      }
    }
    return lse;
  }

  void store_end(int64_t pair, A lse, const A* o) {
    if (!p_.o1) return;
    const int64_t b = pair / heads_, h = pair % heads_;
    narrow(p_.o1.as<A>().at(b, h), o, width_, p_.o1.stride[2]);
    p_.lse1.as<A>()(b, h) = lse;
  }

  const ForwardParams p_;
  const int threads_;
  const int64_t heads_, width_, pairs_;
  const Segments segments_;
};

// The reverse chain carries (R, T). What segment i hands to the one before it is (R, T) of its
// first row; e^{L_i - L_j} of rows i < j telescopes: the link between two segments is one factor.
template <class T>
class Backward {
 public:
  using A = Accum<T>;
  explicit Backward(const Call& call)
      : p_(backward_params(call)),
        threads_(call.context.num_threads),
        heads_(p_.v.size[2]),
        width_(p_.v.size[3]),
        pairs_(p_.v.size[0] * heads_),
        segments_(pairs_, p_.v.size[1]) {}

  void run() {
    const int64_t count = segments_.count();
    // later(pair, i): (R, T) that enters segment i from its right; L of the row it belongs to.
    Boundaries<A> later(pairs_, count + 1, width_);
    parallel_tasks(pairs_, threads_, [&](int64_t pair) { load_end(pair, count, later); });
    if (count > 1) {
      Boundaries<A> own(pairs_, count, width_);
      parallel_tasks(pairs_ * count, threads_, [&](int64_t task) {
        const int64_t pair = task / count, i = task % count;
        own.number(pair, i) = scan<false>(pair, i, false, 0, own.row(pair, i));
      });
      parallel_tasks(pairs_, threads_, [&](int64_t pair) {
        for (int64_t i = count - 1; i > 0; --i) combine(pair, i, later, own);
      });
    }
    parallel_tasks(pairs_ * count, threads_, [&](int64_t task) {
      const int64_t pair = task / count, i = task % count;
      A* r = later.row(pair, i);
      const A t = scan<true>(pair, i, true, later.number(pair, i), r);
      if (i == 0) store_start(pair, lse_of(pair, 0), t, r);
    });
    if (count == 0)
      for (int64_t pair = 0; pair < pairs_; ++pair) store_untouched(pair);
  }

 private:
  A lse_of(int64_t pair, int64_t t) const {
    return p_.lse.as<const A>()(pair / heads_, t, pair % heads_);
  }

  // What the gradient of the final state adds at the last row: R = d_o1, T = <d_o1, o_S> - d_lse1.
  void load_end(int64_t pair, int64_t count, Boundaries<A>& later) {
    if (count == 0) return;
    const int64_t b = pair / heads_, h = pair % heads_;
    A* r = later.row(pair, count - 1);
    A& t = later.number(pair, count - 1);
    if (p_.d_o1) {
      widen(r, p_.d_o1.as<const A>().at(b, h), width_, p_.d_o1.stride[2]);
      const Ref<const A, 3> o1 = p_.o1.as<const A>();
      for (int64_t j = 0; j < width_; ++j) t += r[j] * o1(b, h, j);
    }
    if (p_.d_lse1) t -= p_.d_lse1.as<const A>()(b, h);
  }

  // later[i - 1] = e^{L_last(i - 1) - L_first(i)} (own[i] + e^{L_first(i) - L_last(i)} later[i])
  void combine(int64_t pair, int64_t i, Boundaries<A>& later, Boundaries<A>& own) {
    const int64_t first = segments_.begin(i), last = segments_.end(i) - 1;
    const A inside = link(pair, first, last);
    const A out = decay(lse_of(pair, first - 1), lse_of(pair, first));
    const A* entering = later.row(pair, i);
    const A* segment = own.row(pair, i);
    A* leaving = later.row(pair, i - 1);
    for (int64_t j = 0; j < width_; ++j) leaving[j] = out * (segment[j] + inside * entering[j]);
    later.number(pair, i - 1) = out * (own.number(pair, i) + inside * later.number(pair, i));
  }

  // Factor from what entered at row `last` to row `first`.
  A link(int64_t pair, int64_t first, int64_t last) const {
    return decay(lse_of(pair, first), lse_of(pair, last));
  }

  // Rows of segment i from the last to the first; (r, t) enters at the last row, as it is (already
  // scaled to that row), and leaves as the (R, T) of the first row.
  template <bool kWrite>
  A scan(int64_t pair, int64_t i, bool entering, A t, A* r) {
    const int64_t b = pair / heads_, h = pair % heads_;
    const Ref<const T, 4> d_o = p_.d_o.as<const T>(), o = p_.o.as<const T>(),
                          v = p_.v.as<const T>();
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(3 * Scratch::bytes_of<A>(width_));
    A* d_row = scratch.take<A>(width_);
    A* o_row = scratch.take<A>(width_);
    A* v_row = scratch.take<A>(width_);
    A later_lse = 0;
    bool first = true;
    for (int64_t at = segments_.end(i) - 1; at >= segments_.begin(i); --at) {
      const A lse = lse_of(pair, at);
      const A factor = first ? A(entering) : decay(lse, later_lse);
      first = false;
      later_lse = lse;
      widen(d_row, d_o.at(b, at, h), width_, d_o.stride[3]);
      widen(o_row, o.at(b, at, h), width_, o.stride[3]);
      if (lse == kNone<A>) {  // no key so far: the row is constant
        for (int64_t j = 0; j < width_; ++j) r[j] = 0;
        t = 0;
      } else {
        blend(factor, r, A(1), d_row, width_);
        t = factor * t + dot(d_row, o_row, width_);
      }
      if constexpr (kWrite) write_row(b, at, h, lse, t, r, v.at(b, at, h), v_row, o_row);
    }
    return t;
  }

  // dv = e^{s - L} R,  ds = e^{s - L} (<v, R> - T)
  void write_row(int64_t b, int64_t at, int64_t h, A lse, A t, const A* r, const T* v, A* v_row,
                 A* d_row) {
    const A weight = decay(static_cast<A>(p_.s.as<const T>()(b, at, h)), lse);
    widen(v_row, v, width_, p_.v.stride[3]);
    for (int64_t j = 0; j < width_; ++j) d_row[j] = weight * r[j];
    const Ref<T, 4> d_v = p_.d_v.as<T>();
    narrow(d_v.at(b, at, h), d_row, width_, d_v.stride[3]);
    p_.d_s.as<T>()(b, at, h) =
        static_cast<T>(weight != 0 ? weight * (dot(v_row, r, width_) - t) : A(0));
  }

  // The initial state is the key before the first.
  void store_start(int64_t pair, A lse, A t, const A* r) {
    if (!p_.d_o0) return;
    const int64_t b = pair / heads_, h = pair % heads_;
    const A weight = decay(p_.lse0.as<const A>()(b, h), lse);
    const Ref<const A, 3> o0 = p_.o0.as<const A>();
    A product = 0;
    for (int64_t j = 0; j < width_; ++j) {
      p_.d_o0.as<A>()(b, h, j) = weight * r[j];
      product += o0(b, h, j) * r[j];
    }
    p_.d_lse0.as<A>()(b, h) = weight != 0 ? weight * (product - t) : A(0);
  }

  // No token: the final state is the initial one.
  void store_untouched(int64_t pair) {
    if (!p_.d_o0) return;
    const int64_t b = pair / heads_, h = pair % heads_;
    for (int64_t j = 0; j < width_; ++j)
      p_.d_o0.as<A>()(b, h, j) = p_.d_o1 ? p_.d_o1.as<const A>()(b, h, j) : A(0);
    p_.d_lse0.as<A>()(b, h) = p_.d_lse1 ? p_.d_lse1.as<const A>()(b, h) : A(0);
  }

  const BackwardParams p_;
  const int threads_;
  const int64_t heads_, width_, pairs_;
  const Segments segments_;
};

template <class T>
void forward(const Call& call) {
  Forward<T>(call).run();
}

template <class T>
void backward(const Call& call) {
  Backward<T>(call).run();
}

}  // namespace
}  // namespace hw::key_scan

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{&key_scan::forward<T>, &key_scan::backward<T>}};

}  // namespace
}  // namespace hw
