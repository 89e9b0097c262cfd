// SPDX-License-Identifier: Apache-2.0
// The weights of cascaded group attention as the CPU multiplies them; the mathematics is in
// cascaded_group_attention.h.
//
// Columns of q, k and v begin at whole vectors, [Kp | Kp | dp], where zeros fill them up. Weights
// that lie like that already are used where they lie. The bias of a pair comes from a matrix of
// each head, [N, Np], keys by queries.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/cascaded_group_attention/cascaded_group_attention.h"

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "core/dtype.h"

namespace hw::cascaded_group_attention {
namespace {

// Shape, and those in whole vectors.
template <class A>
struct Shape {
  static constexpr int kLane = kLanes<A>;
  int heads, group, keys, kernel, channels, tokens;                          // H d K S C N
  int height, width, side;                                                   // of a window; R
  int padded_group, padded_keys, projected, padded_channels, padded_tokens;  // dp Kp Fp Cp Np

  explicit Shape(const ForwardParams& p)
      : heads(static_cast<int>(p.heads())),
        group(static_cast<int>(p.group())),
        keys(static_cast<int>(p.key_dim())),
        kernel(static_cast<int>(p.kernel())),
        channels(static_cast<int>(p.channels())),
        tokens(static_cast<int>(p.tokens())),
        height(static_cast<int>(p.height)),
        width(static_cast<int>(p.width)),
        side(static_cast<int>(p.side())),
        padded_group(round_up(group, kLane)),
        padded_keys(round_up(keys, kLane)),
        projected(2 * padded_keys + padded_group),
        padded_channels(round_up(channels, kLane)),
        padded_tokens(round_up(tokens, kLane)) {}
};

// Rows of a matrix to multiply by.
template <class A>
struct Matrix {
  const A* data;
  int64_t ld;
};

template <class T>
class Weights {
 public:
  using A = Accum<T>;

  Weights(const ForwardParams& p, const Shape<A>& sizes, int threads)
      : p_(p), n_(sizes), radius_(static_cast<size_t>(n_.heads)) {
    qkv_in_place_ = std::is_same_v<T, A> && p_.qkv_weight.stride[2] == 1 &&
                    n_.padded_keys == n_.keys && n_.padded_group == n_.group;
    out_in_place_ =
        std::is_same_v<T, A> && p_.out_weight.stride[1] == 1 && n_.padded_channels == n_.channels;
    int64_t at = 0;
    const auto part = [&](int64_t count) {
      at += Scratch::bytes_of<A>(count) / static_cast<int64_t>(sizeof(A));
      return at - Scratch::bytes_of<A>(count) / static_cast<int64_t>(sizeof(A));
    };
    const int64_t heads = n_.heads;
    qkv_ = part(qkv_in_place_ ? 0 : heads * n_.group * n_.projected);
    qkv_bias_ = part(heads * n_.projected);
    taps_ = part(heads * n_.kernel * n_.kernel * n_.padded_keys);
    conv_bias_ = part(heads * n_.padded_keys);
    // Segments of a row are written in whole vectors, the last one beyond its end.
    table_ = part(heads * n_.tokens * n_.padded_tokens + Shape<A>::kLane);
    out_ = part(out_in_place_ ? 0 : int64_t{n_.channels} * n_.padded_channels);
    out_bias_ = part(n_.padded_channels);
    memory_.reserve(at * static_cast<int64_t>(sizeof(A)));
    for (int h = 0; h < n_.heads; ++h) pack_head(h);
    pack_out(threads);
  }

  Matrix<A> qkv(int head) const {  // [d, Fp]
    if constexpr (std::is_same_v<T, A>)
      if (qkv_in_place_) return {p_.qkv_weight.as<const A>().at(head), p_.qkv_weight.stride[1]};
    return {base() + qkv_ + int64_t{head} * n_.group * n_.projected, n_.projected};
  }
  const A* qkv_bias(int head) const {  // [Fp]
    return base() + qkv_bias_ + int64_t{head} * n_.projected;
  }
  // [Kp] of the tap (dy, dx), each from -S / 2 to S / 2.
  const A* tap(int head, int dy, int dx) const {
    const int middle = n_.kernel / 2;
    const int64_t at = (int64_t{head} * n_.kernel + dy + middle) * n_.kernel + dx + middle;
    return base() + taps_ + at * n_.padded_keys;
  }
  const A* conv_bias(int head) const {  // [Kp]
    return base() + conv_bias_ + int64_t{head} * n_.padded_keys;
  }
  // Taps beyond it, in either direction, are 0.
  int radius(int head) const { return radius_[static_cast<size_t>(head)]; }
  const A* table(int head) const {  // [N, Np]: of key and query
    return base() + table_ + int64_t{head} * n_.tokens * n_.padded_tokens;
  }
  Matrix<A> out() const {  // [C, Cp]
    if constexpr (std::is_same_v<T, A>)
      if (out_in_place_) return {p_.out_weight.as<const A>().data, p_.out_weight.stride[0]};
    return {base() + out_, n_.padded_channels};
  }
  const A* out_bias() const { return base() + out_bias_; }  // [Cp]

