// SPDX-License-Identifier: Apache-2.0
// The weights of a row of tokens of a group on the CPU, made of their affinities, and the gradients
// that go the same way back.
//
// A row of scores is [small window | large window], each part in whole vectors. What is beyond a
// window has the score -inf and the weight 0. The bias is one more column of the map, and each
// token has one more affinity, 1: dc is a column of dW.
#pragma once

#include <algorithm>
#include <limits>

#include "neighborhood/cpu/rows.h"
#include "ops/contmix/contmix.h"

#include "core/cpu/matmul.h"
#include "core/cpu/parallel.h"
#include "core/cpu/simd_math.h"

namespace hw::contmix {
namespace {

using neighborhood::Layout;
using neighborhood::Window;

template <class T>
class Scores {
 public:
  using A = Accum<T>;
  static constexpr int kHalves = 2;

  explicit Scores(const ForwardParams& p)
      : p_(p), centres_(p.centres()), affinities_(Layout<A>::padded(centres_ + 1)) {
    for (int m = 0; m < kHalves; ++m) {
      window_[m] = p.window(m);
      first_[m + 1] = first_[m] + Layout<A>::padded(window_[m].taps());
    }
    buffer_.reserve(2 * Scratch::bytes_of<A>(taps() * affinities_));
    across_ = reinterpret_cast<A*>(buffer_.data());
    map_ = reinterpret_cast<A*>(buffer_.data() + Scratch::bytes_of<A>(taps() * affinities_));
    fill_maps();
  }

  const Window& window(int m) const { return window_[m]; }
  int64_t taps() const { return first_[kHalves]; }
  int64_t first(int m) const { return first_[m]; }          // of half m in a row of scores
  int64_t affinities() const { return affinities_; }        // of a packed token
  int64_t columns() const { return window_[0].x.size; }     // X
  int64_t partial() const { return taps() * affinities_; }  // numbers of a sum of dW and dc
  int64_t bytes_of_scores() const { return Scratch::bytes_of<A>(columns() * taps()); }
  int64_t bytes_of_affinities() const { return Scratch::bytes_of<A>(columns() * affinities_); }

  // The affinities of row y as [X][affinities()], and the 1.
  void load(A* to, int64_t b, int64_t y, int64_t group) const {
    neighborhood::pack_row(to, affinities_, p_.affinity.as<const T>(), b, y, group);
    for (int64_t x = 0; x < columns(); ++x) to[x * affinities_ + centres_] = A(1);
  }

  // p [X][taps()] of row y.
  HW_NOINLINE void weights(const A* affinity, int64_t y, int64_t group, A* p) const {
    const int columns = static_cast<int>(this->columns());
    for (int m = 0; m < kHalves; ++m) load_table(m, y, group, p);
    multiply<true>(columns, static_cast<int>(taps()), static_cast<int>(centres_ + 1),
                   row_major(affinity, affinities_), across_, taps(), p, taps());
    for (int64_t x = 0; x < columns; ++x)
      for (int m = 0; m < kHalves; ++m)
        softmax(p + x * taps() + first_[m], first_[m + 1] - first_[m]);
  }

  // dp becomes ds.
  HW_NOINLINE void score_gradients(const A* p, A* dp) const {
    for (int64_t x = 0; x < columns(); ++x)
      for (int m = 0; m < kHalves; ++m) {
        const int64_t at = x * taps() + first_[m], n = first_[m + 1] - first_[m];
        Vec<A> delta{};
        for (int64_t t = 0; t < n; t += kLanes<A>)
          delta = fma(hw::load(p + at + t), hw::load(dp + at + t), delta);
        const A d = sum<A>(delta);
        for (int64_t t = 0; t < n; t += kLanes<A>)
          store(dp + at + t, hw::load(p + at + t) * (hw::load(dp + at + t) - d));
      }
  }

