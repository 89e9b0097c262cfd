// SPDX-License-Identifier: Apache-2.0
// Key scan on CUDA, backward: from the last row to the first,
//   R_i = do_i + e^{L_i - L_{i+1}} R_{i+1}        dv_i = e^{s_i - L_i} R_i
//   T_i = <do_i, o_i> + e^{L_i - L_{i+1}} T_{i+1}  ds_i = e^{s_i - L_i} (<v_i, R_i> - T_i)
// T is linear in do, so every lane carries the part of its own columns and one sum over the lanes
// per row, of <v, R> - T, gives ds. Slices of columns leave parts of ds that a last kernel adds.
// What enters a segment is already scaled to its last row.
// Traffic: do, o, v and dv once, with segments do and o twice; four rows in flight per lane.
#pragma once

#include "ops/key_scan/key_scan_simt_forward.cuh"

namespace hw::key_scan::simt {

template <class Element>
struct GradParams {
  using Acc = Accum<Element>;
  Geometry geometry;
  Ref<const Element, 3> s;         // [B, S, H]
  Ref<const Element, 4> v, d_o;    // [B, S, H, Dv]
  Ref<const Acc, 4> o;             // [B, S, H, Dv]          unrounded
  Ref<const Acc, 3> lse, rest;     // [B, S, H]              rest: or absent
  Ref<const Acc, 3> o0, o1, d_o1;  // [B, H, Dv]             or absent
  Ref<const Acc, 2> lse0, d_lse1;  // [B, H]                 or absent
  Ref<Element, 3> d_s;             // [B, S, H]              out
  Ref<Element, 4> d_v;             // [B, S, H, Dv]          out
  Ref<Acc, 3> d_o0;                // [B, H, Dv]             out, or absent
  Ref<Acc, 2> d_lse0;              // [B, H]                 out, or absent
  Acc* rows;                       // [segments, B, H, Dv]      R of the first row, then what enters
  Acc* totals;                     // [segments, B, H, slices]  T, the same
  Acc* scores;                     // [slices, B, S + 1, H]     parts of ds; row S: of d_lse0

  // c of the sums, in column j of a head.
  HW_DEVICE HW_INLINE Acc origin(int64_t b, int64_t h, int64_t j) const {
    return o0 && lse0(b, h) != nothing<Acc>() ? o0(b, h, j) : Acc(0);
  }
  HW_DEVICE HW_INLINE Log<Acc> log_at(int64_t b, int64_t row, int64_t h) const {
    return {lse(b, row, h), rest ? rest(b, row, h) : Acc(0)};
  }
};

// Phase (a): kWrite = false, nothing enters.   Phase (c): kWrite = true.
template <class Element, bool kVectors, bool kWrite>
struct GradKernel {
  using Params = GradParams<Element>;
  using Acc = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;
  static constexpr int kColumns = kOwn<Element>, kBatch = 4;

  HW_DEVICE static void main(const Params& p) { GradKernel(p).run(); }

 private:
  HW_DEVICE HW_INLINE explicit GradKernel(const Params& params)
      : p(params),
        g(params.geometry),
        u(find_unit(g)),
        columns(own_columns<Element, kVectors>(g, u)) {}

  HW_DEVICE HW_INLINE void run() {
    load_end();
    const int64_t rows = min_of(g.segment_tokens, g.tokens);
    const int64_t steps = ceil_div<int64_t>(rows, g.lanes);
    for (int64_t i = steps - 1; i >= 0; --i) walk_rows(u.begin + i * g.lanes);
    if constexpr (kWrite)
      store_start();
    else
      store_entry();
  }

  // What enters at the last row.
  HW_DEVICE HW_INLINE void load_end() {
    t = Acc(0);
    HW_UNROLL
    for (int i = 0; i < kColumns; ++i) r[i] = c[i] = Acc(0);
    for_own<kColumns>(columns, [&](int i, int64_t j) { c[i] = p.origin(u.batch, u.head, j); });
    if constexpr (!kWrite) return;
    if (g.segments > 1) {
      const int64_t entry = u.entry(g);
      for_own<kColumns>(columns, [&](int i, int64_t c) { r[i] = p.rows[entry * g.value_dim + c]; });
      if (u.lane == 0) t = p.totals[entry * g.slices + u.slice];
      return;
    }
    if (p.d_o1) {
      for_own<kColumns>(columns, [&](int i, int64_t j) {
        r[i] = p.d_o1(u.batch, u.head, j);
        t += r[i] * (p.o1(u.batch, u.head, j) - c[i]);
      });
    }
    if (p.d_lse1 && u.slice == 0 && u.lane == 0) t -= p.d_lse1(u.batch, u.head);
  }

