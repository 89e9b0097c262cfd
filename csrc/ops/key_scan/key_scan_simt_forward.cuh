// SPDX-License-Identifier: Apache-2.0
// Key scan on CUDA, forward.
//
// A unit takes as many rows as it has lanes at a time: each lane reads one score, a scan over the
// lanes gives every row its log-sum, hence keep = e^{L_{i-1} - L_i} and take = e^{s_i - L_i}; then
// all lanes walk the rows together, each through its own columns: o = keep o + take v.
// Traffic: v and o once, s and lse once per slice; with segments v once more and two states each.
// Eight rows of v are in flight per lane, or two whose columns are apart (an address each). No
// shared memory.
#pragma once

#include "ops/key_scan/key_scan_simt_lanes.cuh"

#include "core/error.h"

namespace hw::key_scan::simt {

template <class Element>
struct ScanParams {
  using Acc = Accum<Element>;
  Geometry geometry;
  Ref<const Element, 3> s;  // [B, S, H]
  Ref<const Element, 4> v;  // [B, S, H, Dv]
  Ref<Element, 4> o;        // [B, S, H, Dv]              out
  Ref<Acc, 4> wide;         // [B, S, H, Dv]              out: o unrounded, or absent
  Ref<Acc, 3> lse, rest;    // [B, S, H]                  out: L; its rest, or absent
  Ref<const Acc, 3> o0;     // [B, H, Dv]                 or absent
  Ref<const Acc, 2> lse0;   // [B, H]
  Ref<Acc, 3> o1;           // [B, H, Dv]                 out, or absent
  Ref<Acc, 2> lse1;         // [B, H]
  Acc* rows;                // [segments, B, H, Dv]       o behind, then before the segment
  Acc* own;                 // [segments, B, H, 2]        log-sum of the segment
  Acc* start;               // [segments, B, H, 2]        log-sum before it
};

template <class Element>
HW_DEVICE HW_INLINE LogSum<Accum<Element>> initial_sum(const ScanParams<Element>& p, int64_t b,
                                                       int64_t h) {
  return one_score(p.lse0 ? p.lse0(b, h) : nothing<Accum<Element>>());
}

// A state that nothing was summed into has o = 0, whatever the call holds there.
template <class Element>
HW_DEVICE HW_INLINE Accum<Element> initial_row(const ScanParams<Element>& p,
                                               const LogSum<Accum<Element>>& sum, int64_t b,
                                               int64_t h, int64_t c) {
  return p.o0 && sum.a != Accum<Element>(0) ? p.o0(b, h, c) : Accum<Element>(0);
}

// Phase (a): kWrite = false, from nothing, leaves the segment's state.
// Phase (c): kWrite = true, from the true start, writes o, lse and the final state.
template <class Element, bool kVectors, bool kWrite>
struct ScanKernel {
  using Params = ScanParams<Element>;
  using Acc = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;
  static constexpr int kColumns = kOwn<Element>, kBatch = kVectors ? 8 : 2;

  HW_DEVICE static void main(const Params& p) { ScanKernel(p).run(); }

 private:
  HW_DEVICE HW_INLINE explicit ScanKernel(const Params& params)
      : p(params),
        g(params.geometry),
        u(find_unit(g)),
        columns(own_columns<Element, kVectors>(g, u)) {}

  HW_DEVICE HW_INLINE void run() {
    load_start();
    const int64_t rows = min_of(g.segment_tokens, g.tokens);
    for (int64_t row = 0; row < rows; row += g.lanes) walk_rows(u.begin + row);
    store_end();
  }

