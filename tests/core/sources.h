// SPDX-License-Identifier: Apache-2.0
// Loops of attention on the CPU over keys that lie anywhere: pages of a table, and rows of zeros
// before them. Results must be to the bit those over the same keys side by side.
//
// Included by a source per instruction set, which defines HW_ISA first.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "native_test.h"
#include "softmax/cpu/backward.h"
#include "softmax/cpu/forward.h"

namespace hw::test {
namespace {

using namespace softmax;

constexpr int64_t kPage = 16;  // tokens of a page

// Keys of a sequence in pages of a pool, which is one batch entry.
struct PagedSource : DenseSource {
  static constexpr bool kGathers = true;

  const int64_t* table = nullptr;  // [sequences, pages of one]
  int64_t pages = 0, length = 0;   // of a sequence

  WorkItem work_item(const ScoreParams& p, int64_t n, int head) const {
    const Sequence at{n, 0, p.q.size[1], 0, length};
    return {at, mask_of(p, at), head, head / p.group()};
  }
  int64_t key_entry(const WorkItem& w, int64_t slot) const {
    return table[w.at.batch * pages + slot / kPage];
  }
  static int64_t key_token(const WorkItem&, int64_t slot, int64_t entry) {
    return entry * kPage + slot % kPage;
  }
  static int64_t key_result(const WorkItem&, int64_t, int64_t token) { return token; }
  static int64_t key_batch(const WorkItem&) { return 0; }
  static bool keys_adjacent(const WorkItem&) { return false; }
};
static_assert(SortedSource<PagedSource>);

// The same behind some zero keys, which have no positions.
struct ZerosThenPages : PagedSource {
  static constexpr bool kInOrder = false;

  int64_t zeros = 0;

  int64_t keys(const WorkItem&) const { return zeros + length; }
  int64_t key_entry(const WorkItem& w, int64_t slot) const {
    return slot < zeros ? 0 : PagedSource::key_entry(w, slot - zeros);
  }
  int64_t key_token(const WorkItem& w, int64_t slot, int64_t entry) const {
    return slot < zeros ? kZeroKey : PagedSource::key_token(w, slot - zeros, entry);
  }
  int64_t key_position(const WorkItem&, int64_t slot, int64_t) const {
    return slot < zeros ? kZeroKey : slot - zeros;
  }
  static bool keys_in_order() { return false; }
  Range visible_keys(const WorkItem& w, int64_t slot) const {
    return {0, zeros + w.mask.visible_keys(slot).end};
  }
  Range set_keys(const WorkItem& w, int64_t slot) const {
    const int64_t key = zeros + w.mask.diagonal(slot);
    return {key, key + 1};
  }
  static Range row_slots(const WorkItem& w, const Range& positions) {
    return {positions.begin, std::min(positions.end, w.at.q_count)};
  }
};
static_assert(SortedSource<ZerosThenPages>);

// The score on the diagonal is a constant, if so wanted.
struct DiagonalScore : FullScore {
  static constexpr bool kSoftmax = true, kSets = true;
  static constexpr double kSetScore = -1.5;
  bool some = false;

  bool sets() const { return some; }
  static int64_t set_key(const Mask& mask, int64_t row) { return mask.diagonal(row); }
};
static_assert(ScoreKind<DiagonalScore>);

struct SourceCase {
  const char* name;
  int64_t batch, rows, keys;
  int heads, key_heads, dim, value_dim;
  int64_t stride = 1;  // of the columns of k and v
  int64_t zeros = 0;   // zero keys before the others
  bool causal = false, numbers = false, sets = false;
  int64_t left = -1;
  double softcap = 0;
  Activation activation = Activation::softmax;

  int64_t all_keys() const { return zeros + keys; }
};

// A tensor [a, b, c, width], columns `stride` apart, and what lies between them.
template <class T>
struct Storage {
  std::vector<T> memory;
  Ref<T, 4> x;

