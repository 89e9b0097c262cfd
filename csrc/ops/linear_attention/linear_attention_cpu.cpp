// SPDX-License-Identifier: Apache-2.0
// Linear attention on the CPU: how a call is cut into tasks. The mathematics is in
// linear_attention.h, the loop over chunks in linear_attention_cpu_scan.h.
//
//   direct      short sequences without states: one chunk holds the whole sequence, no state at all
//   sequential  causal, enough (sequence, head) pairs: one task per pair walks its segments
//   segmented   causal with few pairs, and every bidirectional call: (a) each segment sums its own
//               total, (b) totals become prefixes in order, (c) each segment rescans its chunks
// Sequential and segmented give the same bits (see linear_attention_cpu_scan.h), so the choice may
// depend on the number of threads.
#include "ops/linear_attention/linear_attention_cpu_scan.h"
#include "ops/linear_attention/linear_attention_cpu_step.h"

#include "core/host/registry.h"

namespace hw::linear_attention {
namespace {

constexpr int kChunk = 64;
constexpr int kSegmentChunks = 16;
constexpr int kDirectTokens = 512;  // largest chunk of the direct form

struct Plan {
  bool direct, segmented;
  int capacity;     // rows of a chunk
  int64_t segment;  // rows of a segment
};

// Products per token: the direct form does (D + Dv) per visible key, the state form F * Dv to read
// and as much to add, and the direct form inside its own chunk.
Plan make_plan(const ForwardParams& p, bool with_states, int threads) {
  int64_t longest = 0, total = 0;
  for (int64_t n = 0; n < p.sequences(); ++n) {
    const Sequence s = sequence(p, n);
    longest = max_of(longest, s.end - s.begin);
    total += s.end - s.begin;
  }
  const int64_t d = p.dim(), dv = p.value_dim(), f = p.features();
  const int64_t seen = p.causal ? longest / 2 : longest;
  const bool direct = !with_states && longest <= kDirectTokens &&
                      (longest <= kChunk || (d + dv) * seen <= 2 * f * dv + kChunk * (d + dv));
  const int capacity =
      direct ? static_cast<int>(round_up<int64_t>(max_of<int64_t>(longest, 1), 16)) : kChunk;
  const int64_t segment = direct ? kDirectTokens : kChunk * kSegmentChunks;
  // Rows of the busiest thread; segments add the state update once more (about half the work).
  const int64_t heads = p.key_heads();
  const int64_t pairs = ceil_div<int64_t>(p.sequences() * heads, threads);
  const int64_t sequential =
      max_of(longest, longest * pairs * total / max_of<int64_t>(longest * p.sequences(), 1));
  const int64_t side_by_side = ceil_div<int64_t>(3 * total * heads, 2 * threads);
  const bool segmented = !direct && (!p.causal || (longest > segment && side_by_side < sequential));
  return {direct, segmented, capacity, segment};
}

// One task: rows [begin, end) of sequence n, for one key head.
struct Segment {
  int64_t n, batch, begin, end;
};

// ---- states between tensors [N, H, F, Dv], [N, H, F] and padded arrays ----

template <class A>
HW_NOINLINE void load_state(const FeatureSizes<A>& s, Ref<const A, 4> kv, Ref<const A, 3> z,
                            int64_t n, int h, State<A>& to) {
  to.zero = !kv;
  if (to.zero) return;
  for (int f = 0; f < s.features; ++f) {
    widen(to.kv + f * s.dvp, kv.at(n, h, f), s.dv, kv.stride[3]);
    clear_columns(to.kv + f * s.dvp, s.dvp, 1, s.dv, s.dvp);
    to.z[f] = z(n, h, f);
  }
  clear_columns(to.z, 0, 1, s.features, round_up(s.features, kLanes<A>));
}

template <class A>
HW_NOINLINE void store_state(const FeatureSizes<A>& s, const State<A>& from, Ref<A, 4> kv,
                             Ref<A, 3> z, int64_t n, int h) {
  if (!kv) return;
  for (int f = 0; f < s.features; ++f) {
    for (int j = 0; j < s.dv; ++j) kv(n, h, f, j) = from.zero ? A(0) : from.kv[f * s.dvp + j];
    z(n, h, f) = from.zero ? A(0) : from.z[f];
  }
}

// States of a whole call, one array each: `count` of them.
template <class A>
class StateArray {
 public:
  StateArray(const FeatureSizes<A>& s, int64_t count) : shape_(s) {
    memory_.reserve(Scratch::bytes_of<A>(count * State<A>::count(s)));
    zero_.reserve(count);
  }
  HW_NOINLINE State<A> get(int64_t i) const {
    State<A> state = at(i);
    state.zero = zero_.data()[i] != 0;
    return state;
  }
  void set_zero(int64_t i, bool zero) { zero_.data()[i] = zero; }
  HW_NOINLINE void copy(int64_t i, const State<A>& from) {
    State<A> to = at(i);
    accumulate(shape_, from, to);
    set_zero(i, to.zero);
  }

