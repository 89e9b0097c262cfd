// SPDX-License-Identifier: Apache-2.0
// The loops over neighbourhoods on the CPU: the windows of one row of queries, of one batch entry
// and head. Weights come from wherever the operator has them; this names none of its clients.
//
//   mix       o[x] = sum_t w[x, t] v[key(x, t)]                 t increasing
//   dot       s[x, t] = <g[x], v[key(x, t)]>                    whole vectors of t
//   receive   dv[k] += sum_q w[q, t] g[q], key(q, t) = k        of one row of keys; q increasing
//
// Values, cotangents and results are packed: [rows][X][pitch] in the accumulation type, pitch = D
// rounded up to whole vectors, zeros beyond D. A key receives from rows of queries one after
// another, so that the order of its sum is that of the queries wherever rows are cut.
#pragma once

#include <cstdint>

#include "neighborhood/window.h"

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "core/math.h"
#include "core/ref.h"

namespace hw::neighborhood {
namespace {

// Where the keys of a window lie among packed values.
template <class A>
struct Layout {
  Window window;
  int64_t pitch = 0, row = 0;       // from token to token, from row to row
  int64_t taps = 0;                 // of a window, in whole vectors
  const int64_t* start = nullptr;   // [X]     column of the first key of a query
  const int64_t* offset = nullptr;  // [taps]  from the first key to key t; 0 beyond the window

  static int64_t padded(int64_t n) { return round_up<int64_t>(n, kLanes<A>); }
  static int64_t words(const Window& w) { return w.x.size + padded(w.taps()); }

