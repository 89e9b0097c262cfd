// SPDX-License-Identifier: Apache-2.0
// The loops over neighbourhoods on CUDA: every dtype, every width, sm_75 and later.
//
//   MixKernel       o_q = sum_t w_qt v_key(q, t)
//   DotKernel       s_qt = <g_q, v_key(q, t)>
//   ReceiveKernel   dv_k = sum of w_qt g_q over the queries that see key k, in their order
//
// A unit is one token of a head, carried by 8, 16 or 32 lanes of a warp that own its columns;
// neighbouring units are neighbouring heads of a token, whose numbers lie side by side. Windows of
// neighbouring tokens overlap: values come from the caches. Weights are those of a caller's tensor
// or workspace, of the type W; nothing here knows what made them.
#pragma once

#include <cstdint>

#include "neighborhood/window.h"

#include "core/dtype.h"
#include "core/gpu/device.cuh"
#include "core/math.h"
#include "core/ref.h"

namespace hw::neighborhood::simt {

inline constexpr int kThreads = 128;
inline constexpr int kOwn = 4;  // columns of a lane, that many lanes apart, at a time

// Lanes of a unit of `width` columns.
inline int lanes_of(int64_t width) { return width <= 8 ? 8 : width <= 16 ? 16 : 32; }

// A token of a head.
struct Token {
  int64_t b, y, x, h;
  int lane;     // within the unit
  bool exists;  // units beyond the last repeat it, and write nothing
};

// The unit of a thread, of an image [B, Y, X, H, ...].
template <class T>
HW_DEVICE HW_INLINE Token find_token(const Ref<T, 5>& image, int lanes) {
  const int64_t count = image.size[0] * image.size[1] * image.size[2] * image.size[3];
  const int64_t index =
      static_cast<int64_t>(dev::block_index_x()) * (kThreads / lanes) + dev::thread_index() / lanes;
  int64_t rest = min_of(index, count - 1);
  Token token{};
  token.h = rest % image.size[3], rest /= image.size[3];
  token.x = rest % image.size[2], rest /= image.size[2];
  token.y = rest % image.size[1], token.b = rest / image.size[1];
  token.lane = dev::thread_index() % lanes;
  token.exists = index < count;
  return token;
}

template <class T>
int64_t blocks_of(const Ref<T, 5>& image, int lanes) {
  const int64_t count = image.size[0] * image.size[1] * image.size[2] * image.size[3];
  return ceil_div<int64_t>(count, kThreads / lanes);
}

// The columns first + lane, first + lane + lanes, ... of one token.
template <class A>
struct Columns {
  A sum[kOwn] = {};
  int64_t first;
  int lanes;

  HW_DEVICE HW_INLINE Columns(int64_t at, int group) : first(at), lanes(group) {}
  HW_DEVICE HW_INLINE int64_t column(int i) const { return first + i * lanes; }

  template <class Element>
  HW_DEVICE HW_INLINE void add(A weight, const Element* from, int64_t step, int64_t width) {
    HW_UNROLL
    for (int i = 0; i < kOwn; ++i)
      if (column(i) < width) sum[i] += weight * static_cast<A>(from[column(i) * step]);
  }
  template <class Element>
  HW_DEVICE HW_INLINE void store(Element* to, int64_t step, int64_t width) const {
    HW_UNROLL
    for (int i = 0; i < kOwn; ++i)
      if (column(i) < width) to[column(i) * step] = static_cast<Element>(sum[i]);
  }
};

// o of one query: weights w[t * step]; v, o: images of its batch entry and head.
template <class A, class W, class Element>
HW_DEVICE HW_INLINE void mix_token(const Window& window, const W* w, int64_t step,
                                   const Ref<const Element, 5>& v, const Ref<Element, 5>& o,
                                   const Token& q, int lanes) {
  const Element* const from = v.at(q.b, window.y.start(q.y), window.x.start(q.x), q.h);
  const int64_t width = v.size[4];
  for (int64_t first = q.lane; first < width; first += kOwn * lanes) {
    Columns<A> columns(first, lanes);
    const W* weight = w;
    for (int64_t a = 0; a < window.y.kernel; ++a) {
      const Element* key = from + a * v.stride[1];
      for (int64_t b = 0; b < window.x.kernel; ++b, key += v.stride[2], weight += step)
        columns.add(static_cast<A>(*weight), key, v.stride[4], width);
    }
    columns.store(o.at(q.b, q.y, q.x, q.h), o.stride[4], width);
  }
}

template <class W, class Element>
struct MixKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;

