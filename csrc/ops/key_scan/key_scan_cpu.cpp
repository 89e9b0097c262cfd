// SPDX-License-Identifier: Apache-2.0
// Key-only softmax scan on the CPU; the mathematics is in key_scan.h.
//
// A head is a chain over time, vectorised over Dv. With many heads each is one task; with few, time
// is cut into segments: (a) each segment scans from an empty state, (b) the segments' ends are
// combined in order, (c) each segment scans again from its true start. The choice depends on the
// sizes of one batch entry alone: neither the number of threads nor the neighbours in the batch
// change a result.
#include "ops/key_scan/key_scan.h"

#include <cmath>

#include "ops/key_scan/key_scan_sum.h"

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "core/cpu/transpose.h"
#include "core/host/registry.h"

namespace hw::key_scan {
namespace {

constexpr int64_t kSegment = 1024;  // tokens
constexpr int64_t kManyHeads = 8;   // heads from which time is not cut

// One step of the chain: the sum with score s, keep = e^{L - L'}, take = e^{s - L'}.
template <class A>
struct Mix {
  LogSum<A> sum;
  A keep, take;
};

template <class A>
Mix<A> mix(const LogSum<A>& sum, A s) {
  if (s == nothing<A>()) return {sum, 1, 0};
  if (sum.a == 0) {
    const LogSum<A> one = one_score(s);
    return {one, 0, one.a};
  }
  const A d = s - sum.m, e = std::exp(-std::abs(d));
  const A before = d <= 0 ? sum.a : sum.a * e, own = d <= 0 ? e : A(1) + (s - s);
  const A whole = before + own;
  // Divided, not multiplied by 1 / whole: what loses nothing is kept by exactly 1, however often.
  return {{d <= 0 ? sum.m : s, whole}, before / whole, own / whole};
}

// to = a to + b from
template <class A>
HW_NOINLINE void blend(A a, A* __restrict to, A b, const A* __restrict from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = a * to[j] + b * from[j];
}

// The segments of a head of a batch entry.
struct Segments {
  int64_t tokens, length;
  Segments(int64_t heads, int64_t tokens)
      : tokens(tokens), length(heads >= kManyHeads ? (tokens > 0 ? tokens : 1) : kSegment) {}
  int64_t count() const { return (tokens + length - 1) / length; }
  int64_t begin(int64_t i) const { return i * length; }
  int64_t end(int64_t i) const { return begin(i) + length < tokens ? begin(i) + length : tokens; }
};

// One accumulated row and kNumbers numbers per (batch_head, segment).
template <class A, int kNumbers>
class Boundaries {
 public:
  Boundaries(int64_t batch_heads, int64_t segments, int64_t width)
      : segments_(segments),
        stride_(width + kNumbers),
        data_(new A[batch_heads * segments * stride_]()) {}
  Boundaries(const Boundaries&) = delete;
  Boundaries& operator=(const Boundaries&) = delete;
  ~Boundaries() { delete[] data_; }
  A* numbers(int64_t batch_head, int64_t segment) {
    return data_ + (batch_head * segments_ + segment) * stride_;
  }
  A* row(int64_t batch_head, int64_t segment) { return numbers(batch_head, segment) + kNumbers; }

 private:
  const int64_t segments_, stride_;
  A* const data_;
};

template <class T>
class Forward {
 public:
  using A = Accum<T>;
  Forward(const ForwardParams& p, int threads)
      : p_(p),
        threads_(threads),
        heads_(p_.v.size[2]),
        width_(p_.v.size[3]),
        batch_heads_(p_.v.size[0] * heads_),
        segments_(heads_, p_.v.size[1]) {}

  void run() {
    const int64_t count = segments_.count();
    States start(batch_heads_, count > 0 ? count : 1, width_);
    parallel_tasks(batch_heads_, threads_,
                   [&](int64_t batch_head) { load_start(batch_head, start); });
    if (count > 1) {
      const int64_t most = count - 1;  // nothing starts after the last segment
      States own(batch_heads_, most, width_);
      parallel_tasks(batch_heads_ * most, threads_, [&](int64_t task) {
        const int64_t batch_head = task / most, i = task % most;
        put(own, batch_head, i,
            scan<false>(batch_head, i, {nothing<A>(), 0}, own.row(batch_head, i)));
      });
      parallel_tasks(batch_heads_, threads_, [&](int64_t batch_head) {
        for (int64_t i = 0; i < most; ++i) combine(batch_head, i, start, own);
      });
    }
    parallel_tasks(batch_heads_ * count, threads_, [&](int64_t task) {
      const int64_t batch_head = task / count, i = task % count;
      A* o = start.row(batch_head, i);
      const LogSum<A> sum = scan<true>(batch_head, i, sum_of(start, batch_head, i), o);
      if (i + 1 == count) store_end(batch_head, sum, o);
    });
    if (count == 0)
      for (int64_t batch_head = 0; batch_head < batch_heads_; ++batch_head)
        store_end(batch_head, sum_of(start, batch_head, 0), start.row(batch_head, 0));
  }