  HW_DEVICE HW_INLINE void load_start() {
    sum = {nothing<Acc>(), Acc(0)};
    HW_UNROLL
    for (int i = 0; i < kColumns; ++i) o[i] = Acc(0);
    if constexpr (!kWrite) return;
    const int64_t entry = u.entry(g);
    if (g.segments > 1) {
      sum = {p.start[entry * 2], p.start[entry * 2 + 1]};
      for_own<kColumns>(columns, [&](int i, int64_t c) { o[i] = p.rows[entry * g.value_dim + c]; });
      return;
    }
    sum = initial_sum(p, u.batch, u.head);
    for_own<kColumns>(columns,
                      [&](int i, int64_t c) { o[i] = initial_row(p, sum, u.batch, u.head, c); });
  }

  // Rows row .. row + lanes - 1; a row that does not exist has score -inf and changes nothing.
  HW_DEVICE HW_INLINE void walk_rows(int64_t row) {
    const int64_t mine = row + u.lane;
    const bool valid = u.used && mine < u.end;
    const Acc s = valid ? static_cast<Acc>(p.s(u.batch, mine, u.head)) : nothing<Acc>();
    const LogSum<Acc> now = join(sum, scan_scores(one_score(s)));
    LogSum<Acc> before = dev::shuffle_up(now, 1);
    if (u.lane == 0) before = sum;
    const Acc keep = share(before, now), take = share(one_score(s), now);
    if (kWrite && valid && u.slice == 0) {
      const Log<Acc> log = now.log();
      p.lse(u.batch, mine, u.head) = log.value;
      if (p.rest) p.rest(u.batch, mine, u.head) = log.rest;
    }
    sum = dev::shuffle(now, u.first_lane + g.lanes - 1);
    for (int r = 0; r < g.lanes; r += kBatch) walk_batch(row + r, r, keep, take);
  }

  // Inclusive over the lanes of the unit.
  HW_DEVICE HW_INLINE LogSum<Acc> scan_scores(LogSum<Acc> x) {
    for (int n = 1; n < g.lanes; n *= 2) {
      const LogSum<Acc> earlier = dev::shuffle_up(x, n);
      if (u.lane >= n) x = join(earlier, x);
    }
    return x;
  }

  // Rows row .. row + kBatch - 1, whose factors are in the lanes from `source` on. A value that
  // has no weight is not looked at: what is masked may be NaN.
  HW_DEVICE HW_INLINE void walk_batch(int64_t row, int source, Acc keep, Acc take) {
    OwnRow<Element, kColumns> v[kBatch];
    HW_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      const bool valid = u.used && row + n < u.end;
      const Element* from = valid ? p.v.at(u.batch, row + n, u.head) : nullptr;
      v[n] = load_own<kVectors, kColumns>(from, p.v.stride[3], columns, valid);
    }
    HW_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      const Acc a = dev::shuffle(keep, u.first_lane + source + n);
      const Acc b = dev::shuffle(take, u.first_lane + source + n);
      HW_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const Acc x = b == Acc(0) ? Acc(0) : static_cast<Acc>(v[n].v[i]);
        o[i] = a * o[i] + b * x;
      }
      if (kWrite && u.used && row + n < u.end) {
        store_own<kVectors>(p.o.at(u.batch, row + n, u.head), p.o.stride[3], columns, o, Acc(1));
        if (p.wide)
          store_own<kVectors>(p.wide.at(u.batch, row + n, u.head), p.wide.stride[3], columns, o,
                              Acc(1));
      }
    }
  }

  HW_DEVICE HW_INLINE void store_end() {
    if (!u.used) return;
    if constexpr (kWrite) {
      if (u.segment != g.segments - 1) return;
      if (p.o1) {
        for_own<kColumns>(columns, [&](int i, int64_t c) { p.o1(u.batch, u.head, c) = o[i]; });
      }
      if (p.lse1 && u.slice == 0 && u.lane == 0) p.lse1(u.batch, u.head) = sum.log().value;
    } else {
      const int64_t entry = u.entry(g);
      for_own<kColumns>(columns, [&](int i, int64_t c) { p.rows[entry * g.value_dim + c] = o[i]; });
      if (u.slice == 0 && u.lane == 0) p.own[entry * 2] = sum.m, p.own[entry * 2 + 1] = sum.a;
    }
  }

  const Params& p;
  const Geometry& g;
  const Unit u;
  const Columns columns;
  LogSum<Acc> sum;
  Acc o[kColumns];
};