 private:
  A* base() const { return reinterpret_cast<A*>(memory_.data()); }

  // A row of F columns to [Kp | Kp | dp].
  HW_NOINLINE void pack_columns(A* to, const T* from, int64_t stride) const {
    std::fill_n(to, n_.projected, A(0));
    widen(to, from, n_.keys, stride);
    widen(to + n_.padded_keys, from + n_.keys * stride, n_.keys, stride);
    widen(to + 2 * n_.padded_keys, from + 2 * n_.keys * stride, n_.group, stride);
  }

  HW_NOINLINE void pack_head(int head) {
    const auto weight = p_.qkv_weight.template as<const T>();
    for (int c = 0; c < n_.group && !qkv_in_place_; ++c)
      pack_columns(base() + qkv_ + (int64_t{head} * n_.group + c) * n_.projected,
                   weight.at(head, c), weight.stride[2]);
    const auto bias = p_.qkv_bias.template as<const T>();
    pack_columns(const_cast<A*>(qkv_bias(head)), bias.at(head), bias.stride[1]);
    const auto shift = p_.conv_bias.template as<const T>();
    A* conv_bias_of = const_cast<A*>(conv_bias(head));
    std::fill_n(conv_bias_of, n_.padded_keys, A(0));
    widen(conv_bias_of, shift.at(head), n_.keys, shift.stride[1]);
    pack_taps(head);
    pack_table(head);
  }

  HW_NOINLINE void pack_taps(int head) {
    const auto taps = p_.conv_weight.template as<const T>();
    const int middle = n_.kernel / 2;
    int reach = 0;
    for (int dy = -middle; dy <= middle; ++dy)
      for (int dx = -middle; dx <= middle; ++dx) {
        A* to = const_cast<A*>(tap(head, dy, dx));
        std::fill_n(to, n_.padded_keys, A(0));
        widen(to, taps.at(head, dy + middle, dx + middle), n_.keys, taps.stride[3]);
        if (std::any_of(to, to + n_.keys, [](A w) { return w != 0; }))
          reach = std::max({reach, std::abs(dy), std::abs(dx)});
      }
    radius_[static_cast<size_t>(head)] = reach;
  }

  // Row of a key: the queries' rows of the window one after another, each a stretch of the line
  // T[|dy|] mirrored at 0.
  HW_NOINLINE void pack_table(int head) {
    const auto entries = p_.bias_table.template as<const T>();
    constexpr int kLane = Shape<A>::kLane;
    const int side = n_.side, line = 2 * side - 1 + kLane;
    std::vector<A> mirrored(static_cast<size_t>(side) * static_cast<size_t>(line), A(0));
    for (int dy = 0; dy < side; ++dy)
      for (int dx = 0; dx < side; ++dx) {
        const A value = static_cast<A>(entries(head, dy * side + dx));
        A* middle = mirrored.data() + dy * line + side - 1;
        middle[dx] = middle[-dx] = value;
      }
    A* row = const_cast<A*>(table(head));
    for (int key = 0; key < n_.tokens; ++key, row += n_.padded_tokens) {
      const int y = key / n_.width, x = key % n_.width;
      for (int of = 0; of < n_.height; ++of) {
        const A* from = mirrored.data() + std::abs(of - y) * line + side - 1 - x;
        A* to = row + of * n_.width;
        for (int i = 0; i < n_.width; i += kLane) store(to + i, load(from + i));
      }
      std::fill(row + n_.tokens, row + n_.padded_tokens, A(0));
    }
  }

  HW_NOINLINE void pack_out(int threads) {
    A* to_bias = const_cast<A*>(out_bias());
    std::fill_n(to_bias, n_.padded_channels, A(0));
    widen(to_bias, p_.out_bias.template as<const T>().data, n_.channels, p_.out_bias.stride[0]);
    if (out_in_place_) return;
    const auto weight = p_.out_weight.template as<const T>();
    parallel_tasks(ceil_div(n_.channels, kRowsOfTask), threads, [&](int64_t task) {
      const int end = std::min(n_.channels, static_cast<int>(task + 1) * kRowsOfTask);
      for (int c = static_cast<int>(task) * kRowsOfTask; c < end; ++c) {
        A* to = base() + out_ + int64_t{c} * n_.padded_channels;
        widen(to, weight.at(c), n_.channels, weight.stride[1]);
        std::fill(to + n_.channels, to + n_.padded_channels, A(0));
      }
    });
  }

  static constexpr int kRowsOfTask = 128;

  const ForwardParams p_;
  const Shape<A> n_;
  std::vector<int> radius_;
  Buffer memory_;
  bool qkv_in_place_, out_in_place_;
  int64_t qkv_, qkv_bias_, taps_, conv_bias_, table_, out_, out_bias_;  // elements from base()
};

}  // namespace
}  // namespace hw::cascaded_group_attention
