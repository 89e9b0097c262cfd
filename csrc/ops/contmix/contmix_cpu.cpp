// SPDX-License-Identifier: Apache-2.0
// ContMix on the CPU. Weights are made for a row of tokens of a group at a time, in cache, and used
// at once.
//
// Forward: a task has a group of a batch entry and a part of the rows. Backward: a task has a group
// and some batch entries, whole images one after another, and the partial sums of the gradients
// that tokens share. How many tasks there are is decided by the shapes alone.
#include "ops/contmix/contmix.h"

#include <algorithm>

#include "neighborhood/cpu/parts.h"
#include "neighborhood/cpu/rows.h"
#include "ops/contmix/contmix_cpu_scores.h"

#include "core/cpu/parallel.h"
#include "core/host/registry.h"

namespace hw::contmix {
namespace {

using neighborhood::Axis;
using neighborhood::pack_row;
using neighborhood::Rows;
using neighborhood::unpack_row;

template <class T>
class Loop {
 public:
  using A = Accum<T>;
  static constexpr int kHalves = Scores<T>::kHalves;

  Loop(const ForwardParams& p, int threads)
      : p_(p),
        threads_(threads),
        scores_(p_),
        memory_(new int64_t[static_cast<size_t>(Layout<A>::words(p.window(0)) +
                                                Layout<A>::words(p.window(1)))]),
        layout_{{p.window(0), p.width(), memory_},
                {p.window(1), p.width(), memory_ + Layout<A>::words(p.window(0))}} {}
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  ~Loop() { delete[] memory_; }

 protected:
  int64_t head(int64_t group, int m) const { return m * p_.groups() + group; }
  int64_t bytes_of_rows(int64_t n) const { return Scratch::bytes_of<A>(n * layout_[0].row); }

  HW_NOINLINE void load_values(A* to, int64_t b, int64_t h, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      pack_row(to + i * layout_[0].row, layout_[0].pitch, p_.v.as<const T>(), b, first + i, h);
  }

  const ForwardParams p_;
  const int threads_;
  const Scores<T> scores_;
  int64_t* const memory_;
  const Layout<A> layout_[kHalves];
};

template <class T>
class Forward : public Loop<T> {
 public:
  using A = Accum<T>;
  using Base = Loop<T>;
  using Base::Base;

  void run() {
    const int64_t planes = this->p_.batch() * this->p_.groups(), rows = this->p_.v.size[1];
    const Axis& axis = this->scores_.window(1).y;
    const int64_t parts = neighborhood::parts_of(axis, planes, this->threads_);
    parallel_tasks(planes * parts, this->threads_, [&](int64_t task) {
      const int64_t plane = task / parts, groups = this->p_.groups();
      part(plane / groups, plane % groups, Rows(rows, parts, task % parts));
    });
  }

 private:
  HW_NOINLINE void part(int64_t b, int64_t group, const Rows& rows) {
    const Scores<T>& s = this->scores_;
    int64_t bytes = s.bytes_of_scores() + s.bytes_of_affinities() + this->bytes_of_rows(1);
    for (int m = 0; m < Base::kHalves; ++m) bytes += this->bytes_of_rows(rows.keys(s.window(m).y));
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(bytes);
    A* const p = scratch.take<A>(s.columns() * s.taps());
    A* const affinity = scratch.take<A>(s.columns() * s.affinities());
    A* const o = scratch.take<A>(this->layout_[0].row);
    const A* values[Base::kHalves];
    for (int m = 0; m < Base::kHalves; ++m) {
      const Axis& axis = s.window(m).y;
      A* const to = scratch.take<A>(rows.keys(axis) * this->layout_[m].row);
      this->load_values(to, b, this->head(group, m), rows.first_key(axis), rows.keys(axis));
      values[m] = to;
    }
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      s.load(affinity, b, y, group);
      s.weights(affinity, y, group, p);
      for (int m = 0; m < Base::kHalves; ++m) {
        const Layout<A>& l = this->layout_[m];
        const Axis& axis = s.window(m).y;
        const A* seen = values[m] + (axis.start(y) - rows.first_key(axis)) * l.row;
        neighborhood::mix(l, {p + s.first(m), s.taps()}, seen, o);
        unpack_row(this->p_.o.template as<T>(), b, y, this->head(group, m), o, l.pitch);
      }
    }
  }
};

template <class T>
class Backward : public Loop<T> {
 public:
  using A = Accum<T>;
  using Base = Loop<T>;
  static constexpr int kHalves = Base::kHalves;
  static constexpr int64_t kParts = 16;  // of the batch, each with sums of its own

