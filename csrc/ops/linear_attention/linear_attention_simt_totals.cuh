// SPDX-License-Identifier: Apache-2.0
// Linear attention without tensor cores: the states of the segments of one direction.
//
//   totals   slot <- sum over the rows of its segment of m(b_j) x_j, and of m(b_j) (1 or dz)
//   prefix   slot <- what comes before its segment: the initial state plus the totals before it, in
//            the order of the walk; not causal: the first slot of the sequence <- all of it.
//            The sum of everything is the final state (backward: the gradient of the initial one).
//
// Traffic: totals read k and v (or q, do, z) once and write a state per segment; prefix reads and
// writes each of them once, four loads in flight per thread, neighbouring threads side by side.
#pragma once

#include "ops/linear_attention/linear_attention_simt_state.cuh"

namespace hw::linear_attention::simt {

template <class Element, int kColumns, bool kReverse>
struct TotalsKernel {
  using Params = WalkParams<Element>;
  using Acc = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;

  HW_DEVICE static void main(const Params& p) {
    const Work work = find_work<false>(p);
    if (!work.segment.used) return;
    const Geometry& g = p.geometry;
    Acc* shared = dev::shared<Acc>();
    FeaturePair* pairs = reinterpret_cast<FeaturePair*>(shared + g.shared.pairs);
    make_pairs(pairs, p.map, g.tile_dim, g.tile_features);
    const State<Acc> state = place_state<kColumns>(p, work, work.slot, work.slice == 0);
    load_initial<kColumns>(state, p, work, false);
    for (int64_t row = work.segment.begin; row < work.segment.end; row += kRows) {
      for (int i = 0; i < (kReverse ? work.queries : 1); ++i) {
        const int head = kReverse ? work.first_query + i : work.key_head;
        add_rows(p, work, {work.segment.batch, row, work.segment.end, head}, state, pairs);
      }
    }
    dev::sync_block();
    store_slot<kColumns>(state, p, work);
  }

 private:
  HW_DEVICE HW_INLINE static void add_rows(const Params& p, const Work& work, const TileRows& rows,
                                           const State<Acc>& state, const FeaturePair* pairs) {
    const Geometry& g = p.geometry;
    Acc* shared = dev::shared<Acc>();
    Acc *inner = shared + g.shared.inner, *values = shared + g.shared.values;
    Acc* extra = shared + g.shared.inner_extra;
    dev::sync_block();
    load_values<kColumns>(values, extra, p.inner, rows, work.slice * kColumns);
    for (int tile = 0; tile < g.dim_tiles; ++tile) {
      const int first = tile * kTileDim, dim = min_of(p.dim - first, g.tile_dim);
      const int count = p.map == FeatureMap::taylor2 ? p.features : dim;
      if (tile > 0) dev::sync_block();
      load_keys(inner, p.inner, p.map, p.scale, rows, first, dim, g.tile_dim);
      dev::sync_block();
      add_to_state<kReverse, kColumns>(state.kv + first * state.stride, state.stride,
                                       state.z ? state.z + first : nullptr, pairs, count,
                                       g.tile_dim, inner, values, extra);
    }
  }
};

template <class Element>
struct PrefixKernel {
  using Acc = Accum<Element>;
  struct Params {
    WalkParams<Element> walk;
    bool reverse;

    HW_HOST_DEVICE int64_t elements() const {  // of one state, z included
      return walk.features * (walk.geometry.states.value_dim + 1);
    }
    HW_HOST_DEVICE int64_t blocks_per_state() const {
      return ceil_div<int64_t>(elements(), kThreads);
    }
    int64_t blocks() const {
      return walk.geometry.plan.sequences * walk.key_heads * blocks_per_state();
    }
  };
  static constexpr int kThreads = 256;
  static constexpr int kBatch = 4;

  HW_DEVICE static void main(const Params& p) {
    const WalkParams<Element>& w = p.walk;
    const StateLayout& states = w.geometry.states;
    const int64_t block = dev::block_index_x(), per_state = p.blocks_per_state();
    const int64_t e = block % per_state * kThreads + dev::thread_index();
    if (e >= p.elements()) return;
    const int64_t n = block / per_state / w.key_heads, h = block / per_state % w.key_heads;
    const Sequence rows = sequence(w, n);
    const Plan& plan = w.geometry.plan;
    const int64_t first = first_slot(plan, w.cu_seqlens.data, w.cu_seqlens.stride[0], n);
    const int64_t count = segment_count(plan, rows.end - rows.begin);

    const int64_t kv_size = w.features * states.value_dim;
    if (e < kv_size) {
      const int64_t f = e / states.value_dim, c = e % states.value_dim;
      const bool real = c < w.value_dim;
      Acc sum = real && w.start_kv ? w.start_kv(n, h, f, c) : Acc(0);
      sum = scan(w.states + states.kv(first, h, f) + c, states.heads * kv_size, count, p, sum);
      if (real && w.final_kv) w.final_kv(n, h, f, c) = sum;
    } else {
      const int64_t f = e - kv_size;
      Acc sum = w.start_z ? w.start_z(n, h, f) : Acc(0);
      sum = scan(w.states + states.z(first, h) + f, states.heads * states.features, count, p, sum);
      if (w.final_z) w.final_z(n, h, f) = sum;
    }
  }

 private:
  // Exclusive prefix in place over `count` values, `stride` apart; returns the sum of all.
  HW_DEVICE HW_INLINE static Acc scan(Acc* value, int64_t stride, int64_t count, const Params& p,
                                      Acc sum) {
    if (p.reverse && count > 0) {
      value += (count - 1) * stride;
      stride = -stride;
    }
    for (int64_t k = 0; k < count; k += kBatch) {
      Acc total[kBatch];
      HW_UNROLL
      for (int i = 0; i < kBatch; ++i) total[i] = k + i < count ? value[(k + i) * stride] : Acc(0);
      HW_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (p.walk.causal && k + i < count) value[(k + i) * stride] = sum;
        sum += total[i];
      }
    }
    if (!p.walk.causal && count > 0) value[p.reverse ? (count - 1) * stride : 0] = sum;
    return sum;
  }
};

// Phases (a) and (b) of one direction.
template <class Element, int kColumns, bool kReverse>
void make_states(const WalkParams<Element>& p, const Context& context) {
  if (!p.geometry.plan.has_totals()) return;
  const int bytes = p.geometry.shared.size * static_cast<int>(sizeof(Accum<Element>));
  launch<TotalsKernel<Element, kColumns, kReverse>>({p.blocks(false), 1, 1}, bytes, context, p);
  const typename PrefixKernel<Element>::Params prefix{p, kReverse};
  launch<PrefixKernel<Element>>({prefix.blocks(), 1, 1}, 0, context, prefix);
}

}  // namespace hw::linear_attention::simt
