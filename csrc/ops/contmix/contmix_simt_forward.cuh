// SPDX-License-Identifier: Apache-2.0
// ContMix on CUDA, forward: a block makes the weights of its tokens and mixes with them.
#pragma once

#include "ops/contmix/contmix_simt_weights.cuh"

namespace hw::contmix::simt {

template <class Element>
struct ForwardKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = simt::kThreads;

  struct Params {
    WeightInputs<Element> in;
    Ref<const Element, 5> v;  // [B, Y, X, 2 G, D]
    Ref<Element, 5> o;        // [B, Y, X, 2 G, D]
    int lanes;                // of a token and half
  };

  HW_DEVICE static void main(const Params& p) {
    const WeightTile<Element> tile(p.in, dev::shared<A>());
    tile.make();
    const int own = dev::thread_index() / p.lanes;
    for (int n = own; n < 2 * tile.count; n += kThreads / p.lanes) {
      const int i = n / 2, m = n % 2;
      const neighborhood::simt::Token q{tile.b,
                                        tile.y(i),
                                        tile.x(i),
                                        m * p.in.affinity.size[3] + tile.group,
                                        dev::thread_index() % p.lanes,
                                        true};
      const A* w = tile.p + i * tile.taps + (m == 0 ? 0 : tile.small());
      neighborhood::simt::mix_token<A>(p.in.window[m], w, 1, p.v, p.o, q, p.lanes);
    }
  }
};

template <class Element>
void forward(const ForwardParams& p, const Call& call) {
  using Kernel = ForwardKernel<Element>;
  const WeightInputs<Element> in(p);
  const typename Kernel::Params params{in, p.v.as<const Element>(), p.o.as<Element>(),
                                       neighborhood::simt::lanes_of(p.width())};
  launch<Kernel>({in.blocks(), 1, 1}, in.bytes(), call.context, params);
}

}  // namespace hw::contmix::simt