  Backward(const BackwardParams& p, int threads)
      : Base(p, threads), p_(p), parts_(std::min(kParts, p.batch())) {
    const Scores<T>& s = this->scores_;
    table_[0] = s.partial();
    for (int m = 0; m < kHalves; ++m) table_[m + 1] = table_[m] + s.window(m).offsets();
  }

  void run() {
    const int64_t groups = p_.groups();
    if (p_.wants_scores())
      sums_.reserve(groups * parts_ * table_[kHalves] * static_cast<int64_t>(sizeof(A)));
    parallel_tasks(groups * parts_, this->threads_, [&](int64_t task) {
      const int64_t group = task / parts_;
      A* const sums = partial(group, task % parts_);
      if (p_.wants_scores()) std::fill_n(sums, table_[kHalves], A(0));
      const Rows entries(p_.batch(), parts_, task % parts_);
      for (int64_t b = entries.begin; b < entries.end; ++b) image(b, group, sums);
    });
    if (!p_.wants_scores()) return;
    parallel_tasks(p_.weight.size[0], this->threads_, [&](int64_t t) { finish_row(t); });
    parallel_tasks(groups, this->threads_, [&](int64_t group) {
      for (int m = 0; m < kHalves; ++m)
        if (p_.d_table(m)) finish_table(m, group);
    });
  }

 private:
  // Scratch memory of an image.
  struct Memory {
    A *p, *ds, *affinity, *d_affinity, *g;   // of a row
    A *values[kHalves], *d_values[kHalves];  // [Y][X][pitch]
  };

  A* partial(int64_t group, int64_t part) const {
    return reinterpret_cast<A*>(sums_.data()) + (group * parts_ + part) * table_[kHalves];
  }

  Memory take(Scratch& scratch) const {
    const Scores<T>& s = this->scores_;
    const int64_t rows = p_.v.size[1], planes = kHalves * (p_.wants_scores() + bool(p_.d_v));
    scratch.reset(2 * s.bytes_of_scores() + 2 * s.bytes_of_affinities() + this->bytes_of_rows(1) +
                  planes * this->bytes_of_rows(rows));
    Memory w{};
    w.p = scratch.take<A>(s.columns() * s.taps());
    w.ds = scratch.take<A>(s.columns() * s.taps());
    w.affinity = scratch.take<A>(s.columns() * s.affinities());
    w.d_affinity = scratch.take<A>(s.columns() * s.affinities());
    w.g = scratch.take<A>(this->layout_[0].row);
    for (int m = 0; m < kHalves; ++m) {
      if (p_.wants_scores()) w.values[m] = scratch.take<A>(rows * this->layout_[m].row);
      if (p_.d_v) w.d_values[m] = scratch.take<A>(rows * this->layout_[m].row);
    }
    return w;
  }

  HW_NOINLINE void image(int64_t b, int64_t group, A* sums) {
    const Memory w = take(Scratch::of_thread());
    const int64_t rows = p_.v.size[1], row = this->layout_[0].row;
    for (int m = 0; m < kHalves; ++m) {
      if (p_.wants_scores()) this->load_values(w.values[m], b, this->head(group, m), 0, rows);
      if (p_.d_v) std::fill_n(w.d_values[m], rows * row, A(0));
    }
    for (int64_t y = 0; y < rows; ++y) {
      this->scores_.load(w.affinity, b, y, group);
      this->scores_.weights(w.affinity, y, group, w.p);
      for (int m = 0; m < kHalves; ++m) half(m, b, y, group, w);
      if (p_.wants_scores()) score_gradients(b, y, group, w, sums);
    }
    if (!p_.d_v) return;
    for (int m = 0; m < kHalves; ++m)
      for (int64_t y = 0; y < rows; ++y)
        unpack_row(p_.d_v.template as<T>(), b, y, this->head(group, m), w.d_values[m] + y * row,
                   this->layout_[m].pitch);
  }