 private:
  State<A> at(int64_t i) const {
    return State<A>::at(shape_, reinterpret_cast<A*>(memory_.data()) + i * State<A>::count(shape_));
  }

  const FeatureSizes<A> shape_;
  Buffer memory_, zero_;  // zero_: a char per state
};

// ---- one direction over all sequences and heads ----

// The starting state of a direction and the place of its end: the forward direction starts from the
// initial state and ends in the final one, the reverse direction starts from the final state's
// gradient and ends in the initial state's.
template <class A>
struct Ends {
  Ref<const A, 4> kv_start;
  Ref<const A, 3> z_start;
  Ref<A, 4> kv_end;
  Ref<A, 3> z_end;
};

template <class T>
class Sweep {
 public:
  using A = Accum<T>;

  Sweep(const BackwardParams& p, const FeatureSizes<A>& shape, const Plan& plan,
        const Ends<A>& ends, int threads, const Pass& pass)
      : p_(p),
        shape_(shape),
        plan_(plan),
        ends_(ends),
        threads_(threads),
        pass_(pass),
        heads_(p.key_heads()) {}

  void run() {
    if (plan_.segmented)
      segmented();
    else
      sequential();
  }

 private:
  Visible visible() const {
    return !p_.causal ? Visible::all : pass_.reverse ? Visible::from : Visible::upto;
  }

  // One task per (sequence, head): the segments one after another, prefix += local in between.
  HW_NOINLINE void sequential() {
    const StateArray<A> prefixes(shape_, plan_.direct ? 0 : p_.sequences() * heads_);
    parallel_tasks(p_.sequences() * heads_, threads_, [&](int64_t task) {
      const int64_t n = task / heads_;
      const int h = static_cast<int>(task % heads_);
      const Sequence rows = sequence(p_, n);
      State<A> prefix;
      if (!plan_.direct) {
        prefix = prefixes.get(task);
        load_state(shape_, ends_.kv_start, ends_.z_start, n, h, prefix);
      }
      Scan<T> scan(shape_, p_, pass_, rows.batch, h);
      const int64_t count = ceil_div(rows.end - rows.begin, plan_.segment);
      for (int64_t i = 0; i < count; ++i) {
        const bool last = i + 1 == count;
        const int64_t begin = rows.begin + (pass_.reverse ? count - 1 - i : i) * plan_.segment;
        scan.run(begin, min_of(rows.end, begin + plan_.segment), prefix, visible(), true,
                 !last || ends_.kv_end);
        if (!last || ends_.kv_end) accumulate(shape_, scan.local(), prefix);
      }
      store_state(shape_, prefix, ends_.kv_end, ends_.z_end, n, h);
    });
  }

  // (a) totals of the segments, (b) prefixes in order, (c) every segment again with its prefix.
  // Bidirectional: the sum over all segments takes the place of the prefix.
  HW_NOINLINE void segmented() {
    const int64_t segments = first_segment(p_.sequences());
    StateArray<A> totals(shape_, segments * heads_), wholes(shape_, p_.sequences() * heads_);
    for_each_task(segments, [&](const Segment& s, int64_t slot, int h) {
      Scan<T> scan(shape_, p_, {false, pass_.reverse, pass_.reverse}, s.batch, h);
      scan.total(s.begin, s.end);
      totals.copy(slot, scan.local());
    });
    prefix(totals, wholes);
    for_each_task(segments, [&](const Segment& s, int64_t slot, int h) {
      Scan<T> scan(shape_, p_, pass_, s.batch, h);
      const State<A> state = p_.causal ? totals.get(slot) : wholes.get(s.n * heads_ + h);
      scan.run(s.begin, s.end, state, visible(), p_.causal, false);
    });
  }

