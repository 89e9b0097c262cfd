// SPDX-License-Identifier: Apache-2.0
// Loops are free in where rows and keys come from: those of attention over pages, a source that no
// operator has, give the same bits as over the same tokens in order; those over lists of all tokens
// in any order give the same numbers. With nvcc (-x cu) the same file tests the device.
#include "ops/routing_attention/routing_attention_simt.cuh"
#include "softmax/simt/backward.cuh"
#include "softmax/simt/forward.cuh"
#include "source_cases.cuh"

namespace hw::test {
namespace {

struct SimtLoops {
  using Element = float;
  static constexpr const char* kName = "simt";
  static constexpr double kTolerance = 2e-4;

  template <softmax::KeySource Source>
  static int64_t forward(const ForwardParams& f, const Source& source, int multiprocessors) {
    softmax::simt::RowsParams<Element, FullScore, Source> p{};
    p.f = f;
    p.source = source;
    p.plan = softmax::simt::forward_plan<Element>(kBatch, kHeads, f.max_q, f.max_k, kValues,
                                                  multiprocessors);
    const Buffer<Element> partials(static_cast<size_t>(p.plan.workspace()), Element(0));
    p.partials = partials.data();
    describe_tensors(p);
    run_rows(p, context());
    return p.plan.spans;
  }

  template <softmax::KeySource Source>
  static void backward(const BackwardParams& b, const Source& source) {
    softmax::simt::GradParams<Element, FullScore, Source> p{};
    p.b = b;
    p.source = source;
    describe_tensors(p);
    run_query_grad(p, kBatch, context());
    run_key_grad(p, kBatch, context());
  }
};

TEST(pages_simt) { check_pages<SimtLoops>(0, false); }
TEST(pages_simt_in_spans) { check_pages<SimtLoops>(64, true); }
TEST(lists_simt) { check_lists<SimtLoops>(0); }
TEST(lists_simt_in_spans) { check_lists<SimtLoops>(64); }

// ---- The operator -------------------------------------------------------------------------------

// Two groups, whose keys are all tokens, in an order of their own and with a slot that has none: a
// zero key. By token each row is in one of them, by slot in both, with half of d_w. That is
// attention with softmax1.
struct TwoGroups {
  const Case& c;
  bool by_slot;
  int64_t row_slots = by_slot ? c.rows + 1 : (c.rows + 1) / 2, key_slots = c.keys + 1;
  const Buffer<int64_t> rows{list(c.rows, row_slots, !by_slot, 70)},
      keys{list(c.keys, key_slots, false, 90)};

  // Of every head and group; `cut`: tokens are dealt out to the groups.
  static std::vector<int64_t> list(int64_t count, int64_t slots, bool cut, uint64_t seed) {
    std::vector<int64_t> all;
    for (int64_t n = 0; n < kBatch * kHeads; ++n) {
      const std::vector<int> tokens = shuffled(count, seed + static_cast<uint64_t>(n));
      for (int64_t at = 0; at < 2 * slots; ++at) {
        const int64_t slot = cut ? at : at % slots;
        all.push_back(slot < count ? tokens[static_cast<size_t>(slot)] : -1);
      }
    }
    return all;
  }