  // da [X][affinities()] of ds.
  void affinity_gradients(const A* ds, A* da) const {
    multiply<false>(static_cast<int>(columns()), static_cast<int>(affinities_),
                    static_cast<int>(taps()), row_major(ds, taps()), map_, affinities_, da,
                    affinities_);
  }

  // sums [taps()][affinities()] += ds a^T; column A is dc.
  void map_gradients(const A* ds, const A* affinity, A* sums) const {
    multiply<true>(static_cast<int>(taps()), static_cast<int>(affinities_),
                   static_cast<int>(columns()), transposed(ds, taps()), affinity, affinities_, sums,
                   affinities_);
  }

  // sums [2 Ky - 1][2 Kx - 1] += ds of row y, half m.
  HW_NOINLINE void table_gradients(int m, int64_t y, const A* ds, A* sums) const {
    const Window& w = window_[m];
    for (int64_t x = 0; x < columns(); ++x) {
      const A* from = ds + x * taps() + first_[m];
      for (int64_t a = 0; a < w.y.kernel; ++a, from += w.x.kernel) {
        A* to = sums + (w.y.first_offset(y) + a) * w.x.offsets() + w.x.first_offset(x);
        for (int64_t i = 0; i < w.x.kernel; ++i) to[i] += from[i];
      }
    }
  }

  // The row of a sum of dW that key t of half m has.
  int64_t row_of(int64_t t) const {
    const int64_t small = window_[0].taps();
    return t < small ? t : first_[1] + t - small;
  }

 private:
  void fill_maps() {
    const Ref<const T, 2> weight = p_.weight.as<const T>();
    const Ref<const T, 1> bias = p_.bias.as<const T>();
    std::fill_n(across_, partial(), A(0));
    std::fill_n(map_, partial(), A(0));
    A* const last = across_ + centres_ * taps();
    std::fill_n(last, taps(), -std::numeric_limits<A>::infinity());
    for (int64_t t = 0; t < weight.size[0]; ++t) {
      const int64_t row = row_of(t);
      for (int64_t i = 0; i < centres_; ++i)
        across_[i * taps() + row] = map_[row * affinities_ + i] = static_cast<A>(weight(t, i));
      last[row] = bias ? static_cast<A>(bias(t)) : A(0);
    }
  }

  HW_NOINLINE void load_table(int m, int64_t y, int64_t group, A* p) const {
    const Window& w = window_[m];
    const Ref<const T, 3> table = p_.table(m).template as<const T>();
    const int64_t n = first_[m + 1] - first_[m];
    for (int64_t x = 0; x < columns(); ++x) {
      A* to = p + x * taps() + first_[m];
      std::fill_n(to, n, A(0));
      if (!table) continue;
      for (int64_t a = 0; a < w.y.kernel; ++a, to += w.x.kernel)
        widen(to, table.at(group, w.y.first_offset(y) + a, w.x.first_offset(x)), w.x.kernel,
              table.stride[2]);
    }
  }

  static void softmax(A* s, int64_t n) {
    Vec<A> most = hw::load(s);
    for (int64_t t = kLanes<A>; t < n; t += kLanes<A>) most = larger(most, hw::load(s + t));
    A peak = most[0];
    for (int i = 1; i < kLanes<A>; ++i) peak = std::max(peak, A(most[i]));
    Vec<A> total{};
    for (int64_t t = 0; t < n; t += kLanes<A>) {
      const Vec<A> e = exp_of(hw::load(s + t) - peak);
      total += e;
      store(s + t, e);
    }
    const A factor = A(1) / sum<A>(total);
    for (int64_t t = 0; t < n; t += kLanes<A>) store(s + t, hw::load(s + t) * factor);
  }

  const ForwardParams& p_;
  const int64_t centres_, affinities_;
  Window window_[kHalves];
  int64_t first_[kHalves + 1] = {};
  Buffer buffer_;
  A* across_;  // [A + 1][taps()]            W^T and c
  A* map_;     // [taps()][affinities()]     W
};

}  // namespace
}  // namespace hw::contmix
