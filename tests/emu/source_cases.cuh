// SPDX-License-Identifier: Apache-2.0
// What the tests of key sources share: cases in order, in pages and in lists, and what is compared.
#pragma once

#include <cstring>
#include <numeric>
#include <string>

#include "buffer.h"
#include "check.h"
#include "ops/routing_attention/routing_attention_source.h"
#include "sources.cuh"

namespace hw::test {
namespace {

using routing_attention::GroupSource;
using routing_attention::Routing;
using softmax::BackwardParams;
using softmax::DenseSource;
using softmax::ForwardParams;
using softmax::FullScore;

constexpr int64_t kBatch = 2, kHeads = 4, kKeyHeads = 2, kValues = 20;

struct Case {
  const char* name;
  int64_t rows, keys, dim;
  bool causal = false;
  int64_t left = -1;
  double softcap = 0;
  bool biases = false;  // bias, key_bias, key_gain, row_temperature
};

constexpr Case kCases[] = {
    {"plain", 70, 150, 24},
    {"few rows", 5, 200, 16},
    {"causal", 150, 150, 72, true},
    {"window", 90, 200, 16, true, 40},
    {"softcap", 40, 160, 16, false, -1, 1.5},
    {"biases", 70, 140, 24, true, 100, 2, true},
};

// Those that lists have a say in: scores by position, blocks of few rows.
constexpr const Case* kCasesOfLists[] = {&kCases[0], &kCases[1], &kCases[5]};

template <class T, int N>
Ref<T, N> ref(const Buffer<std::remove_const_t<T>>& memory, const int64_t (&size)[N]) {
  Ref<T, N> r{memory.data(), {}, {}};
  int64_t stride = 1;
  for (int d = N - 1; d >= 0; --d) {
    r.size[d] = size[d], r.stride[d] = stride;
    stride *= size[d];
  }
  return r;
}

template <class T>
std::vector<T> drawn(int64_t count, uint64_t seed, float scale = 1) {
  Numbers numbers(seed);
  std::vector<T> x(static_cast<size_t>(count));
  for (T& v : x) v = T(scale * numbers.uniform());
  return x;
}

std::vector<int> shuffled(int64_t count, uint64_t seed) {
  std::vector<int> x(static_cast<size_t>(count));
  std::iota(x.begin(), x.end(), 0);
  Numbers numbers(seed);
  for (size_t i = x.size(); i > 1; --i) std::swap(x[i - 1], x[numbers.bits() % i]);
  return x;
}

// x [B, S, width] of sequences, as rows of pages: page[b][n] of batch entry b, or of one that all
// sequences share.
template <class T>
std::vector<T> in_pages(const std::vector<T>& x, int64_t width, const std::vector<int32_t>& page,
                        int64_t pages, bool one_entry) {
  const int64_t of_sequence = pages * PagedSource::kPage;
  const int64_t count = static_cast<int64_t>(x.size()) / kBatch / width;
  std::vector<T> made(static_cast<size_t>(kBatch * of_sequence * width), T(77.0f));
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t s = 0; s < count; ++s) {
      const int64_t to =
          page[static_cast<size_t>(b * pages + s / PagedSource::kPage)] * PagedSource::kPage +
          s % PagedSource::kPage + (one_entry ? 0 : b * of_sequence);
      for (int64_t c = 0; c < width; ++c)
        made[static_cast<size_t>(to * width + c)] =
            x[static_cast<size_t>((b * count + s) * width + c)];
    }
  }
  return made;
}

int64_t pages_of(int64_t tokens) { return ceil_div<int64_t>(tokens, PagedSource::kPage); }

std::vector<int32_t> pages_of_rows(int64_t pages) {
  std::vector<int32_t> all;
  for (int64_t b = 0; b < kBatch; ++b)
    for (const int page : shuffled(pages, 50 + static_cast<uint64_t>(b))) all.push_back(page);
  return all;
}
std::vector<int32_t> pages_of_keys(int64_t pages) { return shuffled(kBatch * pages, 60); }

// The tensors of a case, in order and in pages.
template <class Element>
struct Inputs {
  using A = Accum<Element>;
  const Case& c;
  const int64_t row_pages = pages_of(c.rows), key_pages = pages_of(c.keys);
  const std::vector<Element> q = drawn<Element>(kBatch * c.rows * kHeads * c.dim, 1),
                             k = drawn<Element>(kBatch * c.keys * kKeyHeads * c.dim, 2),
                             v = drawn<Element>(kBatch * c.keys * kKeyHeads * kValues, 3),
                             d_w = drawn<Element>(kBatch * c.rows * kHeads * kValues, 4);
  const std::vector<int32_t> rows_at = pages_of_rows(row_pages), keys_at = pages_of_keys(key_pages);
  const Buffer<int32_t> row_table{rows_at}, key_table{keys_at};
  const Buffer<Element> ordered_q{q}, ordered_k{k}, ordered_v{v}, ordered_d_w{d_w};
  const Buffer<Element> paged_q{in_pages(q, kHeads* c.dim, rows_at, row_pages, false)},
      paged_k{in_pages(k, kKeyHeads* c.dim, keys_at, key_pages, true)},
      paged_v{in_pages(v, kKeyHeads* kValues, keys_at, key_pages, true)},
      paged_d_w{in_pages(d_w, kHeads* kValues, rows_at, row_pages, false)};
  const Buffer<Element> bias{drawn<Element>(kBatch * kHeads * c.rows * c.keys, 5)};
  const Buffer<A> key_bias{drawn<A>(kBatch * kHeads * c.keys, 6)},
      key_gain{drawn<A>(kBatch * kHeads * c.keys, 7, 0.2f)},
      row_temperature{drawn<A>(kBatch * c.rows * kHeads, 8)},
      delta{drawn<A>(kBatch * kHeads * c.rows, 9)};