 private:
  using States = Boundaries<A, 2>;  // o, and the log-sum

  static LogSum<A> sum_of(States& states, int64_t batch_head, int64_t i) {
    const A* numbers = states.numbers(batch_head, i);
    return {numbers[0], numbers[1]};
  }
  static void put(States& states, int64_t batch_head, int64_t i, const LogSum<A>& sum) {
    A* numbers = states.numbers(batch_head, i);
    numbers[0] = sum.m, numbers[1] = sum.a;
  }

  // A state that nothing was summed into has o = 0, whatever the call holds there.
  HW_NOINLINE void load_start(int64_t batch_head, States& start) {
    const int64_t b = batch_head / heads_, h = batch_head % heads_;
    const LogSum<A> sum = one_score(p_.lse0 ? p_.lse0.as<const A>()(b, h) : nothing<A>());
    put(start, batch_head, 0, sum);
    if (p_.o0 && sum.a != 0)
      widen(start.row(batch_head, 0), p_.o0.as<const A>().at(b, h), width_, p_.o0.stride[2]);
  }

  // start[i + 1] = start[i] followed by segment i.
  HW_NOINLINE void combine(int64_t batch_head, int64_t i, States& start, States& own) {
    const LogSum<A> sum = sum_of(start, batch_head, i), more = sum_of(own, batch_head, i);
    const LogSum<A> whole = join(sum, more);
    const A keep = share(sum, whole), take = share(more, whole);
    A* next = start.row(batch_head, i + 1);
    const A* before = start.row(batch_head, i);
    const A* segment = own.row(batch_head, i);
    for (int64_t j = 0; j < width_; ++j) next[j] = keep * before[j] + take * segment[j];
    put(start, batch_head, i + 1, whole);
  }

  // Rows of segment i from (sum, o); o and what is returned are the state after it.
  template <bool kWrite>
  HW_NOINLINE LogSum<A> scan(int64_t batch_head, int64_t i, LogSum<A> sum, A* o) {
    const int64_t b = batch_head / heads_, h = batch_head % heads_;
    const Ref<const T, 3> s = p_.s.as<const T>();
    const Ref<const T, 4> v = p_.v.as<const T>();
    const Ref<T, 4> out = p_.o.as<T>();
    const Ref<A, 3> log_sums = p_.lse.as<A>(), rests = p_.rest.as<A>();
    const Ref<A, 4> wide = p_.wide.as<A>();
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Scratch::bytes_of<A>(width_));
    A* row = scratch.take<A>(width_);
    for (int64_t t = segments_.begin(i); t < segments_.end(i); ++t) {
      const Mix<A> m = mix(sum, static_cast<A>(s(b, t, h)));
      sum = m.sum;
      if (m.take != 0) {
        widen(row, v.at(b, t, h), width_, v.stride[3]);
        blend(m.keep, o, m.take, row, width_);
      }
      if constexpr (kWrite) {
        narrow(out.at(b, t, h), o, width_, out.stride[3]);
        if (wide) narrow(wide.at(b, t, h), o, width_, wide.stride[3]);
        const Log<A> log = sum.log();
        log_sums(b, t, h) = log.value;
        if (rests) rests(b, t, h) = log.rest;
      }
    }
    return sum;
  }

  HW_NOINLINE void store_end(int64_t batch_head, const LogSum<A>& sum, const A* o) {
    if (!p_.o1) return;
    const int64_t b = batch_head / heads_, h = batch_head % heads_;
    narrow(p_.o1.as<A>().at(b, h), o, width_, p_.o1.stride[2]);
    p_.lse1.as<A>()(b, h) = sum.log().value;
  }

  const ForwardParams p_;
  const int threads_;
  const int64_t heads_, width_, batch_heads_;
  const Segments segments_;
};

// The reverse chain carries (R, T). What segment i hands to the one before it is (R, T) of its
// first row; e^{L_i - L_j} of rows i < j telescopes: the link between two segments is one factor.
template <class T>
class Backward {
 public:
  using A = Accum<T>;
  Backward(const BackwardParams& p, int threads)
      : p_(p),
        threads_(threads),
        heads_(p_.v.size[2]),
        width_(p_.v.size[3]),
        batch_heads_(p_.v.size[0] * heads_),
        segments_(heads_, p_.v.size[1]) {}