  Storage(int64_t a, int64_t b, int64_t c, int64_t width, int64_t stride = 1) {
    const T nan(std::numeric_limits<float>::quiet_NaN());
    memory.assign(static_cast<size_t>(std::max<int64_t>(a * b * c * width * stride, 1)), nan);
    x = {memory.data(),
         {a, b, c, width},
         {b * c * width * stride, c * width * stride, width * stride, stride}};
  }
  void draw(unsigned seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(-1, 1);
    each([&](T& to, int64_t, int64_t, int64_t, int64_t) { to = T(uniform(random)); });
  }
  template <class F>
  void each(F f) {
    for (int64_t a = 0; a < x.size[0]; ++a)
      for (int64_t b = 0; b < x.size[1]; ++b)
        for (int64_t c = 0; c < x.size[2]; ++c)
          for (int64_t d = 0; d < x.size[3]; ++d) f(x(a, b, c, d), a, b, c, d);
  }
  operator Ref<void, 4>() const { return x.template as<void>(); }
  operator Ref<const void, 4>() const { return x.template as<const void>(); }
  // Without the last dimension.
  template <class Void>
  Ref<Void, 3> flat() const {
    return {x.data, {x.size[0], x.size[1], x.size[2]}, {x.stride[0], x.stride[1], x.stride[2]}};
  }
};

// The inputs of a case; of keys both side by side, [B, zeros + Sk], and in pages.
template <class T>
struct SourceInputs {
  using A = Accum<T>;
  const SourceCase& c;
  std::vector<int64_t> table;
  Storage<T> q, k, v, paged_k, paged_v, d_w, bias;
  Storage<A> key_bias, key_gain, temperature, mass, delta;

  static int64_t pages(const SourceCase& c) { return ceil_div(c.keys, kPage); }

  explicit SourceInputs(const SourceCase& c)
      : c(c),
        q(c.batch, c.rows, c.heads, c.dim),
        k(c.batch, c.all_keys(), c.key_heads, c.dim, c.stride),
        v(c.batch, c.all_keys(), c.key_heads, c.value_dim, c.stride),
        paged_k(1, (c.batch * pages(c) + 1) * kPage, c.key_heads, c.dim, c.stride),
        paged_v(1, (c.batch * pages(c) + 1) * kPage, c.key_heads, c.value_dim, c.stride),
        d_w(c.batch, c.rows, c.heads, c.value_dim),
        bias(c.batch, c.heads, c.rows, c.all_keys()),
        key_bias(c.batch, c.heads, c.all_keys(), 1),
        key_gain(c.batch, c.heads, c.all_keys(), 1),
        temperature(c.batch, c.rows, c.heads, 1),
        mass(c.batch, c.heads, c.all_keys(), 1),
        delta(c.batch, c.heads, c.rows, 1) {
    table.resize(static_cast<size_t>(c.batch * pages(c)));
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int64_t>(i) + 1;
    std::shuffle(table.begin(), table.end(), std::mt19937(7));
    unsigned seed = 1;
    for (Storage<T>* x : {&q, &k, &v, &d_w, &bias}) x->draw(seed++);
    for (Storage<A>* x : {&key_bias, &key_gain, &temperature, &mass, &delta}) x->draw(seed++);
    clear_zero_keys();
    scatter(k, paged_k);
    scatter(v, paged_v);
  }

  int64_t token(int64_t b, int64_t key) const {
    return table[static_cast<size_t>(b * pages(c) + key / kPage)] * kPage + key % kPage;
  }

 private:
  void clear_zero_keys() {
    for (Storage<T>* x : {&k, &v})
      x->each([&](T& to, int64_t, int64_t j, int64_t, int64_t) { to = j < c.zeros ? T(0) : to; });
    bias.each([&](T& to, int64_t, int64_t, int64_t, int64_t j) { to = j < c.zeros ? T(0) : to; });
    for (Storage<A>* x : {&key_bias, &key_gain, &mass})
      x->each([&](A& to, int64_t, int64_t, int64_t j, int64_t) { to = j < c.zeros ? A(0) : to; });
  }
  void scatter(Storage<T>& from, Storage<T>& to) {
    from.each([&](T& x, int64_t b, int64_t j, int64_t h, int64_t d) {
      if (j >= c.zeros) to.x(0, token(b, j - c.zeros), h, d) = x;
    });
  }
};

template <class T, class Source>
class SourceRun {
 public:
  using A = Accum<T>;

