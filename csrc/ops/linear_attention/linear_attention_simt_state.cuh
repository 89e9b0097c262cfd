// SPDX-License-Identifier: Apache-2.0
// Linear attention without tensor cores: parameters of one direction, the work of a block, and the
// state it carries.
#pragma once

#include "ops/linear_attention/linear_attention_simt_tiles.cuh"

namespace hw::linear_attention::simt {

// One direction of one call.
template <class Element>
struct WalkParams {
  using Acc = Accum<Element>;
  OperandRows<Element> outer, inner;
  Ref<const int64_t, 1> cu_seqlens;
  int64_t num_tokens;
  FeatureMap map;
  bool causal, normalize;
  Acc scale, eps;
  Geometry geometry;
  int dim, value_dim, features;
  int query_heads, key_heads;
  bool split_heads;  // a block takes one query head, not the group of a key head
  // single schedule: where the state starts and ends, or absent
  Ref<const Acc, 4> start_kv;  // [N, H, F, Dv]
  Ref<const Acc, 3> start_z;   // [N, H, F]
  Ref<Acc, 4> final_kv;        // [N, H, F, Dv]
  Ref<Acc, 3> final_z;         // [N, H, F]
  Acc* states;                 // the slots of this direction, see Geometry::states
  // out
  Ref<Element, 4> applied;  // [B, S, heads, Dv]   o or dv
  Ref<Acc, 3> z;            // [B, S, Hq]          forward, normalised
  Ref<Element, 4> graded;   // [B, S, heads, D]    dq or dk
  Acc* sums;                // [B, S, heads, D]    dq or dk so far; absent if nothing is kept
  bool applied_vectors;