  // `memory`: int64 [words(w)]
  Layout(const Window& w, int64_t width, int64_t* memory)
      : window(w), pitch(padded(width)), row(w.x.size * pitch), taps(padded(w.taps())) {
    for (int64_t x = 0; x < w.x.size; ++x) memory[x] = w.x.start(x);
    start = memory;
    int64_t* const to = memory + w.x.size;
    for (int64_t t = 0; t < taps; ++t)
      to[t] = t < w.taps() ? t / w.x.kernel * row + t % w.x.kernel * pitch : 0;
    offset = to;
  }
};

// ---- Packed rows --------------------------------------------------------------------------------

// Row y of x [B, Y, X, H, D] as [X][pitch].
template <class T, class A>
HW_NOINLINE void pack_row(A* to, int64_t pitch, const Ref<const T, 5>& x, int64_t b, int64_t y,
                          int64_t h) {
  const int64_t width = x.size[4];
  for (int64_t i = 0; i < x.size[2]; ++i, to += pitch) {
    widen(to, x.at(b, y, i, h), width, x.stride[4]);
    for (int64_t d = width; d < pitch; ++d) to[d] = A(0);
  }
}

template <class T, class A>
HW_NOINLINE void unpack_row(const Ref<T, 5>& x, int64_t b, int64_t y, int64_t h, const A* from,
                            int64_t pitch) {
  for (int64_t i = 0; i < x.size[2]; ++i, from += pitch)
    narrow(x.at(b, y, i, h), from, x.size[4], x.stride[4]);
}

// The weights of a row of queries: token x has those at data + x * pitch.
template <class A>
struct Weights {
  const A* data;
  int64_t pitch;
};

// ---- mix ----------------------------------------------------------------------------------------

// kVectors vectors of columns of kTokens queries side by side.
template <int kTokens, int kVectors, class A>
HW_INLINE void mix_tile(const Layout<A>& l, Weights<A> w, const A* const (&first)[kTokens], A* to) {
  Vec<A> sum[kTokens][kVectors];
  HW_UNROLL for (int i = 0; i < kTokens; ++i) {
    HW_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = Vec<A>{};
  }
  const int64_t height = l.window.y.kernel, width = l.window.x.kernel;
  for (int64_t a = 0; a < height; ++a) {
    int64_t key = a * l.row;
    for (int64_t b = 0; b < width; ++b, key += l.pitch, ++w.data) {
      HW_UNROLL for (int i = 0; i < kTokens; ++i) {
        const Vec<A> weight = splat(w.data[i * w.pitch]);
        HW_UNROLL for (int v = 0; v < kVectors; ++v) {
          sum[i][v] = fma(weight, load(first[i] + key + v * kLanes<A>), sum[i][v]);
        }
      }
    }
  }
  HW_UNROLL for (int i = 0; i < kTokens; ++i) {
    HW_UNROLL for (int v = 0; v < kVectors; ++v) store(to + i * l.pitch + v * kLanes<A>, sum[i][v]);
  }
}

template <int kVectors, class A>
HW_NOINLINE void mix_columns(const Layout<A>& l, Weights<A> w, const A* values, A* to) {
  constexpr int kTokens = 8 / kVectors;  // eight sums hide the latency of one
  int64_t x = 0;
  for (; x + kTokens <= l.window.x.size; x += kTokens) {
    const A* first[kTokens];
    HW_UNROLL for (int i = 0; i < kTokens; ++i) first[i] = values + l.start[x + i] * l.pitch;
    mix_tile<kTokens, kVectors>(l, {w.data + x * w.pitch, w.pitch}, first, to + x * l.pitch);
  }
  for (; x < l.window.x.size; ++x) {
    const A* first[1] = {values + l.start[x] * l.pitch};
    mix_tile<1, kVectors>(l, {w.data + x * w.pitch, w.pitch}, first, to + x * l.pitch);
  }
}

// f(integral_constant<vectors>, first column) for all columns of a packed row.
template <class A, class F>
HW_INLINE void each_columns(int64_t pitch, F f) {
  int64_t c = 0;
  for (; c + 4 * kLanes<A> <= pitch; c += 4 * kLanes<A>) f(std::integral_constant<int, 4>{}, c);
  for (; c + 2 * kLanes<A> <= pitch; c += 2 * kLanes<A>) f(std::integral_constant<int, 2>{}, c);
  for (; c < pitch; c += kLanes<A>) f(std::integral_constant<int, 1>{}, c);
}

// values: packed, from the first row of the window on. to: [X][pitch]
template <class A>
void mix(const Layout<A>& l, Weights<A> w, const A* values, A* to) {
  each_columns<A>(l.pitch, [&](auto vectors, int64_t c) {
    mix_columns<vectors.value>(l, w, values + c, to + c);
  });
}

// ---- dot ----------------------------------------------------------------------------------------

template <int kVectors, class A>
HW_NOINLINE void dot_columns(bool accumulate, const Layout<A>& l, const A* g, const A* values,
                             A* to, int64_t to_pitch) {
  for (int64_t x = 0; x < l.window.x.size; ++x, g += l.pitch, to += to_pitch) {
    Vec<A> own[kVectors];
    HW_UNROLL for (int v = 0; v < kVectors; ++v) own[v] = load(g + v * kLanes<A>);
    const A* const first = values + l.start[x] * l.pitch;
    for (int64_t t = 0; t < l.taps; t += kLanes<A>) {
      Vec<A> rows[kLanes<A>];
      HW_UNROLL for (int i = 0; i < kLanes<A>; ++i) {
        const A* const key = first + l.offset[t + i];
        rows[i] = own[0] * load(key);
        HW_UNROLL for (int v = 1; v < kVectors; ++v) {
          rows[i] = fma(own[v], load(key + v * kLanes<A>), rows[i]);
        }
      }
      Vec<A> total = across<A>(rows, [](Vec<A> p, Vec<A> q) { return p + q; });
      if (accumulate) total += load(to + t);
      store(to + t, total);
    }
  }
}

// g: [X][pitch]. to: [X][to_pitch], of each query l.taps products; beyond the window those with
// the first key.
template <class A>
void dot(const Layout<A>& l, const A* g, const A* values, A* to, int64_t to_pitch) {
  each_columns<A>(l.pitch, [&](auto vectors, int64_t c) {
    dot_columns<vectors.value>(c > 0, l, g + c, values + c, to, to_pitch);
  });
}

// ---- receive ------------------------------------------------------------------------------------

template <int kVectors, class A>
HW_NOINLINE void receive_columns(const Layout<A>& l, Weights<A> w, const A* g, A* to) {
  for (int64_t x = 0; x < l.window.x.size; ++x, to += l.pitch) {
    Vec<A> sum[kVectors];
    HW_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] = load(to + v * kLanes<A>);
    const int64_t end = l.window.x.end_query(x);
    for (int64_t q = l.window.x.first_query(x); q < end; ++q) {
      const Vec<A> weight = splat(w.data[q * w.pitch + x - l.start[q]]);
      const A* const from = g + q * l.pitch;
      HW_UNROLL for (int v = 0; v < kVectors; ++v) {
        sum[v] = fma(weight, load(from + v * kLanes<A>), sum[v]);
      }
    }
    HW_UNROLL for (int v = 0; v < kVectors; ++v) store(to + v * kLanes<A>, sum[v]);
  }
}

// What row `tap_row` of the windows of a row of queries gives to its row of keys, to [X][pitch].
template <class A>
void receive(const Layout<A>& l, Weights<A> w, int64_t tap_row, const A* g, A* to) {
  w.data += tap_row * l.window.x.kernel;
  each_columns<A>(l.pitch, [&](auto vectors, int64_t c) {
    receive_columns<vectors.value>(l, w, g + c, to + c);
  });
}

}  // namespace
}  // namespace hw::neighborhood