  // totals[segment] becomes the state before the segment; wholes[sequence] the state after all.
  HW_NOINLINE void prefix(StateArray<A>& totals, StateArray<A>& wholes) {
    parallel_tasks(p_.sequences() * heads_, threads_, [&](int64_t task) {
      const int64_t n = task / heads_;
      const int h = static_cast<int>(task % heads_);
      State<A> sum = wholes.get(task);
      load_state(shape_, ends_.kv_start, ends_.z_start, n, h, sum);
      Scratch& scratch = Scratch::of_thread();
      scratch.reset(Scratch::bytes_of<A>(State<A>::count(shape_)));
      State<A> own = State<A>::at(shape_, scratch.take<A>(State<A>::count(shape_)));
      const int64_t first = first_segment(n), count = first_segment(n + 1) - first;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t slot = (first + (pass_.reverse ? count - 1 - i : i)) * heads_ + h;
        own.zero = true;
        accumulate(shape_, totals.get(slot), own);
        totals.copy(slot, sum);
        accumulate(shape_, own, sum);
      }
      wholes.set_zero(task, sum.zero);
      store_state(shape_, sum, ends_.kv_end, ends_.z_end, n, h);
    });
  }

  // Of sequence n; a sequence without rows has none.
  HW_NOINLINE int64_t first_segment(int64_t n) const {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Sequence s = sequence(p_, i);
      count += ceil_div(s.end - s.begin, plan_.segment);
    }
    return count;
  }

  // f(segment, slot, head) for every segment and head, in parallel.
  template <class F>
  void for_each_task(int64_t segments, const F& f) {
    parallel_tasks(segments * heads_, threads_, [&](int64_t task) {
      f(find_segment(task / heads_), task, static_cast<int>(task % heads_));
    });
  }

  HW_NOINLINE Segment find_segment(int64_t index) const {
    for (int64_t n = 0; n < p_.sequences(); ++n) {
      const Sequence s = sequence(p_, n);
      const int64_t count = ceil_div(s.end - s.begin, plan_.segment);
      if (index < count) {
        const int64_t begin = s.begin + index * plan_.segment;
        return {n, s.batch, begin, min_of(s.end, begin + plan_.segment)};
      }
      index -= count;
    }
    return {};
  }

  const BackwardParams& p_;
  const FeatureSizes<A> shape_;
  const Plan plan_;
  const Ends<A> ends_;
  const int threads_;
  const Pass pass_;
  const int heads_;
};

// ---- entry points ----

template <class T>
void forward(const ForwardParams& f, const Call& call) {
  using A = Accum<T>;
  BackwardParams p;
  static_cast<ForwardParams&>(p) = f;
  const int threads = call.context.num_threads;
  const Plan plan = make_plan(p, p.kv0 || p.kv1, threads);
  const FeatureSizes<A> shape(p.map, p.dim(), p.value_dim(), plan.capacity, p.scale);
  const Ends<A> ends{p.kv0.as<const A>(), p.z0.as<const A>(), p.kv1.as<A>(), p.z1.as<A>()};
  Sweep<T>(p, shape, plan, ends, threads, {.apply = true, .grad = false, .reverse = false}).run();
}

template <class T>
void backward(const BackwardParams& p, const Call& call) {
  using A = Accum<T>;
  const int threads = call.context.num_threads;
  const Plan plan = make_plan(p, p.kv0 || p.d_kv1 || p.d_kv0, threads);
  const FeatureSizes<A> shape(p.map, p.dim(), p.value_dim(), plan.capacity, p.scale);
  const Ends<A> earlier{p.kv0.as<const A>(), p.z0.as<const A>(), {}, {}};
  const Ends<A> later{p.d_kv1.as<const A>(), p.d_z1.as<const A>(), p.d_kv0.as<A>(), p.d_z0.as<A>()};
  Sweep<T>(p, shape, plan, earlier, threads, {.apply = false, .grad = true, .reverse = false})
      .run();
  Sweep<T>(p, shape, plan, later, threads, {.apply = true, .grad = true, .reverse = true}).run();
}

}  // namespace
}  // namespace hw::linear_attention

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{entry<&linear_attention::forward<T>>,
                                   entry<&linear_attention::backward<T>>,
                                   entry<&linear_attention::step<T>>}};

}  // namespace
}  // namespace hw