  SourceRun(const SourceInputs<T>& in, const Source& source, bool paged)
      : in_(in),
        c_(in.c),
        source_(source),
        paged_(paged),
        o(c_.batch, c_.rows, c_.heads, c_.value_dim),
        w(c_.batch, c_.rows, c_.heads, c_.value_dim),
        d_q(c_.batch, c_.rows, c_.heads, c_.dim),
        d_k(keys().x.size[0], keys().x.size[1], c_.key_heads, c_.dim),
        d_v(keys().x.size[0], keys().x.size[1], c_.key_heads, c_.value_dim),
        d_bias(c_.batch, c_.heads, c_.rows, c_.all_keys()),
        d_key_bias(c_.batch, c_.heads, c_.all_keys(), 1),
        d_key_gain(c_.batch, c_.heads, c_.all_keys(), 1),
        d_temperature(c_.batch, c_.rows, c_.heads, 1) {
    for (int i = 0; i < 6; ++i) of_rows.emplace_back(c_.batch, c_.heads, c_.rows, 1);
  }

  void run(int threads) {
    const DiagonalScore score{{}, c_.sets};
    ForwardParams f{};
    fill(f);
    f.v = values();
    f.o = o, f.w = w;
    f.row = of_rows[0].template flat<void>(), f.rest = of_rows[1].template flat<void>();
    if (is_softmax(c_.activation)) {
      f.entropy = of_rows[2].template flat<void>(), f.p_max = of_rows[3].template flat<void>();
      f.sq_norm = of_rows[4].template flat<void>();
      if (c_.numbers) {
        f.mass_keys = numbers(in_.mass);
        f.mass = of_rows[5].template flat<void>();
      }
    }
    Forward<T, Source, DiagonalScore>(f, threads, source_, score).run();
    BackwardParams b{};
    fill(b);
    b.v = values();
    b.d_w = in_.d_w;
    b.row = f.row.template as<const void>(), b.rest = f.rest.template as<const void>();
    b.delta = in_.delta.template flat<const void>();
    b.d_q = d_q, b.d_k = d_k, b.d_v = d_v;
    if (c_.numbers) {
      d_bias.each([](A& x, int64_t, int64_t, int64_t, int64_t) { x = 0; });
      b.d_bias = behind_zeros(d_bias.x, 3).template as<void>();
      b.d_key_bias = numbers_of(d_key_bias);
      b.d_key_gain = numbers_of(d_key_gain);
      b.d_row_temperature = d_temperature.template flat<void>();
    }
    Backward<T, Source, DiagonalScore>(b, threads, source_, score).run();
  }

 private:
  // Zero keys have no numbers: those of pages are counted behind them.
  template <class X>
  Ref<X, 4> behind_zeros(Ref<X, 4> x, int axis) const {
    if (paged_) x.data += c_.zeros * x.stride[axis];
    return x;
  }
  Ref<const void, 3> numbers(const Storage<A>& x) const {
    Ref<const void, 3> all = x.template flat<const void>();
    all.data = x.memory.data() + (paged_ ? c_.zeros : 0);
    return all;
  }
  Ref<void, 3> numbers_of(Storage<A>& x) const {
    Ref<void, 3> all = x.template flat<void>();
    all.data = x.memory.data() + (paged_ ? c_.zeros : 0);
    return all;
  }
  const Storage<T>& keys() const { return paged_ ? in_.paged_k : in_.k; }
  const Storage<T>& values() const { return paged_ ? in_.paged_v : in_.v; }

  template <class Params>
  void fill(Params& p) const {
    p.q = in_.q, p.k = keys();
    p.scale = 0.7, p.softcap = c_.softcap;
    p.causal = c_.causal, p.left = c_.left, p.right = -1;
    p.activation = c_.activation;
    p.normalizer = is_softmax(c_.activation) ? Normalizer::none : Normalizer::length;
    p.gain_begin = 1, p.gain_end = c_.rows;
    p.max_q = c_.rows, p.max_k = c_.all_keys();
    if (!c_.numbers) return;
    p.bias = behind_zeros(in_.bias.x, 3).template as<const void>();
    p.key_bias = numbers(in_.key_bias), p.key_gain = numbers(in_.key_gain);
    p.row_temperature = in_.temperature.template flat<const void>();
  }

  const SourceInputs<T>& in_;
  const SourceCase& c_;
  const Source source_;
  const bool paged_;

