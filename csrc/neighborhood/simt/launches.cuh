// SPDX-License-Identifier: Apache-2.0
// Launches of the loops over neighbourhoods. All arrays are of one [B, Y, X, H].
#pragma once

#include "neighborhood/simt/tokens.cuh"

#include "core/gpu/launch.h"

namespace hw::neighborhood::simt {

template <class W, class Element>
void mix(const Window& window, const Ref<const W, 5>& w, const Ref<const Element, 5>& v,
         const Ref<Element, 5>& o, const Context& context) {
  const int lanes = lanes_of(v.size[4]);
  launch<MixKernel<W, Element>>({blocks_of(o, lanes), 1, 1}, 0, context, {w, v, o, window, lanes});
}

template <class W, class Element>
void dot(const Window& window, const Ref<const Element, 5>& g, const Ref<const Element, 5>& v,
         const Ref<W, 5>& s, const Context& context) {
  const int lanes = lanes_of(v.size[4]);
  launch<DotKernel<W, Element>>({blocks_of(g, lanes), 1, 1}, 0, context, {g, v, s, window, lanes});
}

template <class W, class Element>
void receive(const Window& window, const Ref<const W, 5>& w, const Ref<const Element, 5>& g,
             const Ref<Element, 5>& d_v, const Context& context) {
  const int lanes = lanes_of(g.size[4]);
  launch<ReceiveKernel<W, Element>>({blocks_of(d_v, lanes), 1, 1}, 0, context,
                                    {w, g, d_v, window, lanes});
}

}  // namespace hw::neighborhood::simt