  void run() {
    const int64_t count = segments_.count();
    // later(head, i): (R, T) that enters segment i from its right; L of the row it belongs to.
    Totals later(batch_heads_, count, width_);
    parallel_tasks(batch_heads_, threads_,
                   [&](int64_t batch_head) { load_end(batch_head, count, later); });
    if (count > 1) {
      const int64_t most = count - 1;  // nothing ends before segment 0
      Totals own(batch_heads_, count, width_);
      parallel_tasks(batch_heads_ * most, threads_, [&](int64_t task) {
        const int64_t batch_head = task / most, i = 1 + task % most;
        own.numbers(batch_head, i)[0] =
            scan<false>(batch_head, i, false, 0, own.row(batch_head, i));
      });
      parallel_tasks(batch_heads_, threads_, [&](int64_t batch_head) {
        for (int64_t i = count - 1; i > 0; --i) combine(batch_head, i, later, own);
      });
    }
    parallel_tasks(batch_heads_ * count, threads_, [&](int64_t task) {
      const int64_t batch_head = task / count, i = task % count;
      A* r = later.row(batch_head, i);
      const A t = scan<true>(batch_head, i, true, later.numbers(batch_head, i)[0], r);
      if (i == 0) store_start(batch_head, log_of(batch_head, 0), t, r);
    });
    if (count == 0)
      for (int64_t batch_head = 0; batch_head < batch_heads_; ++batch_head)
        store_untouched(batch_head);
  }

 private:
  using Totals = Boundaries<A, 1>;  // R and T

  Log<A> log_of(int64_t batch_head, int64_t t) const {
    const int64_t b = batch_head / heads_, h = batch_head % heads_;
    return {p_.lse.as<const A>()(b, t, h), p_.rest ? p_.rest.as<const A>()(b, t, h) : A(0)};
  }

  // x - c in place of x.
  HW_NOINLINE void shift(int64_t b, int64_t h, A* x) const {
    if (!p_.o0 || p_.lse0.as<const A>()(b, h) == nothing<A>()) return;
    const Ref<const A, 3> o0 = p_.o0.as<const A>();
    for (int64_t j = 0; j < width_; ++j) x[j] -= o0(b, h, j);
  }

  // What the gradient of the final state adds at the last row: R = d_o1, T = <d_o1, o_S> - d_lse1.
  HW_NOINLINE void load_end(int64_t batch_head, int64_t count, Totals& later) {
    if (count == 0) return;
    const int64_t b = batch_head / heads_, h = batch_head % heads_;
    A* r = later.row(batch_head, count - 1);
    A& t = later.numbers(batch_head, count - 1)[0];
    if (p_.d_o1) {
      widen(r, p_.d_o1.as<const A>().at(b, h), width_, p_.d_o1.stride[2]);
      Scratch& scratch = Scratch::of_thread();
      scratch.reset(Scratch::bytes_of<A>(width_));
      A* o1 = scratch.take<A>(width_);
      widen(o1, p_.o1.as<const A>().at(b, h), width_, p_.o1.stride[2]);
      shift(b, h, o1);
      t += inner_product(r, o1, width_);
    }
    if (p_.d_lse1) t -= p_.d_lse1.as<const A>()(b, h);
  }

  // later[i - 1] = e^{L_last(i - 1) - L_first(i)} (own[i] + e^{L_first(i) - L_last(i)} later[i])
  HW_NOINLINE void combine(int64_t batch_head, int64_t i, Totals& later, Totals& own) {
    const int64_t first = segments_.begin(i), last = segments_.end(i) - 1;
    const A inside = link(batch_head, first, last);
    const A out = decay(log_of(batch_head, first - 1), log_of(batch_head, first));
    const A* entering = later.row(batch_head, i);
    const A* segment = own.row(batch_head, i);
    A* leaving = later.row(batch_head, i - 1);
    for (int64_t j = 0; j < width_; ++j) leaving[j] = out * (segment[j] + inside * entering[j]);
    later.numbers(batch_head, i - 1)[0] =
        out * (own.numbers(batch_head, i)[0] + inside * later.numbers(batch_head, i)[0]);
  }

