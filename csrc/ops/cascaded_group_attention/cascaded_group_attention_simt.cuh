// SPDX-License-Identifier: Apache-2.0
// Cascaded group attention on CUDA without tensor cores: every dtype, sm_75 and later.
//
// A block has a window and runs the whole cascade of it: a thread has a column of a projection and
// four tokens, a warp the scores of a query, a lane a key of them, then a column of o. x is read
// and y written once, everything between is the block's own, see
// cascaded_group_attention_simt_layout.h.
#pragma once

#include <cmath>
#include <limits>

#include "ops/cascaded_group_attention/cascaded_group_attention.h"
#include "ops/cascaded_group_attention/cascaded_group_attention_simt_layout.h"

#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"
#include "core/scalar_math.h"

namespace hw::cascaded_group_attention::simt {

template <class Element>
struct WindowKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;
  static constexpr int kTokens = 4;  // of a thread in a product

  struct Params {
    ForwardParams f;
    Layout layout;
    A* memory;  // of all blocks, null: shared
    A scale;    // K^-1/2
    int side;   // R
  };

  // Of a block.
  struct Window {
    A *f, *qkv, *q, *relu, *scores;
    ForwardParams::Place place;
    int tokens, width, group, keys, projected, channels;  // N, of the window, d, K, F, C
  };

  HW_DEVICE static void main(const Params& p) {
    Window w = window_of(p);
    for (int64_t i = dev::block_index_x(); i < p.f.windows(); i += dev::grid_size_x()) {
      w.place = p.f.place(i);
      for (int at = dev::thread_index(); at < w.tokens * w.group; at += kThreads)
        w.f[at] = x(p, w, at / w.group, at % w.group);
      for (int head = 0; head < static_cast<int>(p.f.heads()); ++head) {
        dev::sync_block();
        project(p, w, head);
        dev::sync_block();
        convolve(p, w, head);
        dev::sync_block();
        attend(p, w, head);
      }
      dev::sync_block();
      project_out(p, w);
    }
  }

 private:
  HW_DEVICE static Window window_of(const Params& p) {
    A* base = p.memory ? p.memory + dev::block_index_x() * p.layout.size : dev::shared<A>();
    Window w{};
    w.f = base + p.layout.f, w.qkv = base + p.layout.qkv, w.q = base + p.layout.q;
    w.relu = base + p.layout.relu, w.scores = base + p.layout.scores;
    w.tokens = static_cast<int>(p.f.tokens()), w.width = static_cast<int>(p.f.width);
    w.group = static_cast<int>(p.f.group()), w.keys = static_cast<int>(p.f.key_dim());
    w.projected = static_cast<int>(p.f.projected());
    w.channels = static_cast<int>(p.f.channels());
    return w;
  }

  // Whether the image has a token of the window.
  HW_DEVICE HW_INLINE static bool inside(const Params& p, const Window& w, int token) {
    return w.place.y + token / w.width < p.f.x.size[1] &&
           w.place.x + token % w.width < p.f.x.size[2];
  }

  // 0 beyond the image.
  HW_DEVICE HW_INLINE static A x(const Params& p, const Window& w, int token, int channel) {
    if (!inside(p, w, token)) return A(0);
    return static_cast<A>(p.f.x.template as<const Element>()(
        w.place.batch, w.place.y + token / w.width, w.place.x + token % w.width, channel));
  }

  // store(i, j, sum_c a[i, c] weight(c, j)) for all tokens i and the columns j.
  template <class Weight, class Store>
  HW_DEVICE HW_INLINE static void multiply(const Window& w, int columns, int depth, const A* a,
                                           Weight weight, Store store) {
    const int tiles = ceil_div(w.tokens, kTokens);
    for (int item = dev::thread_index(); item < tiles * columns; item += kThreads) {
      const int j = item % columns, first = item / columns * kTokens;
      A sum[kTokens] = {};
      const A* row[kTokens];
      HW_UNROLL
      for (int r = 0; r < kTokens; ++r) row[r] = a + min_of(first + r, w.tokens - 1) * depth;
      for (int c = 0; c < depth; ++c) {
        const A factor = weight(c, j);
        HW_UNROLL
        for (int r = 0; r < kTokens; ++r) sum[r] += row[r][c] * factor;
      }
      HW_UNROLL
      for (int r = 0; r < kTokens; ++r)
        if (first + r < w.tokens) store(first + r, j, sum[r]);
    }
  }

  HW_DEVICE static void project(const Params& p, const Window& w, int head) {
    const auto weight = p.f.qkv_weight.template as<const Element>().slice(head);
    const auto bias = p.f.qkv_bias.template as<const Element>().slice(head);
    multiply(
        w, w.projected, w.group, w.f, [&](int c, int j) { return static_cast<A>(weight(c, j)); },
        [&](int i, int j, A sum) { w.qkv[i * w.projected + j] = sum + static_cast<A>(bias(j)); });
  }