  void describe(Routing& r) const {
    r.rows.entries = ref<const int64_t>(rows, {kBatch, kHeads, 2, row_slots});
    r.rows.grid = {c.rows, 1, 1, 1, c.rows};
    r.keys.entries = ref<const int64_t>(keys, {kBatch, kHeads, 2, key_slots});
    r.keys.grid = {c.keys, 1, 1, 1, c.keys};
    r.by_slot = by_slot, r.pad_keys = true;
  }
  template <class Params>
  void complete(Params& p) const {
    describe(p);
    p.max_q = row_slots, p.max_k = key_slots;
  }
};

// body(call) with a workspace of `bytes`.
template <class Body>
void with_workspace(int64_t bytes, Call call, const Body& body) {
  const Buffer<uint8_t> memory(static_cast<size_t>(bytes), uint8_t{0xff});
  call.workspace = {memory.data(), bytes};
  body(call);
}

// <d_w_i, o_i>.
std::vector<float> deltas(const Case& c, const std::vector<float>& d_w,
                          const std::vector<float>& o) {
  std::vector<float> delta(static_cast<size_t>(kBatch * kHeads * c.rows));
  for (int64_t b = 0; b < kBatch; ++b)
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t h = 0; h < kHeads; ++h) {
        double sum = 0;
        const size_t at = static_cast<size_t>(((b * c.rows + i) * kHeads + h) * kValues);
        for (size_t n = 0; n < kValues; ++n) sum += double{d_w[at + n]} * o[at + n];
        delta[static_cast<size_t>((b * kHeads + h) * c.rows + i)] = static_cast<float>(sum);
      }
  return delta;
}

void check_operator(bool by_slot, int multiprocessors) {
  using namespace routing_attention;
  for (const Case* chosen : kCasesOfLists) {
    const Case& c = *chosen;
    const Inputs<float> x{c};
    const Results<float> ordered{c}, listed{c};
    softmax::ForwardParams dense{};
    x.describe(dense, false), ordered.describe(dense);
    dense.activation = softmax::Activation::softmax1;
    SimtLoops::forward(dense, DenseSource{}, 0);
    const Buffer<float> delta(deltas(c, x.d_w, ordered.o.read()));
    const auto gradients = [&](softmax::BackwardParams& b, const Results<float>& to) {
      x.describe(b, false), to.describe(b, x);
      b.delta = ref<const float>(delta, {kBatch, kHeads, c.rows}).as<const void>();
      b.d_bias = {}, b.d_key_bias = b.d_key_gain = {};
    };
    softmax::BackwardParams dense_gradients{};
    gradients(dense_gradients, ordered);
    dense_gradients.activation = softmax::Activation::softmax1;
    SimtLoops::backward(dense_gradients, DenseSource{});

    const TwoGroups lists{c, by_slot};
    const int64_t slots = 2 * lists.row_slots;
    Call call{};
    call.context.multiprocessors = multiprocessors;
    const Buffer<float> w(static_cast<size_t>(kBatch * slots * kHeads * kValues), 0.0f),
        row(static_cast<size_t>(kBatch * kHeads * slots), 0.0f),
        rest(static_cast<size_t>(kBatch * kHeads * slots), 0.0f);
    routing_attention::ForwardParams f{};
    x.describe(f, false), listed.describe(f), lists.complete(f);
    const auto of_slots = ref<float>(row, {kBatch, kHeads, slots}).as<void>();
    const auto rest_of_slots = ref<float>(rest, {kBatch, kHeads, slots}).as<void>();
    if (by_slot) {
      f.w = ref<float>(w, {kBatch, slots, kHeads, kValues}).as<void>();
      f.row = of_slots, f.rest = rest_of_slots;
    }
    with_workspace(workspace_bytes(f, call, Backend::simt), call,
                   [&](const Call& ready) { routing_attention::simt::forward<float>(f, ready); });

    routing_attention::BackwardParams b{};
    gradients(b, listed), lists.complete(b);
    std::vector<float> half = x.d_w;
    for (float& value : half) value /= 2;
    const Buffer<float> half_d_w(half);
    if (by_slot) {
      b.slots = f.w.as<const void>();
      b.row = of_slots.as<const void>(), b.rest = rest_of_slots.as<const void>();
      b.delta = {};
      b.d_w = ref<const float>(half_d_w, {kBatch, c.rows, kHeads, kValues}).as<const void>();
    }
    with_workspace(workspace_bytes(b, DType::f32), call,
                   [&](const Call& ready) { routing_attention::simt::backward<float>(b, ready); });
    listed.compare(ordered, [&](const std::string& what, const auto& got, const auto& want) {
      if (what == "rest" || (by_slot && what == "row")) return;
      for (size_t i = 0; i < got.size(); ++i)
        expect_near(static_cast<double>(got[i]), static_cast<double>(want[i]), 2e-4,
                    concat(c.name, ": ", what, " ", i));
    });
  }
}

TEST(groups_simt) { check_operator(false, 0); }
TEST(groups_simt_in_spans) { check_operator(false, 64); }
TEST(groups_simt_by_slot) { check_operator(true, 0); }
TEST(groups_simt_by_slot_in_spans) { check_operator(true, 64); }

}  // namespace
}  // namespace hw::test