// Phase (b): a thread per column of a head; the first also hands on the log-sums, into an array of
// its own, because every thread reads the segments' ones.
template <class Element>
struct ScanPrefixKernel {
  using Params = ScanParams<Element>;
  using Acc = Accum<Element>;
  static constexpr int kThreads = 128;

  HW_HOST_DEVICE static int64_t elements(const Geometry& g) {
    return g.batch_heads() * max_of<int64_t>(g.value_dim, 1);
  }

  HW_DEVICE static void main(const Params& p) {
    const Geometry& g = p.geometry;
    const int64_t index =
        static_cast<int64_t>(dev::block_index_x()) * kThreads + dev::thread_index();
    if (index >= elements(g)) return;
    const int64_t width = max_of<int64_t>(g.value_dim, 1);
    const int64_t batch_head = index / width, c = index % width;
    const int64_t b = batch_head / g.heads, h = batch_head % g.heads;
    const bool real = c < g.value_dim;
    LogSum<Acc> sum = initial_sum(p, b, h);
    Acc o = real ? initial_row(p, sum, b, h, c) : Acc(0);
    for (int64_t k = 0; k < g.segments; ++k) {
      const int64_t entry = k * g.batch_heads() + batch_head;
      const LogSum<Acc> own = {p.own[entry * 2], p.own[entry * 2 + 1]};
      const LogSum<Acc> next = join(sum, own);
      if (c == 0) p.start[entry * 2] = sum.m, p.start[entry * 2 + 1] = sum.a;
      if (real) {
        Acc& place = p.rows[entry * g.value_dim + c];
        const Acc behind = share(sum, next) * o + share(own, next) * place;
        place = o;
        o = behind;
      }
      sum = next;
    }
  }
};

template <class Element, bool kVectors>
void run_forward(const ScanParams<Element>& p, const Context& context) {
  const Geometry& g = p.geometry;
  if (g.segments > 1) {
    using Prefix = ScanPrefixKernel<Element>;
    launch<ScanKernel<Element, kVectors, false>>({g.blocks(), 1, 1}, 0, context, p);
    launch<Prefix>({ceil_div<int64_t>(Prefix::elements(g), Prefix::kThreads), 1, 1}, 0, context, p);
  }
  launch<ScanKernel<Element, kVectors, true>>({g.blocks(), 1, 1}, 0, context, p);
}

template <class Element>
void forward(const ForwardParams& f, const Call& call) {
  using Acc = Accum<Element>;
  ScanParams<Element> p{};
  p.geometry = make_geometry<Element>(f.v, call.context);
  const Workspace w = make_workspace(p.geometry, false);
  Acc* workspace = Arena(call.workspace, "key_scan.forward").take<Acc>(w.size);
  p.s = f.s.template as<const Element>();
  p.v = f.v.template as<const Element>();
  p.o = f.o.template as<Element>();
  p.wide = f.wide.template as<Acc>();
  p.lse = f.lse.template as<Acc>(), p.rest = f.rest.template as<Acc>();
  p.o0 = f.o0.template as<const Acc>();
  p.lse0 = f.lse0.template as<const Acc>();
  p.o1 = f.o1.template as<Acc>();
  p.lse1 = f.lse1.template as<Acc>();
  p.rows = workspace + w.rows;
  p.own = workspace + w.own;
  p.start = workspace + w.start;
  if (has_vectors(p.v) && has_vectors(p.o) && (!p.wide || has_vectors(p.wide)))
    run_forward<Element, true>(p, call.context);
  else
    run_forward<Element, false>(p, call.context);
}

}  // namespace hw::key_scan::simt
