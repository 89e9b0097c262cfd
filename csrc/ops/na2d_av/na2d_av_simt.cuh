// SPDX-License-Identifier: Apache-2.0
// Neighbourhoods with given weights on CUDA: the loops of neighborhood/simt, of the caller's
// weights.
#pragma once

#include "neighborhood/simt/launches.cuh"
#include "ops/na2d_av/na2d_av.h"

namespace hw::na2d_av::simt {

template <class Element>
void forward(const ForwardParams& p, const Call& call) {
  neighborhood::simt::mix(p.window(), p.w.as<const Element>(), p.v.as<const Element>(),
                          p.o.as<Element>(), call.context);
}

template <class Element>
void backward(const BackwardParams& p, const Call& call) {
  const Ref<const Element, 5> d_o = p.d_o.as<const Element>();
  if (p.d_w)
    neighborhood::simt::dot(p.window(), d_o, p.v.as<const Element>(), p.d_w.as<Element>(),
                            call.context);
  if (p.d_v)
    neighborhood::simt::receive(p.window(), p.w.as<const Element>(), d_o, p.d_v.as<Element>(),
                                call.context);
}

}  // namespace hw::na2d_av::simt

namespace hw::na2d_av {

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& forward = simt::forward<Element>;
  static constexpr auto& backward = simt::backward<Element>;
};

}  // namespace hw::na2d_av
