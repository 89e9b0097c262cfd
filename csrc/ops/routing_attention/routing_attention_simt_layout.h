// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on CUDA: shapes of a call and its workspace. From
// shapes only, and no device code: the host side asks `workspace_bytes`. Both CUDA backends use it.
//
//   forward    by slot                  slots of every token (Csr), in the order of the lists
//              any, where few blocks    behind that: partial results of spans of keys, which are of
//              would idle the device    the backend
//   backward   by slot                  slots of every token, of rows and of keys; D; gradients of
//                                       slots, which are summed per token
//              by token, keys listed    who lists each key region, cut into spans; gradients of the
//                                       spans, which are summed per token
//              by token, all keys       nothing
//
// Spans: a key region is walked by those that list it, at most P of them a span, so that a region
// that everyone lists is shared by many blocks. With P twice the average number of listings of a
// region there are at most R + items / P <= 1.5 R spans, of R regions, whatever the lists say: a
// region has ceil(listings / P), and one where nobody lists it, which has gradient 0.
#pragma once

#include <cstdint>

#include "ops/routing_attention/routing_attention.h"
#include "softmax/simt/layout.h"

#include "core/gpu/csr.h"
#include "core/host/workspace.h"

namespace hw::routing_attention {

// Sizes of a call.
struct RoutingSizes {
  int64_t batch, heads, rows, keys, dim, value_dim;   // rows, keys: tokens
  int64_t groups, row_slots, key_slots;               // slots of a list: Wq, Wk
  int64_t key_entries, key_region_size, key_regions;  // N, n and R of the keys
  bool keys_listed, by_slot;
  bool d_row_temperature;  // wanted
};

template <class Params>
RoutingSizes shape_of(const Params& p) {
  RoutingSizes s{};
  s.batch = p.q.size[0], s.rows = p.q.size[1], s.heads = p.q.size[2], s.dim = p.q.size[3];
  s.keys = p.k.size[1], s.value_dim = p.v.size[3];
  s.keys_listed = bool(p.keys), s.by_slot = p.by_slot;
  if constexpr (requires { p.d_row_temperature; }) s.d_row_temperature = bool(p.d_row_temperature);
  s.groups = p.groups();
  s.row_slots = p.rows.slots();
  s.key_entries = s.keys_listed ? p.keys.entries.size[3] : 0;
  s.key_region_size = p.keys.grid.size();
  s.key_slots = s.keys_listed ? s.key_entries * s.key_region_size : s.keys;
  s.key_regions = s.keys_listed ? p.keys.grid.count() : 0;
  return s;
}

// ---- Key regions and who lists them -------------------------------------------------------------

// Lists are those of the Csr: one per (batch entry, head), or shared. Of a list: item i of the Csr
// is entry i % N of group i / N; span t is the listings [begin[r] + P (t - first[r]), + P) of
// region r = region[t], as far as it has any.
struct Regions {
  Csr listed;                 // buckets are regions
  int32_t* first = nullptr;   // [lists, regions + 1]  first span of a region
  int32_t* region = nullptr;  // [lists, spans]        of a span; -1: there is no such span
  int64_t most = 1;           // P, listings of a span
  int64_t spans = 0;          // T, an upper bound

  HW_HOST_DEVICE int32_t* first_of(int64_t list) const {
    return first + list * (listed.buckets + 1);
  }
  HW_HOST_DEVICE int32_t* regions_of(int64_t list) const { return region + list * spans; }

