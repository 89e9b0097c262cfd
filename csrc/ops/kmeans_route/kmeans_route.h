// SPDX-License-Identifier: Apache-2.0
// Routing by k-means: how similar every token is to every centroid, and who joins a cluster while
// only a prefix of the sequence is known.
//
//   similarity   d_bhct = sum_j x_bthj mu_hcj
//   prefix       r_t    = number of tokens j < t with d_j >= d_t              outranked by
//                token t joins if  r_t < ceil((t + 1) W / L)  and fewer than W joined before
//
//   B batch, S tokens, H heads, D channels, K clusters, W members, L length of the whole sequence
//
// Who joins is decided by keys of core/sort_key.h: equal similarities rank by position, so an
// earlier equal outranks; NaN ranks last. The W best of the whole sequence are select_topk's on d.
//
// Invariant: the bits of d_bhct follow from x_bth and mu_hc alone. All tokens take the same
// additions in the same order, whatever B, S and the number of threads: equal tokens tie, and the
// members of a prefix of the sequence are a prefix of the members.
#pragma once

#include <cstdint>

#include "core/host/call.h"

namespace hw::kmeans_route {

// "kmeans_route.similarity"
struct SimilarityParams {
  Ref<const void, 4> x;          // [B, S, H, D]
  Ref<const void, 3> centroids;  // [H, K, D]        mu, in the accumulation type
  Ref<void, 4> d;                // [B, H, K, S]     out, in the accumulation type

  HW_HOST_DEVICE int64_t batch() const { return d.size[0]; }
  HW_HOST_DEVICE int64_t heads() const { return d.size[1]; }
  HW_HOST_DEVICE int64_t clusters() const { return d.size[2]; }
  HW_HOST_DEVICE int64_t tokens() const { return d.size[3]; }
  HW_HOST_DEVICE int64_t channels() const { return x.size[3]; }
};

// "kmeans_route.prefix"
struct PrefixParams {
  Ref<const void, 2> d;   // [R, S]  a row is a cluster of a head of a batch entry
  Ref<int64_t, 2> index;  // [R, W]  out: members by position, then -1
  int64_t length;         // L, at least S and W

  HW_HOST_DEVICE int64_t rows() const { return d.size[0]; }
  HW_HOST_DEVICE int64_t tokens() const { return d.size[1]; }
  HW_HOST_DEVICE int64_t window() const { return index.size[1]; }
  // ceil((t + 1) W / L); grows by at most one a token, as W <= L. W must not be 0.
  HW_HOST_DEVICE int64_t quota(int64_t t) const { return ((t + 1) * window() - 1) / length + 1; }
};

}  // namespace hw::kmeans_route
