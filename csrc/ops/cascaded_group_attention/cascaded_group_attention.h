// SPDX-License-Identifier: Apache-2.0
// Cascaded group attention (EfficientViT, arXiv 2305.07027), inference: mathematics, parameters.
//
// Of a window of N = height * width tokens the channels are H groups x_0 .. x_{H-1} of d:
//
//   f_0 = x_0,  f_i = o_{i-1} + x_i                              [N, d]
//   (q, k, v) = f_i W_i + b_i                                    [N, K], [N, K], [N, d]
//   q = dwconv_i(q) + c_i                                        zeros beyond the window
//   o_i = softmax_j(K^-1/2 <q_t, k_j> + T_i[|dy| R + |dx|]) v    [N, d]
//   y = relu([o_0 .. o_{H-1}]) W + b                             [N, C], C = H d
//
// The cascade is serial over heads: a window is one task from x to y. Tokens of a window beyond the
// image have x = 0; they are projected and are keys like others, and have no y.
#pragma once

#include <cstdint>

#include "core/host/call.h"
#include "core/math.h"

namespace hw::cascaded_group_attention {

struct ForwardParams {
  Ref<const void, 4> x;            // [B, Y, X, C]
  Ref<const void, 3> qkv_weight;   // [H, d, F]        F = 2 K + d: columns of q, k, v
  Ref<const void, 2> qkv_bias;     // [H, F]
  Ref<const void, 4> conv_weight;  // [H, S, S, K]     taps, S odd; zeros around a smaller kernel
  Ref<const void, 2> conv_bias;    // [H, K]
  Ref<const void, 2> bias_table;   // [H, R * R]
  Ref<const void, 2> out_weight;   // [C, C]           inputs by outputs
  Ref<const void, 1> out_bias;     // [C]
  Ref<void, 4> y;                  // [B, Y, X, C]     out
  int64_t height, width;           // of a window, at most R each

  HW_HOST_DEVICE int64_t heads() const { return qkv_weight.size[0]; }
  HW_HOST_DEVICE int64_t group() const { return qkv_weight.size[1]; }      // d
  HW_HOST_DEVICE int64_t projected() const { return qkv_weight.size[2]; }  // F
  HW_HOST_DEVICE int64_t key_dim() const { return conv_weight.size[3]; }   // K
  HW_HOST_DEVICE int64_t kernel() const { return conv_weight.size[1]; }    // S
  HW_HOST_DEVICE int64_t channels() const { return x.size[3]; }
  HW_HOST_DEVICE int64_t tokens() const { return height * width; }             // N
  HW_HOST_DEVICE int64_t rows() const { return ceil_div(x.size[1], height); }  // of windows
  HW_HOST_DEVICE int64_t columns() const { return ceil_div(x.size[2], width); }
  HW_HOST_DEVICE int64_t windows() const { return x.size[0] * rows() * columns(); }

  // R: the table has R * R entries a head.
  HW_HOST_DEVICE int64_t side() const {
    int64_t r = 0;
    while (r * r < bias_table.size[1]) ++r;
    return r;
  }

  // Of a window of the image: its batch entry, and where its first token stands.
  struct Place {
    int64_t batch, y, x;
  };
  HW_HOST_DEVICE Place place(int64_t window) const {
    const int64_t of_image = rows() * columns(), at = window % of_image;
    return {window / of_image, at / columns() * height, at % columns() * width};
  }
};

}  // namespace hw::cascaded_group_attention
