// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: columns of the map given the row statistics (loop C),
//
//   y_j = sum_i p_ij x_i        sum_j = sum_i r_i p_ij        max_j = max_i p_ij
//
// A block owns 64 keys of a query head and walks the queries that see them.
#pragma once

#include "softmax/sm80/loop.cuh"

namespace hw::softmax::sm80 {

template <class Element, int kDim, ScoreKind Kind, KeySource Source, class Cut>
struct ColumnsKernel {
  using L = Loop<Element, kDim, Kind, true, false, Source, Cut>;
  using Scores = typename L::Scores;
  using Smem = typename L::Smem;
  static constexpr int kThreads = L::kThreads, kMinBlocks = kDim <= 128 ? 2 : 1;

  struct Params {
    Source source;
    Kind kind;
    ColumnsParams c;
    LoopInputs<Element> inputs;  // extra: row weights
    Output<Element> y;
    int64_t blocks;  // of slots of keys, per head of a sequence
  };

  HW_DEVICE static void main(const Params& p) {
    const ColumnsParams& c = p.c;
    const int64_t group = dev::block_index_x() / p.blocks, heads = c.query_heads();
    L loop(c, p.inputs, p.source, p.kind, *dev::shared<Smem>());
    loop.go(group / heads, static_cast<int>(group % heads),
            dev::block_index_x() % p.blocks * L::kOwn);
    if (loop.own().empty()) return;

    typename L::Values y;
    y.clear();
    float sum[2] = {}, top[2] = {};  // this lane's share of keys g and g + 8
    loop.walk(loop.others(), [&](const auto& stage, const auto& score) {
      Scores weights;
      loop.products(weights, stage);
      score.shape_products(weights);
      score.add_terms(weights);
      score.hide(weights);
      score.weigh(weights, p.inputs.unit);
      Scores::each([&](int s, int j, int i) {
        const float w = weights.at[s][j][i];
        sum[i / 2] += c.row_weight ? w * score.operands.numbers[Scores::column(j, i)].v[2] : w;
        top[i / 2] = larger(w, top[i / 2]);
      });
      if (c.x) multiply_columns<Element>(y, pack<Element>(weights), stage.second);
    });

    loop.store_sums(c.sum, sum);
    HW_UNROLL
    for (int half = 0; half < 2; ++half) {
      float largest = top[half];
      HW_UNROLL
      for (int mask = 2; mask > 0; mask /= 2)
        largest = larger(dev::shuffle_xor(largest, mask), largest);
      if (c.max) loop.store_of_key(c.max, half, largest);
    }
    if (c.x) loop.store(p.y, loop.item.head, y, [](int) { return 1.0f; });
  }

 private:
  // NaN is kept.
  HW_DEVICE HW_INLINE static float larger(float w, float than) {
    return w > than || w != w ? w : than;
  }
};

}  // namespace hw::softmax::sm80