  // dp of row y, and what the row gives to dv.
  void half(int m, int64_t b, int64_t y, int64_t group, const Memory& w) const {
    const Scores<T>& s = this->scores_;
    const Layout<A>& l = this->layout_[m];
    const int64_t start = s.window(m).y.start(y), first = s.first(m);
    pack_row(w.g, l.pitch, p_.d_o.template as<const T>(), b, y, this->head(group, m));
    if (p_.wants_scores())
      neighborhood::dot(l, w.g, w.values[m] + start * l.row, w.ds + first, s.taps());
    if (!p_.d_v) return;
    for (int64_t a = 0; a < s.window(m).y.kernel; ++a)
      neighborhood::receive(l, {w.p + first, s.taps()}, a, w.g,
                            w.d_values[m] + (start + a) * l.row);
  }

  void score_gradients(int64_t b, int64_t y, int64_t group, const Memory& w, A* sums) const {
    const Scores<T>& s = this->scores_;
    s.score_gradients(w.p, w.ds);
    if (p_.d_affinity) {
      s.affinity_gradients(w.ds, w.d_affinity);
      unpack_row(p_.d_affinity.template as<T>(), b, y, group, w.d_affinity, s.affinities());
    }
    if (p_.d_weight || p_.d_bias) s.map_gradients(w.ds, w.affinity, sums);
    for (int m = 0; m < kHalves; ++m)
      if (p_.d_table(m)) s.table_gradients(m, y, w.ds, sums + table_[m]);
  }

  // Row t of dW and dc.
  HW_NOINLINE void finish_row(int64_t t) const {
    if (!p_.d_weight && !p_.d_bias) return;
    const Scores<T>& s = this->scores_;
    const int64_t n = p_.centres(), at = s.row_of(t) * s.affinities();
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Scratch::bytes_of<A>(n + 1));
    A* const total = scratch.take<A>(n + 1);
    std::fill_n(total, n + 1, A(0));
    for (int64_t i = 0; i < p_.groups() * parts_; ++i) {
      const A* from = partial(0, i) + at;
      for (int64_t j = 0; j <= n; ++j) total[j] += from[j];
    }
    if (p_.d_weight) narrow(p_.d_weight.template as<T>().at(t), total, n, p_.d_weight.stride[1]);
    if (p_.d_bias) p_.d_bias.template as<T>()(t) = static_cast<T>(total[n]);
  }

  HW_NOINLINE void finish_table(int m, int64_t group) const {
    const Ref<T, 3> to = p_.d_table(m).template as<T>();
    for (int64_t i = 0; i < to.size[1]; ++i)
      for (int64_t j = 0; j < to.size[2]; ++j) {
        A total = 0;
        for (int64_t part = 0; part < parts_; ++part)
          total += partial(group, part)[table_[m] + i * to.size[2] + j];
        to(group, i, j) = static_cast<T>(total);
      }
  }

  const BackwardParams p_;
  const int64_t parts_;
  int64_t table_[kHalves + 1];  // where the tables are among partial sums, and their end
  Buffer sums_;                 // [G, parts, table_[kHalves]]
};

template <class T>
void forward(const ForwardParams& p, const Call& call) {
  if (p.batch() * p.tokens() * p.groups() > 0) Forward<T>(p, call.context.num_threads).run();
}

template <class T>
void backward(const BackwardParams& p, const Call& call) {
  if (p.batch() * p.tokens() * p.groups() > 0) Backward<T>(p, call.context.num_threads).run();
}

}  // namespace
}  // namespace hw::contmix

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{entry<&contmix::forward<T>>, entry<&contmix::backward<T>>}};

}  // namespace
}  // namespace hw
