// SPDX-License-Identifier: Apache-2.0
// Loops on tensor cores are free in where rows and keys come from, as test_sources.cpp has it of
// those without.
#include "ops/attention/attention_sm80.cuh"
#include "source_cases.cuh"

namespace hw::test {
namespace {

using softmax::PlainScore;
using softmax::sm80::SequenceCut;

struct Sm80Loops {
  using Element = bf16;
  static constexpr const char* kName = "sm80";
  static constexpr double kTolerance = 0.02;  // a rounding of bf16 either way

  // f(width, kind) with the compiled width of a dim and the kind of score of a call.
  template <class Params, class F>
  static void choose(const Params& p, const F& f) {
    const bool plain = softmax::sm80::has_plain_scores(p);
    const auto of_width = [&](auto width) {
      plain ? f(width, PlainScore{}) : f(width, FullScore{});
    };
    p.dim() <= 32 ? of_width(std::integral_constant<int, 32>{})
                  : of_width(std::integral_constant<int, 96>{});
  }

  template <softmax::KeySource Source>
  static int64_t forward(const ForwardParams& f, const Source& source, int multiprocessors) {
    int64_t spans = 0;
    Context device = context();
    device.multiprocessors = multiprocessors;
    choose(f, [&](auto width, auto kind) {
      using Kind = decltype(kind);
      using Kernel = softmax::sm80::ForwardKernel<Element, width, Kind, Source, SequenceCut>;
      const softmax::sm80::Plan plan =
          softmax::sm80::plan_of(f, kBatch, Kernel::kRows, multiprocessors);
      Arena sizes;
      softmax::sm80::lay_out(sizes, f, kBatch, plan);
      const Buffer<uint8_t> memory(static_cast<size_t>(sizes.bytes()), uint8_t{0xff});
      Arena arena({memory.data(), sizes.bytes()}, kName);
      softmax::sm80::forward<Element, width, Kind, Source, SequenceCut>(f, source, kind, kBatch,
                                                                        device, arena);
      spans = plan.spans;
    });
    return spans;
  }

  template <softmax::KeySource Source>
  static void backward(const BackwardParams& b, const Source& source) {
    choose(b, [&](auto width, auto kind) {
      using namespace softmax::sm80;
      using Kind = decltype(kind);
      const GradientParams<Element, Kind, Source> p{
          source,
          kind,
          b,
          loop_inputs<Element>(b, Kind::kPlain, b.d_w, b.v, b.row, b.rest, b.delta),
          output_of<Element>(b.d_q),
          output_of<Element>(b.d_k),
          output_of<Element>(b.d_v),
          {},
          {},
          {},
          false,
          0};
      using Queries = QueryGradKernel<Element, width, Kind, Source, SequenceCut>;
      launch_blocks<Queries>(kBatch * kHeads, p, b.max_q, context());
      launch_key_gradients<Element, width, Kind, Source, SequenceCut>(kBatch * kKeyHeads, p,
                                                                      b.max_k, context());
    });
  }
};

TEST(pages_sm80) { check_pages<Sm80Loops>(0, false); }
TEST(pages_sm80_in_spans) { check_pages<Sm80Loops>(64, true); }
TEST(lists_sm80) { check_lists<Sm80Loops>(0); }
TEST(lists_sm80_in_spans) { check_lists<Sm80Loops>(64); }

}  // namespace
}  // namespace hw::test