  // Rows row + lanes - 1 .. row; lane l holds the factors of row + l, and then its ds.
  HW_DEVICE HW_INLINE void walk_rows(int64_t row) {
    const int64_t mine = row + u.lane;
    const bool valid = u.used && mine < u.end;
    Acc link = 1, take = 0, score = 0;
    if (valid) {
      const Log<Acc> own = p.log_at(u.batch, mine, u.head);
      if (mine + 1 < u.end) link = decay(own, p.log_at(u.batch, mine + 1, u.head));
      if (kWrite) take = decay({static_cast<Acc>(p.s(u.batch, mine, u.head)), Acc(0)}, own);
    }
    for (int n = g.lanes - kBatch; n >= 0; n -= kBatch) walk_batch(row + n, n, link, take, score);
    if (kWrite && valid) {
      const Acc ds = take == Acc(0) ? Acc(0) : take * score;
      if (g.slices == 1)
        p.d_s(u.batch, mine, u.head) = Element(ds);
      else
        *score_part(mine) = ds;
    }
  }

  HW_DEVICE HW_INLINE void walk_batch(int64_t row, int source, Acc link, Acc take, Acc& score) {
    OwnRow<Element, kColumns> d_o[kBatch], v[kBatch];
    OwnRow<Acc, kColumns> o[kBatch];
    HW_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      d_o[n] = load(p.d_o, row + n);
      o[n] = load(p.o, row + n);
      if constexpr (kWrite) v[n] = load(p.v, row + n);
    }
    HW_UNROLL
    for (int n = kBatch - 1; n >= 0; --n) {
      const Acc a = dev::shuffle(link, u.first_lane + source + n);
      t *= a;
      Acc sum = 0;
      HW_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const Acc d = static_cast<Acc>(d_o[n].v[i]);
        r[i] = a * r[i] + d;
        t += d * (o[n].v[i] - c[i]);
        if constexpr (kWrite) sum += (static_cast<Acc>(v[n].v[i]) - c[i]) * r[i];
      }
      if constexpr (kWrite) {
        sum = unit_sum(sum - t, g.lanes);
        if (u.lane == source + n) score = sum;
        const Acc b = dev::shuffle(take, u.first_lane + source + n);
        if (u.used && row + n < u.end) {
          store_own<kVectors>(p.d_v.at(u.batch, row + n, u.head), p.d_v.stride[3], columns, r, b);
        }
      }
    }
  }

  template <class T>
  HW_DEVICE HW_INLINE OwnRow<T, kColumns> load(const Ref<const T, 4>& x, int64_t row) {
    const bool valid = u.used && row < u.end;
    return load_own<kVectors, kColumns>(valid ? x.at(u.batch, row, u.head) : nullptr, x.stride[3],
                                        columns, valid);
  }

  HW_DEVICE HW_INLINE void store_entry() {
    const Acc total = unit_sum(t, g.lanes);
    if (!u.used) return;
    const int64_t entry = u.entry(g);
    for_own<kColumns>(columns, [&](int i, int64_t c) { p.rows[entry * g.value_dim + c] = r[i]; });
    if (u.lane == 0) p.totals[entry * g.slices + u.slice] = total;
  }

  // The initial state is the key before the first row.
  HW_DEVICE HW_INLINE void store_start() {
    if (!p.d_o0 && !p.d_lse0) return;
    const bool first = u.used && u.segment == 0;
    const Log<Acc> before = {p.lse0(u.batch, u.head), Acc(0)};
    const Acc weight = decay(before, g.tokens > 0 ? p.log_at(u.batch, 0, u.head) : before);
    for_own<kColumns>(columns, [&](int i, int64_t j) {
      if (first && p.d_o0) p.d_o0(u.batch, u.head, j) = weight * r[i];
    });
    const Acc sum = unit_sum(-t, g.lanes);
    if (!first || u.lane != 0 || !p.d_lse0) return;
    const Acc d = weight == Acc(0) ? Acc(0) : weight * sum;
    if (g.slices == 1)
      p.d_lse0(u.batch, u.head) = d;
    else
      *score_part(g.tokens) = d;
  }

  HW_DEVICE HW_INLINE Acc* score_part(int64_t row) const {
    return p.scores + ((u.slice * g.batch + u.batch) * (g.tokens + 1) + row) * g.heads + u.head;
  }

  const Params& p;
  const Geometry& g;
  const Unit u;
  const Columns columns;
  Acc r[kColumns], c[kColumns];
  Acc t;  // of the own columns
};

// Phase (b): a thread per column of a head, and per T of a slice:
//   enters(k - 1) = e^{L_last(k-1) - L_first(k)} (own(k) + e^{L_first(k) - L_last(k)} enters(k))
template <class Element>
struct GradPrefixKernel {
  using Params = GradParams<Element>;
  using Acc = Accum<Element>;
  static constexpr int kThreads = 128;

  HW_HOST_DEVICE static int64_t width(const Geometry& g) { return g.value_dim + g.slices; }