  PagedSource pages() const {
    return {c.rows, c.keys, ref<const int32_t>(row_table, {kBatch, row_pages}),
            ref<const int32_t>(key_table, {kBatch, key_pages})};
  }

  // q, d_w: [B, rows of a batch entry, Hq, ..]; k, v: of one batch entry, or B.
  template <class Params>
  void describe(Params& p, bool paged) const {
    const int64_t rows = paged ? row_pages * PagedSource::kPage : c.rows;
    const int64_t entries = paged ? 1 : kBatch;
    const int64_t keys = paged ? kBatch * key_pages * PagedSource::kPage : c.keys;
    p.q = ref<const Element>(paged ? paged_q : ordered_q, {kBatch, rows, kHeads, c.dim})
              .template as<const void>();
    p.k = ref<const Element>(paged ? paged_k : ordered_k, {entries, keys, kKeyHeads, c.dim})
              .template as<const void>();
    p.v = ref<const Element>(paged ? paged_v : ordered_v, {entries, keys, kKeyHeads, kValues})
              .template as<const void>();
    if constexpr (std::is_same_v<Params, BackwardParams>)
      p.d_w = ref<const Element>(paged ? paged_d_w : ordered_d_w, {kBatch, rows, kHeads, kValues})
                  .template as<const void>();
    p.scale = 0.7, p.softcap = c.softcap, p.causal = c.causal, p.left = c.left, p.right = -1;
    p.max_q = c.rows, p.max_k = c.keys;
    if (!c.biases) return;
    p.gain_begin = c.rows / 3, p.gain_end = c.rows;
    p.bias = ref<const Element>(bias, {kBatch, kHeads, c.rows, c.keys}).template as<const void>();
    p.key_bias = ref<const A>(key_bias, {kBatch, kHeads, c.keys}).template as<const void>();
    p.key_gain = ref<const A>(key_gain, {kBatch, kHeads, c.keys}).template as<const void>();
    p.row_temperature =
        ref<const A>(row_temperature, {kBatch, c.rows, kHeads}).template as<const void>();
  }
};

// The results of a forward and a backward call.
template <class Element>
struct Results {
  using A = Accum<Element>;
  const Case& c;
  Buffer<Element> o{size(kBatch * c.rows * kHeads * kValues), Element(0)};
  Buffer<A> row{size(kBatch * kHeads * c.rows), A(0)}, rest{size(kBatch * kHeads * c.rows), A(0)};
  Buffer<Element> d_q{size(kBatch * c.rows * kHeads * c.dim), Element(0)},
      d_k{size(kBatch * c.keys * kKeyHeads * c.dim), Element(0)},
      d_v{size(kBatch * c.keys * kKeyHeads * kValues), Element(0)};
  Buffer<A> d_bias{size(kBatch * kHeads * c.rows * c.keys), A(0)},
      d_key_bias{size(kBatch * kHeads * c.keys), A(0)},
      d_key_gain{size(kBatch * kHeads * c.keys), A(0)},
      d_row_temperature{size(kBatch * c.rows * kHeads), A(0)};

  static size_t size(int64_t n) { return static_cast<size_t>(n); }

  void describe(ForwardParams& p) const {
    p.o = ref<Element>(o, {kBatch, c.rows, kHeads, kValues}).template as<void>();
    p.row = ref<A>(row, {kBatch, kHeads, c.rows}).template as<void>();
    p.rest = ref<A>(rest, {kBatch, kHeads, c.rows}).template as<void>();
  }
  void describe(BackwardParams& p, const Inputs<Element>& x) const {
    p.row = ref<const A>(row, {kBatch, kHeads, c.rows}).template as<const void>();
    p.rest = ref<const A>(rest, {kBatch, kHeads, c.rows}).template as<const void>();
    p.delta = ref<const A>(x.delta, {kBatch, kHeads, c.rows}).template as<const void>();
    p.d_q = ref<Element>(d_q, {kBatch, c.rows, kHeads, c.dim}).template as<void>();
    p.d_k = ref<Element>(d_k, {kBatch, c.keys, kKeyHeads, c.dim}).template as<void>();
    p.d_v = ref<Element>(d_v, {kBatch, c.keys, kKeyHeads, kValues}).template as<void>();
    if (!c.biases) return;
    p.d_row_temperature = ref<A>(d_row_temperature, {kBatch, c.rows, kHeads}).template as<void>();
    p.d_bias = ref<A>(d_bias, {kBatch, kHeads, c.rows, c.keys}).template as<void>();
    p.d_key_bias = ref<A>(d_key_bias, {kBatch, kHeads, c.keys}).template as<void>();
    p.d_key_gain = ref<A>(d_key_gain, {kBatch, kHeads, c.keys}).template as<void>();
  }

