// SPDX-License-Identifier: Apache-2.0
// Attention inside the windows of an image on CUDA: workspace. From shapes only, and no device
// code: the host side asks `workspace_bytes`. Both CUDA backends use it.
//
//   forward    the bias of a window [Hq, N, N], where there is a table; behind it partial results
//              of spans of keys, which are of the backend
//   backward   the bias; parts of its gradient [P, Hq, N, N], where it is wanted
#pragma once

#include <cstdint>
#include <type_traits>

#include "ops/window_attention/window_attention.h"
#include "softmax/simt/layout.h"

#include "core/host/workspace.h"

namespace hw::window_attention {

// Parts of the windows of a call, each with sums of its own over [Hq, N, N]: as many as keep a
// device busy, of tiles of 64 x 64.
inline int64_t bias_parts(int64_t windows, int64_t heads, int64_t slots) {
  constexpr int64_t kTiles = 512, kSide = 64;
  const int64_t side = ceil_div(slots, kSide);
  const int64_t wanted = ceil_div(kTiles, max_of<int64_t>(heads * side * side, 1));
  return max_of<int64_t>(min_of(windows, wanted), 1);
}

// Sizes of a call.
struct WindowSizes {
  int64_t sequences, heads, slots, value_dim;  // B W, Hq, N, Dv
  int64_t parts;                               // P
  bool has_bias, d_bias;
};

template <class Params>
WindowSizes sizes_of(const Params& p) {
  WindowSizes s{};
  s.sequences = p.q.size[0] * p.grid.count();
  s.heads = p.q.size[2], s.slots = p.grid.size(), s.value_dim = p.v.size[3];
  s.parts = bias_parts(s.sequences, s.heads, s.slots);
  s.has_bias = bool(p.bias_table);
  if constexpr (requires { p.d_bias_table; }) s.d_bias = bool(p.d_bias_table);
  return s;
}

// The bias of a window; null without a table.
template <class Element>
Element* bias_in(Arena& arena, const WindowSizes& s) {
  return s.has_bias ? arena.take<Element>(s.heads * s.slots * s.slots) : nullptr;
}

// What the engine is called with: the bias in place of the table.
template <class Params>
auto engine_params(const Params& p, const void* bias) {
  const int64_t heads = p.q.size[2], slots = p.grid.size();
  std::conditional_t<std::is_same_v<Params, ForwardParams>, softmax::ForwardParams,
                     softmax::BackwardParams>
      e = p;
  if (p.bias_table)
    e.bias = {bias, {p.q.size[0], heads, slots, slots}, {0, slots * slots, slots, 1}};
  return e;
}

template <class Element, class A>
struct BackwardWorkspace {
  Element* bias;  // [Hq, N, N], or null
  A* d_bias;      // [P, Hq, N, N], or null
};

template <class Element, class A>
BackwardWorkspace<Element, A> backward_workspace(Arena& arena, const WindowSizes& s) {
  Element* const bias = bias_in<Element>(arena, s);
  const int64_t sums = s.parts * s.heads * s.slots * s.slots;
  return {bias, s.d_bias ? arena.take<A>(sums) : nullptr};
}

// What the engine's gradients go by: the bias in place of the table, and parts of its gradient.
template <class Element, class A>
softmax::BackwardParams engine_params(const BackwardParams& p,
                                      const BackwardWorkspace<Element, A>& at) {
  softmax::BackwardParams e = engine_params(p, at.bias);
  const WindowSizes s = sizes_of(p);
  const int64_t square = s.slots * s.slots;
  if (at.d_bias)
    e.d_bias = {
        at.d_bias, {s.parts, s.heads, s.slots, s.slots}, {s.heads * square, square, s.slots, 1}};
  return e;
}

// f(element, number of the accumulation type), of the call's dtype. 16-bit elements are counted as
// numbers of two bytes.
template <class F>
void with_element(DType element, const F& f) {
  if (element == DType::f64) return f(double{}, double{});
  element == DType::f32 ? f(float{}, float{}) : f(uint16_t{}, float{});
}

inline int64_t workspace_bytes(const BackwardParams& p, DType element) {
  Arena arena;
  with_element(element, [&]<class Element, class A>(Element, A) {
    static_cast<void>(backward_workspace<Element, A>(arena, sizes_of(p)));
  });
  return arena.bytes();
}

namespace simt {

template <class A>
softmax::simt::ForwardPlan plan_of(const WindowSizes& s, const Call& call) {
  return softmax::simt::forward_plan<A>(s.sequences, s.heads, s.slots, s.slots, s.value_dim,
                                        call.context.multiprocessors);
}

inline int64_t workspace_bytes(const ForwardParams& p, const Call& call) {
  Arena arena;
  const WindowSizes s = sizes_of(p);
  with_element(call.element, [&]<class Element, class A>(Element, A) {
    bias_in<Element>(arena, s);
    arena.take<A>(plan_of<A>(s, call).workspace());
  });
  return arena.bytes();
}

}  // namespace simt
}  // namespace hw::window_attention