  HW_HOST_DEVICE int64_t tokens() const { return num_tokens; }
  HW_HOST_DEVICE int group() const { return key_heads ? query_heads / key_heads : 0; }
  HW_HOST_DEVICE int head_blocks() const { return split_heads ? query_heads : key_heads; }
  // Blocks that take one slice each, or all of them one after another.
  int64_t blocks(bool all_slices) const {
    return geometry.plan.num_slots * head_blocks() * (all_slices ? 1 : geometry.slices);
  }
};

// What a block works on.
struct Work {
  Segment segment;
  int64_t slot;
  int slice, key_head, first_query, queries;
};

template <bool kAllSlices, class Element>
HW_DEVICE HW_INLINE Work find_work(const WalkParams<Element>& p) {
  Work w;
  int index = dev::block_index_x();
  w.slice = kAllSlices ? 0 : index % p.geometry.slices;
  if (!kAllSlices) index /= p.geometry.slices;
  const int head = index % p.head_blocks();
  w.slot = index / p.head_blocks();
  w.key_head = p.split_heads ? head / p.group() : head;
  w.first_query = p.split_heads ? head : head * p.group();
  w.queries = p.split_heads ? 1 : p.group();
  w.segment = locate(p.geometry.plan, p, w.slot);
  return w;
}

// The state of a block: in shared memory, or in the workspace. There kv is the block's columns of a
// slot; z, which every slice needs, has a copy for each slice behind the slots.
template <class Acc>
struct State {
  Acc* kv;  // [F][stride]
  Acc* z;   // [F]; null if this slice has no use for it
  int64_t stride;
};

// `slot`: where kv comes from, and, if it is not resident, where it stays. Wide slices are chosen
// only for states that are resident, so that their kernels know where the state is.
template <int kColumns, class Element, class Acc = Accum<Element>>
HW_DEVICE HW_INLINE State<Acc> place_state(const WalkParams<Element>& p, const Work& w,
                                           int64_t slot, bool with_z) {
  const Geometry& g = p.geometry;
  if (kColumns != kNarrow || g.resident) {
    Acc* shared = dev::shared<Acc>();
    return {shared + g.shared.kv, with_z ? shared + g.shared.z : nullptr, kColumns + kPad<Acc>};
  }
  Acc* z = p.states + g.running_z(w.slot, w.key_head, w.slice);
  return {p.states + g.states.kv(slot, w.key_head, 0) + w.slice * kColumns, with_z ? z : nullptr,
          g.states.value_dim};
}

// visit(f, c) over the elements of a state [F][kColumns].
template <int kColumns, class Visit>
HW_DEVICE HW_INLINE void for_state(int features, const Visit& visit) {
  for (int i = dev::thread_index(); i < features * kColumns; i += kThreads) {
    visit(i / kColumns, i % kColumns);
  }
}

template <class Visit>
HW_DEVICE HW_INLINE void for_features(int features, const Visit& visit) {
  for (int f = dev::thread_index(); f < features; f += kThreads) visit(f);
}

// Fills the state with the sums of a slot of the workspace.
template <int kColumns, class Element, class Acc = Accum<Element>>
HW_DEVICE HW_INLINE void load_slot(const State<Acc>& state, const WalkParams<Element>& p,
                                   const Work& w, int64_t slot) {
  const Geometry& g = p.geometry;
  const Acc* kv = p.states + g.states.kv(slot, w.key_head, 0) + w.slice * kColumns;
  const Acc* z = p.states + g.states.z(slot, w.key_head);
  if (g.resident) {
    for_state<kColumns>(p.features, [&](int f, int c) {
      state.kv[f * state.stride + c] = kv[f * g.states.value_dim + c];
    });
  }
  if (state.z) for_features(p.features, [&](int f) { state.z[f] = z[f]; });
}

// The reverse.
template <int kColumns, class Element, class Acc = Accum<Element>>
HW_DEVICE HW_INLINE void store_slot(const State<Acc>& state, const WalkParams<Element>& p,
                                    const Work& w) {
  const Geometry& g = p.geometry;
  Acc* kv = p.states + g.states.kv(w.slot, w.key_head, 0) + w.slice * kColumns;
  Acc* z = p.states + g.states.z(w.slot, w.key_head);
  if (g.resident) {
    for_state<kColumns>(p.features, [&](int f, int c) {
      kv[f * g.states.value_dim + c] = state.kv[f * state.stride + c];
    });
  }
  if (state.z) for_features(p.features, [&](int f) { z[f] = state.z[f]; });
}

// Fills the state with the call's initial state, or with zeros where it has none.
template <int kColumns, class Element, class Acc = Accum<Element>>
HW_DEVICE HW_INLINE void load_initial(const State<Acc>& state, const WalkParams<Element>& p,
                                      const Work& w, bool any) {
  const int column = w.slice * kColumns;
  const int64_t n = w.segment.sequence;
  for_state<kColumns>(p.features, [&](int f, int c) {
    const bool inside = any && p.start_kv && column + c < p.value_dim;
    state.kv[f * state.stride + c] = inside ? p.start_kv(n, w.key_head, f, column + c) : Acc(0);
  });
  if (!state.z) return;
  for_features(p.features, [&](int f) {
    state.z[f] = any && p.start_z ? p.start_z(n, w.key_head, f) : Acc(0);
  });
}

// Writes the state behind the last chunk of a sequence, single schedule.
template <int kColumns, class Element, class Acc = Accum<Element>>
HW_DEVICE HW_INLINE void store_final(const State<Acc>& state, const WalkParams<Element>& p,
                                     const Work& w) {
  const int column = w.slice * kColumns;
  const int64_t n = w.segment.sequence;
  if (p.final_kv) {
    for_state<kColumns>(p.features, [&](int f, int c) {
      if (column + c >= p.value_dim) return;
      p.final_kv(n, w.key_head, f, column + c) = state.kv[f * state.stride + c];
    });
  }
  if (!p.final_z || w.slice != 0) return;
  for_features(p.features, [&](int f) { p.final_z(n, w.key_head, f) = state.z[f]; });
}

}  // namespace hw::linear_attention::simt