  // Factor from what entered at row `last` to row `first`.
  A link(int64_t batch_head, int64_t first, int64_t last) const {
    return decay(log_of(batch_head, first), log_of(batch_head, last));
  }

  // Rows of segment i from the last to the first; (r, t) enters at the last row, as it is (already
  // scaled to that row), and leaves as the (R, T) of the first row.
  template <bool kWrite>
  HW_NOINLINE A scan(int64_t batch_head, int64_t i, bool entering, A t, A* r) {
    const int64_t b = batch_head / heads_, h = batch_head % heads_;
    const Ref<const T, 4> d_o = p_.d_o.as<const T>(), v = p_.v.as<const T>();
    const Ref<const A, 4> o = p_.wide.as<const A>();
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(3 * Scratch::bytes_of<A>(width_));
    A* d_row = scratch.take<A>(width_);
    A* o_row = scratch.take<A>(width_);
    A* v_row = scratch.take<A>(width_);
    Log<A> later{};
    bool first = true;
    for (int64_t at = segments_.end(i) - 1; at >= segments_.begin(i); --at) {
      const Log<A> log = log_of(batch_head, at);
      const A factor = first ? A(entering) : decay(log, later);
      first = false;
      later = log;
      widen(d_row, d_o.at(b, at, h), width_, d_o.stride[3]);
      widen(o_row, o.at(b, at, h), width_, o.stride[3]);
      shift(b, h, o_row);
      if (log.value == nothing<A>()) {  // no key so far: the row is constant
        for (int64_t j = 0; j < width_; ++j) r[j] = 0;
        t = 0;
      } else {
        blend(factor, r, A(1), d_row, width_);
        t = factor * t + inner_product(d_row, o_row, width_);
      }
      if constexpr (kWrite) write_row(b, at, h, log, t, r, v.at(b, at, h), v_row, o_row);
    }
    return t;
  }

  // dv = e^{s - L} R,  ds = e^{s - L} (<v, R> - T)
  HW_NOINLINE void write_row(int64_t b, int64_t at, int64_t h, const Log<A>& log, A t, const A* r,
                             const T* v, A* v_row, A* d_row) {
    const A weight = decay({static_cast<A>(p_.s.as<const T>()(b, at, h)), A(0)}, log);
    widen(v_row, v, width_, p_.v.stride[3]);
    shift(b, h, v_row);
    for (int64_t j = 0; j < width_; ++j) d_row[j] = weight * r[j];
    const Ref<T, 4> d_v = p_.d_v.as<T>();
    narrow(d_v.at(b, at, h), d_row, width_, d_v.stride[3]);
    p_.d_s.as<T>()(b, at, h) =
        static_cast<T>(weight != 0 ? weight * (inner_product(v_row, r, width_) - t) : A(0));
  }

  // The initial state is the key before the first.
  HW_NOINLINE void store_start(int64_t batch_head, const Log<A>& log, A t, const A* r) {
    if (!p_.d_o0) return;
    const int64_t b = batch_head / heads_, h = batch_head % heads_;
    const A weight = decay({p_.lse0.as<const A>()(b, h), A(0)}, log);
    for (int64_t j = 0; j < width_; ++j) p_.d_o0.as<A>()(b, h, j) = weight * r[j];
    p_.d_lse0.as<A>()(b, h) = weight != 0 ? -weight * t : A(0);
  }

  // No token: the final state is the initial one, constants where nothing was summed.
  HW_NOINLINE void store_untouched(int64_t batch_head) {
    if (!p_.d_o0) return;
    const int64_t b = batch_head / heads_, h = batch_head % heads_;
    const bool some = p_.lse0.as<const A>()(b, h) != nothing<A>();
    for (int64_t j = 0; j < width_; ++j)
      p_.d_o0.as<A>()(b, h, j) = some && p_.d_o1 ? p_.d_o1.as<const A>()(b, h, j) : A(0);
    p_.d_lse0.as<A>()(b, h) = some && p_.d_lse1 ? p_.d_lse1.as<const A>()(b, h) : A(0);
  }

  const BackwardParams p_;
  const int threads_;
  const int64_t heads_, width_, batch_heads_;
  const Segments segments_;
};

template <class T>
void forward(const ForwardParams& p, const Call& call) {
  Forward<T>(p, call.context.num_threads).run();
}

template <class T>
void backward(const BackwardParams& p, const Call& call) {
  Backward<T>(p, call.context.num_threads).run();
}

}  // namespace
}  // namespace hw::key_scan

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{entry<&key_scan::forward<T>>, entry<&key_scan::backward<T>>}};

}  // namespace
}  // namespace hw