  HW_DEVICE static void convolve(const Params& p, const Window& w, int head) {
    const auto taps = p.f.conv_weight.template as<const Element>().slice(head);
    const auto bias = p.f.conv_bias.template as<const Element>().slice(head);
    const int reach = static_cast<int>(p.f.kernel()) / 2, height = w.tokens / w.width;
    for (int at = dev::thread_index(); at < w.tokens * w.keys; at += kThreads) {
      const int c = at % w.keys, y = at / w.keys / w.width, x = at / w.keys % w.width;
      A sum = static_cast<A>(bias(c));
      for (int dy = max_of(-reach, -y); dy <= min_of(reach, height - 1 - y); ++dy)
        for (int dx = max_of(-reach, -x); dx <= min_of(reach, w.width - 1 - x); ++dx)
          sum += static_cast<A>(taps(dy + reach, dx + reach, c)) *
                 w.qkv[((y + dy) * w.width + x + dx) * w.projected + c];
      w.q[at] = sum * p.scale;
    }
  }

  // o of the warp's queries: its positive part to relu, with the next group to f.
  HW_DEVICE static void attend(const Params& p, const Window& w, int head) {
    A* s = w.scores + dev::warp() * w.tokens;
    const A* v = w.qkv + 2 * w.keys;
    const bool more = head + 1 < static_cast<int>(p.f.heads());
    for (int i = dev::warp(); i < w.tokens; i += kWarps) {
      const A total = weights(p, w, head, i, s);
      dev::sync_warp();
      for (int c = dev::lane(); c < w.group; c += dev::kWarp) {
        A o = 0;
        for (int j = 0; j < w.tokens; ++j) o += s[j] * v[j * w.projected + c];
        o /= total;
        w.relu[i * w.channels + head * w.group + c] = o < A(0) ? A(0) : o;  // NaN stays
        if (more) w.f[i * w.group + c] = o + x(p, w, i, (head + 1) * w.group + c);
      }
      dev::sync_warp();
    }
  }

  // e^{score - max} of query i to s; returns their sum.
  HW_DEVICE HW_INLINE static A weights(const Params& p, const Window& w, int head, int i, A* s) {
    const auto table = p.f.bias_table.template as<const Element>().slice(head);
    const A* q = w.q + i * w.keys;
    constexpr A kLeast = -std::numeric_limits<A>::infinity();
    A most = kLeast;
    for (int j = dev::lane(); j < w.tokens; j += dev::kWarp) {
      const A* k = w.qkv + j * w.projected + w.keys;
      A score = 0;
      for (int c = 0; c < w.keys; ++c) score += q[c] * k[c];
      const int dy = i / w.width - j / w.width, dx = i % w.width - j % w.width;
      score += static_cast<A>(table((dy < 0 ? -dy : dy) * p.side + (dx < 0 ? -dx : dx)));
      s[j] = score;
      most = dev::larger(most, score);
    }
    most = dev::warp_max(most);
    A total = 0;
    for (int j = dev::lane(); j < w.tokens; j += dev::kWarp) {
      s[j] = exp_of(s[j] - most);
      total += s[j];
    }
    return dev::warp_sum(total);
  }

  HW_DEVICE static void project_out(const Params& p, const Window& w) {
    const auto weight = p.f.out_weight.template as<const Element>();
    const auto bias = p.f.out_bias.template as<const Element>();
    const auto y = p.f.y.template as<Element>();
    multiply(
        w, w.channels, w.channels, w.relu,
        [&](int c, int j) { return static_cast<A>(weight(c, j)); },
        [&](int i, int j, A sum) {
          if (inside(p, w, i))
            y(w.place.batch, w.place.y + i / w.width, w.place.x + i % w.width, j) =
                Element(sum + static_cast<A>(bias(j)));
        });
  }
};

template <class Element>
void forward(const ForwardParams& f, const Call& call) {
  using Kernel = WindowKernel<Element>;
  using A = typename Kernel::A;
  const Plan plan = make_plan(f, call);
  Arena arena(call.workspace, "cascaded_group_attention");
  A* memory = plan.in_shared ? nullptr : arena.take<A>(plan.blocks * plan.layout.size);
  const A scale = A(1) / std::sqrt(static_cast<A>(f.key_dim()));
  launch<Kernel>({plan.blocks, 1, 1}, plan.in_shared ? static_cast<int>(plan.bytes) : 0,
                 call.context, {f, plan.layout, memory, scale, static_cast<int>(f.side())});
}

}  // namespace hw::cascaded_group_attention::simt

namespace hw::cascaded_group_attention {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& forward = simt::forward<Element>;
};

}  // namespace hw::cascaded_group_attention