  HW_DEVICE static void main(const Params& p) {
    const Geometry& g = p.geometry;
    const int64_t index =
        static_cast<int64_t>(dev::block_index_x()) * kThreads + dev::thread_index();
    if (index >= g.batch_heads() * width(g)) return;
    const int64_t batch_head = index / width(g), e = index % width(g);
    const int64_t b = batch_head / g.heads, h = batch_head % g.heads;
    const bool row = e < g.value_dim;
    Acc enters = row ? (p.d_o1 ? p.d_o1(b, h, e) : Acc(0)) : final_total(p, b, h, e - g.value_dim);
    for (int64_t k = g.segments - 1; k >= 0; --k) {
      const int64_t entry = k * g.batch_heads() + batch_head;
      Acc& place =
          row ? p.rows[entry * g.value_dim + e] : p.totals[entry * g.slices + e - g.value_dim];
      const Acc own = place;
      place = enters;
      if (k == 0) break;
      const int64_t first = k * g.segment_tokens;
      const int64_t last = min_of(first + g.segment_tokens, g.tokens) - 1;
      const Log<Acc> log = p.log_at(b, first, h);
      const Acc inside = decay(log, p.log_at(b, last, h));
      enters = decay(p.log_at(b, first - 1, h), log) * (own + inside * enters);
    }
  }

 private:
  // T of the final state, the part of one slice.
  HW_DEVICE static Acc final_total(const Params& p, int64_t b, int64_t h, int64_t slice) {
    const Geometry& g = p.geometry;
    const int64_t columns = static_cast<int64_t>(g.lanes) * kOwn<Element>;
    Acc t = slice == 0 && p.d_lse1 ? -p.d_lse1(b, h) : Acc(0);
    if (!p.d_o1) return t;
    for (int64_t c = slice * columns; c < min_of((slice + 1) * columns, g.value_dim); ++c) {
      t += p.d_o1(b, h, c) * (p.o1(b, h, c) - p.origin(b, h, c));
    }
    return t;
  }
};

// ds and d_lse0 from the parts of the slices, a thread per element.
template <class Element>
struct ScoreSumKernel {
  using Params = GradParams<Element>;
  using Acc = Accum<Element>;
  static constexpr int kThreads = 256;

  HW_HOST_DEVICE static int64_t elements(const Geometry& g) {
    return g.batch_heads() * (g.tokens + 1);
  }

  HW_DEVICE static void main(const Params& p) {
    const Geometry& g = p.geometry;
    const int64_t i = static_cast<int64_t>(dev::block_index_x()) * kThreads + dev::thread_index();
    if (i >= elements(g)) return;
    const int64_t h = i % g.heads, row = i / g.heads % (g.tokens + 1);
    const int64_t b = i / g.heads / (g.tokens + 1);
    if (row == g.tokens && !p.d_lse0) return;
    Acc sum = 0;
    for (int slice = 0; slice < g.slices; ++slice) sum += p.scores[slice * elements(g) + i];
    if (row < g.tokens)
      p.d_s(b, row, h) = Element(sum);
    else
      p.d_lse0(b, h) = sum;
  }
};

template <class Element, bool kVectors>
void run_backward(const GradParams<Element>& p, const Context& context) {
  const Geometry& g = p.geometry;
  const auto blocks = [](int64_t elements, int threads) {
    return Grid{ceil_div<int64_t>(elements, threads), 1, 1};
  };
  if (g.segments > 1) {
    using Prefix = GradPrefixKernel<Element>;
    launch<GradKernel<Element, kVectors, false>>({g.blocks(), 1, 1}, 0, context, p);
    launch<Prefix>(blocks(g.batch_heads() * Prefix::width(g), Prefix::kThreads), 0, context, p);
  }
  launch<GradKernel<Element, kVectors, true>>({g.blocks(), 1, 1}, 0, context, p);
  if (g.slices > 1) {
    using Sum = ScoreSumKernel<Element>;
    launch<Sum>(blocks(Sum::elements(g), Sum::kThreads), 0, context, p);
  }
}

template <class Element>
void backward(const BackwardParams& b, const Call& call) {
  using Acc = Accum<Element>;
  GradParams<Element> p{};
  p.geometry = make_geometry<Element>(b.v, call.context);
  const Workspace w = make_workspace(p.geometry, true);
  Acc* workspace = Arena(call.workspace, "key_scan.backward").take<Acc>(w.size);
  p.s = b.s.template as<const Element>();
  p.v = b.v.template as<const Element>();
  p.o = b.wide.template as<const Acc>();
  p.d_o = b.d_o.template as<const Element>();
  p.lse = b.lse.template as<const Acc>(), p.rest = b.rest.template as<const Acc>();
  p.o0 = b.o0.template as<const Acc>();
  p.o1 = b.o1.template as<const Acc>();
  p.d_o1 = b.d_o1.template as<const Acc>();
  p.lse0 = b.lse0.template as<const Acc>();
  p.d_lse1 = b.d_lse1.template as<const Acc>();
  p.d_s = b.d_s.template as<Element>();
  p.d_v = b.d_v.template as<Element>();
  p.d_o0 = b.d_o0.template as<Acc>();
  p.d_lse0 = b.d_lse0.template as<Acc>();
  p.rows = workspace + w.rows;
  p.totals = workspace + w.totals;
  p.scores = workspace + w.scores;
  const bool vectors =
      has_vectors(p.v) && has_vectors(p.o) && has_vectors(p.d_o) && has_vectors(p.d_v);
  if (vectors)
    run_backward<Element, true>(p, call.context);
  else
    run_backward<Element, false>(p, call.context);
}

}  // namespace hw::key_scan::simt