 public:
  Storage<T> o, w, d_q, d_k, d_v;
  Storage<A> d_bias, d_key_bias, d_key_gain, d_temperature;
  std::vector<Storage<A>> of_rows;  // row, rest, read-outs
};

template <class Storage>
void expect_same(Storage& got, Storage& want, const SourceCase& c, const char* what) {
  EXPECT(std::memcmp(got.memory.data(), want.memory.data(),
                     got.memory.size() * sizeof(got.memory[0])) == 0,
         c.name, ": ", what);
}

template <class T, class Source>
void compare_sources(const SourceInputs<T>& in, const Source& source) {
  const SourceCase& c = in.c;
  SourceRun<T, DenseSource> want(in, {}, false);
  want.run(1);
  for (const int threads : {1, 2}) {
    SourceRun<T, Source> got(in, source, true);
    got.run(threads);
    expect_same(got.o, want.o, c, "o");
    expect_same(got.w, want.w, c, "w");
    for (size_t i = 0; i < got.of_rows.size(); ++i)
      expect_same(got.of_rows[i], want.of_rows[i], c, "a number of the rows");
    expect_same(got.d_q, want.d_q, c, "d_q");
    expect_same(got.d_temperature, want.d_temperature, c, "d_row_temperature");
    const auto same_key = [&](Storage<T>& x, Storage<T>& y, const char* what) {
      y.each([&](T& to, int64_t b, int64_t j, int64_t h, int64_t d) {
        if (j < c.zeros) return;
        const T one = x.x(0, in.token(b, j - c.zeros), h, d);
        EXPECT(std::memcmp(&one, &to, sizeof(T)) == 0, c.name, ": ", what, " of key ", j);
      });
    };
    same_key(got.d_k, want.d_k, "d_k");
    same_key(got.d_v, want.d_v, "d_v");
    const auto same_number = [&](Storage<Accum<T>>& x, Storage<Accum<T>>& y, int axis,
                                 const char* what) {
      y.each([&](Accum<T>& to, int64_t b, int64_t h, int64_t i, int64_t j) {
        if ((axis == 3 ? j : i) < c.zeros) return;
        EXPECT(!c.numbers || x.x(b, h, i, j) == to, c.name, ": ", what, ": ", x.x(b, h, i, j),
               " want ", to);
      });
    };
    same_number(got.d_bias, want.d_bias, 3, "d_bias");
    same_number(got.d_key_bias, want.d_key_bias, 2, "d_key_bias");
    same_number(got.d_key_gain, want.d_key_gain, 2, "d_key_gain");
  }
}

template <class T>
void check_source(const SourceCase& c) {
  const SourceInputs<T> in(c);
  PagedSource pages{};
  pages.table = in.table.data(), pages.pages = in.pages(c), pages.length = c.keys;
  if (c.zeros == 0) return compare_sources(in, pages);
  ZerosThenPages with_zeros{};
  static_cast<PagedSource&>(with_zeros) = pages;
  with_zeros.zeros = c.zeros;
  compare_sources(in, with_zeros);
}

// Few rows are walked along the keys, many in tiles; long sequences are cut into spans. Rows not
// known to be in order are cut into blocks otherwise, unless all blocks are whole.
template <class T>
void check_sources() {
  for (const int64_t rows : {1, 3, 9, 70}) {
    const SourceCase plain{"plain", 2, rows, 150, 4, 2, 32, 48};
    check_source<T>(plain);
    SourceCase c = plain;
    c.name = "causal", c.causal = true;
    check_source<T>(c);
    c.name = "causal, some scores set", c.sets = true;
    check_source<T>(c);
    if (c.rows > kRows) c.rows = 2 * kRows;
    c.name = "behind zero keys", c.zeros = 5;
    check_source<T>(c);
    c.name = "behind zero keys, with numbers", c.numbers = true, c.softcap = 3;
    check_source<T>(c);
    c.name = "with numbers, windows", c.zeros = 0, c.left = 40, c.dim = 20, c.value_dim = 12;
    check_source<T>(c);
    c.name = "columns apart", c.stride = 2;
    check_source<T>(c);
    c.name = "columns apart, behind zero keys", c.left = -1, c.zeros = 3;
    check_source<T>(c);
    c = plain;
    c.name = "relu", c.activation = Activation::relu, c.numbers = true;
    check_source<T>(c);
    c = {"spans", 1, rows, 2500, 2, 1, 16, 16};
    check_source<T>(c);
  }
}

}  // namespace
}  // namespace hw::test