  struct Params {
    Ref<const W, 5> w;        // [B, Y, X, H, T]
    Ref<const Element, 5> v;  // [B, Y, X, H, D]
    Ref<Element, 5> o;        // [B, Y, X, H, D]
    Window window;
    int lanes;
  };

  HW_DEVICE static void main(const Params& p) {
    const Token q = find_token(p.o, p.lanes);
    if (!q.exists) return;
    mix_token<A>(p.window, p.w.at(q.b, q.y, q.x, q.h), p.w.stride[4], p.v, p.o, q, p.lanes);
  }
};

template <class W, class Element>
struct DotKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;

  struct Params {
    Ref<const Element, 5> g;  // [B, Y, X, H, D]
    Ref<const Element, 5> v;  // [B, Y, X, H, D]
    Ref<W, 5> s;              // [B, Y, X, H, T]
    Window window;
    int lanes;
  };

  HW_DEVICE static void main(const Params& p) {
    const Token q = find_token(p.g, p.lanes);
    const Element* const own = p.g.at(q.b, q.y, q.x, q.h);
    const Element* const from = p.v.at(q.b, p.window.y.start(q.y), p.window.x.start(q.x), q.h);
    W* to = p.s.at(q.b, q.y, q.x, q.h);
    for (int64_t a = 0; a < p.window.y.kernel; ++a) {
      const Element* key = from + a * p.v.stride[1];
      for (int64_t b = 0; b < p.window.x.kernel; ++b, key += p.v.stride[2], to += p.s.stride[4]) {
        A sum = 0;
        for (int64_t c = q.lane; c < p.v.size[4]; c += p.lanes)
          sum += static_cast<A>(own[c * p.g.stride[4]]) * static_cast<A>(key[c * p.v.stride[4]]);
        for (int mask = p.lanes / 2; mask > 0; mask /= 2) sum += dev::shuffle_xor(sum, mask);
        if (q.exists && q.lane == 0) *to = static_cast<W>(sum);
      }
    }
  }
};

template <class W, class Element>
struct ReceiveKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;

  struct Params {
    Ref<const W, 5> w;        // [B, Y, X, H, T]
    Ref<const Element, 5> g;  // [B, Y, X, H, D]
    Ref<Element, 5> d_v;      // [B, Y, X, H, D]
    Window window;
    int lanes;
  };

  HW_DEVICE static void main(const Params& p) {
    const Token k = find_token(p.d_v, p.lanes);
    if (!k.exists) return;
    const Axis &rows = p.window.y, &line = p.window.x;
    const int64_t width = p.d_v.size[4];
    for (int64_t first = k.lane; first < width; first += kOwn * p.lanes) {
      Columns<A> columns(first, p.lanes);
      for (int64_t y = rows.first_query(k.y); y < rows.end_query(k.y); ++y) {
        const int64_t tap = (k.y - rows.start(y)) * line.kernel + k.x;
        for (int64_t x = line.first_query(k.x); x < line.end_query(k.x); ++x)
          columns.add(static_cast<A>(p.w(k.b, y, x, k.h, tap - line.start(x))),
                      p.g.at(k.b, y, x, k.h), p.g.stride[4], width);
      }
      columns.store(p.d_v.at(k.b, k.y, k.x, k.h), p.d_v.stride[4], width);
    }
  }
};

}  // namespace hw::neighborhood::simt
