// SPDX-License-Identifier: Apache-2.0
// Neighbourhoods with given weights on the CPU. A task has a head of a batch entry and a part of
// the rows; it packs the values that their windows hold, and walks its rows.
//
// In the backward pass a part owns its rows of queries (dw) and the same rows of keys (dv), which
// receive from the rows of queries that see them, in their order: the bits do not depend on parts.
#include "ops/na2d_av/na2d_av.h"

#include <algorithm>
#include <type_traits>

#include "neighborhood/cpu/parts.h"
#include "neighborhood/cpu/rows.h"

#include "core/cpu/parallel.h"
#include "core/host/registry.h"

namespace hw::na2d_av {
namespace {

using neighborhood::Axis;
using neighborhood::Layout;
using neighborhood::pack_row;
using neighborhood::Rows;
using neighborhood::unpack_row;
using neighborhood::Weights;
using neighborhood::Window;

template <class T>
class Loop {
 public:
  using A = Accum<T>;
  Loop(const ForwardParams& p, int threads)
      : p_(p),
        window_(p.window()),
        batch_(p.v.size[0]),
        heads_(p.v.size[3]),
        rows_(p.v.size[1]),
        columns_(p.v.size[2]),
        parts_(neighborhood::parts_of(window_.y, batch_ * heads_, threads)),
        threads_(threads),
        memory_(new int64_t[static_cast<size_t>(Layout<A>::words(window_))]),
        layout_(window_, p.v.size[4], memory_) {}
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  ~Loop() { delete[] memory_; }

  // f(b, h, rows) for all parts.
  template <class F>
  void each_part(F f) {
    parallel_tasks(batch_ * heads_ * parts_, threads_, [&](int64_t task) {
      const int64_t plane = task / parts_;
      f(plane / heads_, plane % heads_, Rows(rows_, parts_, task % parts_));
    });
  }

 protected:
  static constexpr bool kAsTheyAre = std::is_same_v<T, A>;

  int64_t bytes_of_rows(int64_t n) const { return Scratch::bytes_of<A>(n * layout_.row); }
  int64_t bytes_of_weights() const { return Scratch::bytes_of<A>(columns_ * layout_.taps); }

  A* packed_values(Scratch& scratch, int64_t b, int64_t h, int64_t first, int64_t count) const {
    A* const values = scratch.take<A>(count * layout_.row);
    for (int64_t i = 0; i < count; ++i)
      pack_row(values + i * layout_.row, layout_.pitch, p_.v.as<const T>(), b, first + i, h);
    return values;
  }

  // The weights of row y: where they lie, or widened to `memory`.
  HW_NOINLINE Weights<A> weights(int64_t b, int64_t y, int64_t h, A* memory) const {
    const Ref<const T, 5> w = p_.w.as<const T>();
    if constexpr (kAsTheyAre)
      if (w.stride[4] == 1) return {w.at(b, y, 0, h), w.stride[2]};
    for (int64_t x = 0; x < columns_; ++x)
      widen(memory + x * layout_.taps, w.at(b, y, x, h), window_.taps(), w.stride[4]);
    return {memory, layout_.taps};
  }

  const ForwardParams p_;
  const Window window_;
  const int64_t batch_, heads_, rows_, columns_, parts_;
  const int threads_;
  int64_t* const memory_;
  const Layout<A> layout_;
};

template <class T>
class Forward : public Loop<T> {
 public:
  using A = Accum<T>;
  using Loop<T>::Loop;

  void run() {
    this->each_part([&](int64_t b, int64_t h, const Rows& rows) { part(b, h, rows); });
  }

 private:
  HW_NOINLINE void part(int64_t b, int64_t h, const Rows& rows) {
    const Layout<A>& l = this->layout_;
    const Axis& axis = this->window_.y;
    const int64_t first = rows.first_key(axis), keys = rows.keys(axis);
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(this->bytes_of_rows(keys) + this->bytes_of_rows(1) + this->bytes_of_weights());
    const A* values = this->packed_values(scratch, b, h, first, keys);
    A* const o = scratch.take<A>(l.row);
    A* const memory = scratch.take<A>(this->columns_ * l.taps);
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const A* seen = values + (axis.start(y) - first) * l.row;
      neighborhood::mix(l, this->weights(b, y, h, memory), seen, o);
      unpack_row(this->p_.o.template as<T>(), b, y, h, o, l.pitch);
    }
  }
};

template <class T>
class Backward : public Loop<T> {
 public:
  using A = Accum<T>;
  Backward(const BackwardParams& p, int threads) : Loop<T>(p, threads), p_(p) {}

  void run() {
    this->each_part([&](int64_t b, int64_t h, const Rows& rows) {
      if (p_.d_w) weight_gradients(b, h, rows);
      if (p_.d_v) value_gradients(b, h, rows);
    });
  }

 private:
  HW_NOINLINE void weight_gradients(int64_t b, int64_t h, const Rows& rows) {
    const Layout<A>& l = this->layout_;
    const Axis& axis = this->window_.y;
    const int64_t first = rows.first_key(axis), keys = rows.keys(axis);
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(this->bytes_of_rows(keys) + this->bytes_of_rows(1) + this->bytes_of_weights());
    const A* values = this->packed_values(scratch, b, h, first, keys);
    A* const g = scratch.take<A>(l.row);
    A* const products = scratch.take<A>(this->columns_ * l.taps);
    const Ref<T, 5> d_w = p_.d_w.template as<T>();
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      pack_row(g, l.pitch, p_.d_o.template as<const T>(), b, y, h);
      const A* seen = values + (axis.start(y) - first) * l.row;
      neighborhood::dot(l, g, seen, products, l.taps);
      unpack_row(d_w, b, y, h, products, l.taps);
    }
  }

  HW_NOINLINE void value_gradients(int64_t b, int64_t h, const Rows& rows) {
    const Layout<A>& l = this->layout_;
    const int64_t count = rows.end - rows.begin;
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(this->bytes_of_rows(count) + this->bytes_of_rows(1) + this->bytes_of_weights());
    A* const d_v = scratch.take<A>(count * l.row);
    A* const g = scratch.take<A>(l.row);
    A* const memory = scratch.take<A>(this->columns_ * l.taps);
    std::fill_n(d_v, count * l.row, A(0));
    const Axis& axis = this->window_.y;
    const int64_t end = axis.end_query(rows.end - 1);
    for (int64_t y = axis.first_query(rows.begin); y < end; ++y) {
      pack_row(g, l.pitch, p_.d_o.template as<const T>(), b, y, h);
      const Weights<A> w = this->weights(b, y, h, memory);
      const int64_t start = axis.start(y);
      const int64_t from = std::max(start, rows.begin);
      const int64_t to = std::min(start + axis.kernel, rows.end);
      for (int64_t key = from; key < to; ++key)
        neighborhood::receive(l, w, key - start, g, d_v + (key - rows.begin) * l.row);
    }
    for (int64_t i = 0; i < count; ++i)
      unpack_row(p_.d_v.template as<T>(), b, rows.begin + i, h, d_v + i * l.row, l.pitch);
  }

  const BackwardParams p_;
};

template <class T>
void forward(const ForwardParams& p, const Call& call) {
  if (p.window().tokens() > 0) Forward<T>(p, call.context.num_threads).run();
}

template <class T>
void backward(const BackwardParams& p, const Call& call) {
  if (p.window().tokens() > 0) Backward<T>(p, call.context.num_threads).run();
}

}  // namespace
}  // namespace hw::na2d_av

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{entry<&na2d_av::forward<T>>, entry<&na2d_av::backward<T>>}};

}  // namespace
}  // namespace hw