  // Listings of span t of a list, as a range of the Csr's items; empty where there is none.
  HW_HOST_DEVICE Range listings(int64_t list, int64_t t) const {
    const int64_t r = regions_of(list)[t];
    if (r < 0) return {0, 0};
    const int32_t* begin = listed.begin_of(list);
    const int64_t from = begin[r] + most * (t - first_of(list)[r]);
    return {from, min_of<int64_t>(from + most, begin[r + 1])};
  }
};

inline Regions regions_in(Arena& arena, const RoutingSizes& s) {
  Regions r;
  const int64_t items = s.groups * s.key_entries, regions = s.key_regions;
  r.listed = csr_in(arena, s.batch, s.heads, regions, items);
  r.most = max_of<int64_t>(ceil_div<int64_t>(2 * items, max_of<int64_t>(regions, 1)), 1);
  r.spans = regions + items / r.most;
  r.first = arena.take<int32_t>(r.listed.lists() * (regions + 1));
  r.region = arena.take<int32_t>(r.listed.lists() * r.spans);
  return r;
}

// ---- Workspace ----------------------------------------------------------------------------------

struct ForwardWorkspace {
  Csr rows;  // slots of tokens, by slot only
};

inline ForwardWorkspace forward_workspace(Arena& arena, const RoutingSizes& s) {
  ForwardWorkspace w;
  if (s.by_slot) w.rows = csr_in(arena, s.batch, s.heads, s.rows, s.groups * s.row_slots);
  return w;
}

template <class A>
struct BackwardWorkspace {
  Csr rows, keys;      // by slot: slots of tokens
  Regions regions;     // by token, keys listed
  A* delta = nullptr;  // [B, Hq, G Wq]  by slot: D
  A* d_q = nullptr;    // [B, G Wq, Hq, D]  by slot
  // By slot of [B, G Wk, Hq, D | Dv]; by token of the tokens of spans, [B, T n, Hq, D | Dv].
  A *d_k = nullptr, *d_v = nullptr;
  A* d_row_temperature = nullptr;  // [B, G Wq, Hq]  by slot, if wanted
};

template <class A>
BackwardWorkspace<A> backward_workspace(Arena& arena, const RoutingSizes& s) {
  BackwardWorkspace<A> w;
  int64_t key_rows = 0;  // of d_k and d_v
  if (s.by_slot) {
    const int64_t slots = s.groups * s.row_slots;
    key_rows = s.groups * s.key_slots;
    w.rows = csr_in(arena, s.batch, s.heads, s.rows, slots);
    w.keys = csr_in(arena, s.batch, s.heads, s.keys, key_rows);
    w.delta = arena.take<A>(s.batch * s.heads * slots);
    w.d_q = arena.take<A>(s.batch * slots * s.heads * s.dim);
  } else if (s.keys_listed) {
    w.regions = regions_in(arena, s);
    key_rows = w.regions.spans * s.key_region_size;
  }
  w.d_k = arena.take<A>(s.batch * key_rows * s.heads * s.dim);
  w.d_v = arena.take<A>(s.batch * key_rows * s.heads * s.value_dim);
  if (s.by_slot && s.d_row_temperature)
    w.d_row_temperature = arena.take<A>(s.batch * s.groups * s.row_slots * s.heads);
  return w;
}

// Groups are the sequences of the engine.
template <class A>
softmax::simt::ForwardPlan simt_plan(const RoutingSizes& s, const Call& call) {
  return softmax::simt::forward_plan<A>(s.batch * s.groups, s.heads, s.row_slots, s.key_slots,
                                        s.value_dim, call.context.multiprocessors);
}

inline void simt_partials(Arena& arena, const RoutingSizes& s, const Call& call) {
  if (call.element == DType::f64)
    arena.take<double>(simt_plan<double>(s, call).workspace());
  else
    arena.take<float>(simt_plan<float>(s, call).workspace());
}

inline int64_t workspace_bytes(const ForwardParams& p, const Call& call, Backend backend) {
  Arena arena;
  const RoutingSizes s = shape_of(p);
  static_cast<void>(forward_workspace(arena, s));
  if (backend == Backend::simt) simt_partials(arena, s, call);
  return arena.bytes();
}

inline int64_t workspace_bytes(const BackwardParams& p, DType element) {
  Arena arena;
  if (element == DType::f64)
    static_cast<void>(backward_workspace<double>(arena, shape_of(p)));
  else
    static_cast<void>(backward_workspace<float>(arena, shape_of(p)));
  return arena.bytes();
}

}  // namespace hw::routing_attention
