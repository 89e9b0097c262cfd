// SPDX-License-Identifier: Apache-2.0
// ContMix on CUDA: the weights of some tokens of a group, made in shared memory.
//
//   1. scores begin as bias and tables
//   2. 32 taps and 32 centres at a time: a warp has every fourth token, a lane a tap
//   3. a warp makes the softmax of a token, both windows apart
#pragma once

#include <limits>

#include "neighborhood/simt/tokens.cuh"
#include "ops/contmix/contmix_simt_layout.h"

#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"
#include "core/scalar_math.h"

namespace hw::contmix::simt {

using neighborhood::Window;

// Inputs that weights are made of, and where the tokens of a block are.
template <class Element>
struct WeightInputs {
  Ref<const Element, 5> affinity;  // [B, Y, X, G, A]
  Ref<const Element, 2> weight;    // [T, A]
  Ref<const Element, 1> bias;      // [T]
  Ref<const Element, 3> table[2];  // [G, 2 Ky - 1, 2 Kx - 1], by half
  Window window[2];
  int tokens;  // of a block

  explicit WeightInputs(const ForwardParams& p)
      : affinity(p.affinity.as<const Element>()),
        weight(p.weight.as<const Element>()),
        bias(p.bias.as<const Element>()),
        table{p.small_rpb.as<const Element>(), p.rpb.as<const Element>()},
        window{p.window(0), p.window(1)},
        tokens(tokens_of(p.weight.size[0], sizeof(Accum<Element>))) {}

  int64_t blocks_of_image() const { return ceil_div<int64_t>(window[0].tokens(), tokens); }
  int64_t blocks() const { return affinity.size[0] * affinity.size[3] * blocks_of_image(); }
  int bytes() const {
    return static_cast<int>(numbers_of(tokens, weight.size[0]) * sizeof(Accum<Element>));
  }
};

template <class Element>
struct WeightTile {
  using A = Accum<Element>;
  static constexpr int kWarps = kThreads / dev::kWarp;
  static constexpr int kOwn = kMostTokens / kWarps;  // tokens of a warp

  const WeightInputs<Element>& in;
  int64_t b, group, first;  // first token of the image
  int count;                // of tokens
  int taps;
  A* p;         // [tokens, T]
  A* affinity;  // [kMostTokens][kStep]
  A* map;       // [kStep][kStep + 1]: rows an odd number apart, lanes read a column

  HW_DEVICE WeightTile(const WeightInputs<Element>& inputs, A* memory) : in(inputs) {
    const int64_t tokens = in.window[0].tokens(), blocks = ceil_div<int64_t>(tokens, in.tokens);
    const int64_t index = dev::block_index_x(), plane = index / blocks;
    b = plane / in.affinity.size[3], group = plane % in.affinity.size[3];
    first = index % blocks * in.tokens;
    count = static_cast<int>(min_of<int64_t>(in.tokens, tokens - first));
    taps = static_cast<int>(in.weight.size[0]);
    p = memory, affinity = p + in.tokens * taps, map = affinity + kMostTokens * kStep;
  }

  HW_DEVICE HW_INLINE int64_t y(int i) const { return (first + i) / in.window[0].x.size; }
  HW_DEVICE HW_INLINE int64_t x(int i) const { return (first + i) % in.window[0].x.size; }
  HW_DEVICE HW_INLINE int small() const { return static_cast<int>(in.window[0].taps()); }

  HW_DEVICE HW_INLINE void make() const {
    for (int i = dev::thread_index(); i < count * taps; i += kThreads)
      p[i] = start(i / taps, i % taps);
    for (int64_t c = 0; c < in.weight.size[1]; c += kStep) {
      load_affinities(c);
      for (int t = 0; t < taps; t += kStep) {
        load_map(t, c);
        dev::sync_block();
        multiply(t);
        dev::sync_block();
      }
    }
    for (int i = dev::warp(); i < count; i += kWarps) {
      softmax(p + i * taps, small());
      softmax(p + i * taps + small(), taps - small());
    }
    dev::sync_block();
  }

 private:
  HW_DEVICE HW_INLINE A start(int i, int t) const {
    A s = in.bias ? static_cast<A>(in.bias(t)) : A(0);
    const int m = t < small() ? 0 : 1, tap = m == 0 ? t : t - small();
    if (!in.table[m]) return s;
    const Window& w = in.window[m];
    const int width = static_cast<int>(w.x.kernel);
    return s + static_cast<A>(in.table[m](group, w.y.first_offset(y(i)) + tap / width,
                                          w.x.first_offset(x(i)) + tap % width));
  }

  HW_DEVICE HW_INLINE void load_affinities(int64_t first_centre) const {
    for (int n = dev::thread_index(); n < kMostTokens * kStep; n += kThreads) {
      const int i = n / kStep;
      const int64_t c = first_centre + n % kStep;
      affinity[n] = i < count && c < in.weight.size[1]
                        ? static_cast<A>(in.affinity(b, y(i), x(i), group, c))
                        : A(0);
    }
  }

  HW_DEVICE HW_INLINE void load_map(int first_tap, int64_t first_centre) const {
    for (int n = dev::thread_index(); n < kStep * kStep; n += kThreads) {
      const int t = first_tap + n / kStep;
      const int64_t c = first_centre + n % kStep;
      map[n / kStep * (kStep + 1) + n % kStep] =
          t < taps && c < in.weight.size[1] ? static_cast<A>(in.weight(t, c)) : A(0);
    }
  }

  HW_DEVICE HW_INLINE void multiply(int first_tap) const {
    const A* row = map + dev::lane() * (kStep + 1);
    A sum[kOwn] = {};
    for (int c = 0; c < kStep; ++c) {
      HW_UNROLL
      for (int n = 0; n < kOwn; ++n)
        sum[n] += row[c] * affinity[(dev::warp() + n * kWarps) * kStep + c];
    }
    const int t = first_tap + dev::lane();
    HW_UNROLL
    for (int n = 0; n < kOwn; ++n) {
      const int i = dev::warp() + n * kWarps;
      if (i < count && t < taps) p[i * taps + t] += sum[n];
    }
  }

  HW_DEVICE HW_INLINE static void softmax(A* s, int n) {
    A most = -std::numeric_limits<A>::infinity();
    for (int t = dev::lane(); t < n; t += dev::kWarp) most = dev::larger(most, s[t]);
    most = dev::warp_max(most);
    A sum = 0;
    for (int t = dev::lane(); t < n; t += dev::kWarp) {
      s[t] = exp_of(s[t] - most);
      sum += s[t];
    }
    const A factor = A(1) / dev::warp_sum(sum);
    for (int t = dev::lane(); t < n; t += dev::kWarp) s[t] *= factor;
  }
};

}  // namespace hw::contmix::simt