  // same(name, numbers of this, numbers of other)
  template <class Same>
  void compare(const Results& other, const Same& same) const {
    same("o", o.read(), other.o.read());
    same("row", row.read(), other.row.read());
    same("rest", rest.read(), other.rest.read());
    same("d_q", d_q.read(), other.d_q.read());
    same("d_k", d_k.read(), other.d_k.read());
    same("d_v", d_v.read(), other.d_v.read());
    same("d_bias", d_bias.read(), other.d_bias.read());
    same("d_key_bias", d_key_bias.read(), other.d_key_bias.read());
    same("d_key_gain", d_key_gain.read(), other.d_key_gain.read());
    same("d_row_temperature", d_row_temperature.read(), other.d_row_temperature.read());
  }
};

// ---- Checks -------------------------------------------------------------------------------------
//
// Loops: of a backend, with forward(p, source, multiprocessors), which returns the number of spans
// that the keys were cut into, and backward(p, source).

// Returns the spans of the forward call.
template <class Loops, class Source, class Element>
int64_t run(const Inputs<Element>& x, bool paged, const Source& source, int multiprocessors,
            const Results<Element>& to) {
  ForwardParams f{};
  x.describe(f, paged);
  to.describe(f);
  const int64_t spans = Loops::forward(f, source, multiprocessors);
  BackwardParams b{};
  x.describe(b, paged);
  to.describe(b, x);
  Loops::backward(b, source);
  return spans;
}

template <class Loops>
void check_pages(int multiprocessors, bool split) {
  using Element = typename Loops::Element;
  for (const Case& c : kCases) {
    const Inputs<Element> x{c};
    const Results<Element> ordered{c}, paged{c};
    int64_t spans = run<Loops>(x, false, DenseSource{}, multiprocessors, ordered);
    EXPECT((spans > 1) == split, c.name, ": ", spans, " spans");
    spans = run<Loops>(x, true, x.pages(), multiprocessors, paged);
    EXPECT((spans > 1) == split, c.name, ": ", spans, " spans");
    paged.compare(ordered, [&](const char* what, const auto& got, const auto& want) {
      EXPECT(std::memcmp(got.data(), want.data(), got.size() * sizeof got[0]) == 0, Loops::kName,
             ", ", c.name, ": ", what);
    });
    bool some = false;
    for (const Element value : ordered.d_k.read()) some |= static_cast<float>(value) != 0;
    EXPECT(some, c.name, ": there are gradients");
  }
}

// All tokens of a sequence, listed in any order.
template <class Loops>
void check_lists(int multiprocessors) {
  using Element = typename Loops::Element;
  for (const Case* chosen : kCasesOfLists) {
    const Case& c = *chosen;
    const Inputs<Element> x{c};
    const Results<Element> ordered{c}, listed{c};
    const auto list = [](int64_t lists, int64_t count, uint64_t seed) {
      std::vector<int64_t> all;
      for (int64_t n = 0; n < lists; ++n)
        for (const int token : shuffled(count, seed + static_cast<uint64_t>(n)))
          all.push_back(token);
      return all;
    };
    // Of rows a list of every head; of keys one of all heads, since some share results.
    const Buffer<int64_t> rows(list(kBatch * kHeads, c.rows, 70)), keys(list(kBatch, c.keys, 90));
    Routing routing{};
    routing.rows.entries = ref<const int64_t>(rows, {kBatch, kHeads, 1, c.rows});
    routing.rows.grid = {c.rows, 1, 1, 1, c.rows};
    routing.keys.entries = ref<const int64_t>(keys, {kBatch, 1, 1, c.keys});
    routing.keys.entries.size[1] = kHeads, routing.keys.entries.stride[1] = 0;
    routing.keys.grid = {c.keys, 1, 1, 1, c.keys};
    const GroupSource source{routing, static_cast<int>(c.rows), static_cast<int>(c.keys),
                             static_cast<int>(c.rows), static_cast<int>(c.keys)};

    run<Loops>(x, false, DenseSource{}, multiprocessors, ordered);
    run<Loops>(x, false, source, multiprocessors, listed);
    listed.compare(ordered, [&](const std::string& what, const auto& got, const auto& want) {
      if (what == "rest") return;  // of L, which may be rounded either way
      for (size_t i = 0; i < got.size(); ++i)
        expect_near(static_cast<double>(got[i]), static_cast<double>(want[i]), Loops::kTolerance,
                    concat(Loops::kName, ", ", c.name, ": ", what, " ", i));
    });
  }
}

}  // namespace
}  // namespace hw::test
