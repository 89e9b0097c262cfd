// SPDX-License-Identifier: Apache-2.0
// Routing by k-means on CUDA, without tensor cores: every dtype, sm_75 and later.
//
//   similarity   a block has 128 tokens x 16 clusters of a head, a thread 4 x 4 of them:
//
//                  for each slice of 32 channels (fp64: 16)
//                    x [128, slice], mu [16, slice]  -> shared memory, widened
//                    d [4, 4] += x mu^T                 16 bytes a read, along rows
//
//                A lane owns tokens, a warp clusters: mu is read by all lanes at once, and d goes
//                to memory along the sequence. Blocks of the same tokens follow each other, so that
//                x comes from L2 for all clusters but the first 16.
//   prefix       a block has a cluster, 256 tokens at a time, a thread one of them:
//
//                  count the earlier tokens that outrank it      256 keys at a time, shared memory
//                  those that join, in order, by votes of the warps
//
//                S^2 / 2 comparisons, all independent, and no order among them to lose.
#pragma once

#include <type_traits>

#include "ops/kmeans_route/kmeans_route.h"

#include "core/gpu/block_rank.cuh"
#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"
#include "core/gpu/vector.h"
#include "core/math.h"
#include "core/sort_key.h"

namespace hw::kmeans_route::simt {

template <class Element>
struct SimilarityKernel {
  using A = Accum<Element>;
  static constexpr int kThreads = 128, kWarps = kThreads / dev::kWarp;
  static constexpr int kMinBlocks = 4;  // 128 registers a thread
  static constexpr int kOwn = 4;        // tokens and clusters of a thread
  static constexpr int kTokens = kOwn * dev::kWarp, kClusters = kOwn * kWarps;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(A));
  static constexpr int kSlice = 8 * kVector;  // channels at a time
  // Rows are an odd number of vectors apart: 8 lanes that read neighbouring rows meet all banks.
  static constexpr int kStride = kSlice + kVector;

  struct Params {
    SimilarityParams f;
    bool x_vectors, mu_vectors;  // rows can be read 16 bytes at a time
    int64_t token_tiles, cluster_tiles;
  };

  struct alignas(16) Smem {
    A x[kTokens * kStride];
    A mu[kClusters * kStride];
  };

  struct Block {
    const Params& p;
    Smem& smem;
    int64_t b, head, token, cluster;  // the first of the block

    HW_DEVICE HW_INLINE static Block of(const Params& p) {
      const int64_t index = dev::block_index_x();
      const int64_t tile = index / p.cluster_tiles, sequence = tile / p.token_tiles;
      return {p,
              *dev::shared<Smem>(),
              sequence / p.f.heads(),
              sequence % p.f.heads(),
              tile % p.token_tiles * kTokens,
              index % p.cluster_tiles * kClusters};
    }

    HW_DEVICE HW_INLINE void run() const {
      A sum[kOwn][kOwn] = {};  // [token][cluster]
      const int64_t channels = p.f.channels();
      HW_UNROLL_BY(1)
      for (int64_t first = 0; first < channels; first += kSlice) {
        dev::sync_block();  // everyone has read the slice before
        load(first);
        dev::sync_block();
        add(sum, static_cast<int>(min_of<int64_t>(channels - first, kSlice)));
      }
      store(sum);
    }

    HW_DEVICE HW_INLINE void load(int64_t first) const {
      const auto x = p.f.x.template as<const Element>();
      const auto mu = p.f.centroids.template as<const A>();
      load_rows<kTokens>(smem.x, x.at(b, token, head, first), x.stride[1], x.stride[3], p.x_vectors,
                         p.f.tokens() - token, p.f.channels() - first);
      load_rows<kClusters>(smem.mu, mu.at(head, cluster, first), mu.stride[1], mu.stride[2],
                           p.mu_vectors, p.f.clusters() - cluster, p.f.channels() - first);
    }

    // buffer[i][c] = from[i, c]; zero from row `rows` and channel `channels` on.
    template <int kRows, class T>
    HW_DEVICE static HW_INLINE void load_rows(A* buffer, const T* from, int64_t row_stride,
                                              int64_t stride, bool vectors, int64_t rows,
                                              int64_t channels) {
      if (vectors) {
        constexpr int kTogether = 16 / static_cast<int>(sizeof(T)), kGroups = kSlice / kTogether;
        HW_UNROLL_BY(4)
        for (int n = dev::thread_index(); n < kRows * kGroups; n += kThreads) {
          const int i = n / kGroups, c = n % kGroups * kTogether;
          Vec<T, kTogether> x = {};
          if (i < rows && c < channels) x = load_vector<kTogether>(from + i * row_stride + c);
          HW_UNROLL
          for (int e = 0; e < kTogether; e += kVector) {
            Vec<A, kVector> wide;
            HW_UNROLL
            for (int v = 0; v < kVector; ++v) wide.v[v] = static_cast<A>(x.v[e + v]);
            store_vector(buffer + i * kStride + c + e, wide);
          }
        }
        return;
      }
      HW_UNROLL_BY(4)
      for (int n = dev::thread_index(); n < kRows * kSlice; n += kThreads) {
        const int i = n / kSlice, c = n % kSlice;
        const bool there = i < rows && c < channels;
        buffer[i * kStride + c] = there ? static_cast<A>(from[i * row_stride + c * stride]) : A(0);
      }
    }

    // One order for all: by channel. Channels beyond the last, up to a vector, are zeros.
    HW_DEVICE HW_INLINE void add(A (&sum)[kOwn][kOwn], int channels) const {
      const A* x = smem.x + dev::lane() * kStride;
      const A* mu = smem.mu + dev::warp() * kOwn * kStride;
      HW_UNROLL_BY(1)
      for (int c = 0; c < channels; c += kVector) {
        Vec<A, kVector> y[kOwn];
        HW_UNROLL
        for (int u = 0; u < kOwn; ++u) y[u] = load_vector<kVector>(mu + u * kStride + c);
        HW_UNROLL
        for (int r = 0; r < kOwn; ++r) {
          const auto own = load_vector<kVector>(x + r * dev::kWarp * kStride + c);
          HW_UNROLL
          for (int u = 0; u < kOwn; ++u) {
            HW_UNROLL
            for (int v = 0; v < kVector; ++v) sum[r][u] += own.v[v] * y[u].v[v];
          }
        }
      }
    }

    HW_DEVICE HW_INLINE void store(const A (&sum)[kOwn][kOwn]) const {
      const auto d = p.f.d.template as<A>();
      HW_UNROLL
      for (int u = 0; u < kOwn; ++u) {
        const int64_t c = cluster + dev::warp() * kOwn + u;
        HW_UNROLL
        for (int r = 0; r < kOwn; ++r) {
          const int64_t t = token + r * dev::kWarp + dev::lane();
          if (c < p.f.clusters() && t < p.f.tokens()) d(b, head, c, t) = sum[r][u];
        }
      }
    }
  };

  HW_DEVICE static void main(const Params& p) { Block::of(p).run(); }
};

template <class Element>
struct PrefixKernel {
  using Key = SortKey<Element>;
  static constexpr int kThreads = 256, kWarps = kThreads / dev::kWarp;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(Key));

  using Params = PrefixParams;

  struct alignas(16) Smem {
    Key keys[2][kThreads];
    unsigned votes[kWarps];
  };

  struct Block {
    const Params& f;
    Smem& smem;
    Ref<const Element, 2> d;
    int64_t row;

    // That of NaN beyond the last token.
    HW_DEVICE HW_INLINE Key key(int64_t t) const {
      return t < f.tokens() ? sort_key(d(row, t)) : Key{0};
    }

    // How many tokens before t = begin + own thread outrank it. All keys pass through two buffers:
    // one is filled while the other may still be read, and the next keys are on their way.
    HW_DEVICE HW_INLINE int64_t outranked(int64_t begin, Key own) const {
      int64_t count = 0;
      Key next = key(dev::thread_index());
      HW_UNROLL_BY(1)
      for (int64_t first = 0; first < begin; first += kThreads) {
        Key* buffer = smem.keys[first / kThreads % 2];
        buffer[dev::thread_index()] = next;
        dev::sync_block();
        next = key(first + kThreads + dev::thread_index());
        count += not_below(buffer, own);
      }
      Key* buffer = smem.keys[begin / kThreads % 2];
      buffer[dev::thread_index()] = own;
      dev::sync_block();
      for (int j = 0; j < dev::thread_index(); ++j) count += buffer[j] >= own;
      return count;
    }

    HW_DEVICE static HW_INLINE int not_below(const Key* buffer, Key own) {
      int count = 0;
      HW_UNROLL_BY(4)
      for (int j = 0; j < kThreads; j += kVector) {
        const auto other = load_vector<kVector>(buffer + j);
        HW_UNROLL
        for (int v = 0; v < kVector; ++v) count += other.v[v] >= own;
      }
      return count;
    }

    HW_DEVICE HW_INLINE void run() const {
      int64_t members = 0;  // before these tokens
      for (int64_t begin = 0; begin < f.tokens() && members < f.window(); begin += kThreads) {
        const int64_t t = begin + dev::thread_index();
        const bool joins = outranked(begin, key(t)) < f.quota(t) && t < f.tokens();
        const dev::BlockRank rank = dev::block_rank<kThreads>(joins, smem.votes);
        const int64_t slot = members + rank.before;
        if (joins && slot < f.window()) f.index(row, slot) = t;
        members += rank.all;
      }
      for (int64_t slot = members + dev::thread_index(); slot < f.window(); slot += kThreads)
        f.index(row, slot) = -1;
    }
  };

  HW_DEVICE static void main(const Params& p) {
    Block{p, *dev::shared<Smem>(), p.d.template as<const Element>(), dev::block_index_x()}.run();
  }
};

template <class Element>
void similarity(const SimilarityParams& f, const Call& call) {
  using Kernel = SimilarityKernel<Element>;
  using A = Accum<Element>;
  const typename Kernel::Params p{f, has_vectors(f.x.as<const Element>()),
                                  has_vectors(f.centroids.as<const A>()),
                                  ceil_div<int64_t>(f.tokens(), Kernel::kTokens),
                                  ceil_div<int64_t>(f.clusters(), Kernel::kClusters)};
  launch<Kernel>({f.batch() * f.heads() * p.token_tiles * p.cluster_tiles, 1, 1},
                 sizeof(typename Kernel::Smem), call.context, p);
}

template <class Element>
void prefix(const PrefixParams& p, const Call& call) {
  using Kernel = PrefixKernel<Element>;
  if (p.window() == 0) return;
  launch<Kernel>({p.rows(), 1, 1}, sizeof(typename Kernel::Smem), call.context, p);
}

}  // namespace hw::kmeans_route::simt

namespace hw::kmeans_route {

// d has the accumulation type: for 16-bit elements there is nothing to build.
template <class Element>
struct SimtPrefix {};
template <class Element>
  requires std::is_same_v<Element, Accum<Element>>
struct SimtPrefix<Element> {
  static constexpr auto& prefix = simt::prefix<Element>;
};

// kDim is 0: one instance takes every size.
template <class Element, int kDim>
struct Simt : SimtPrefix<Element> {
  static_assert(kDim == 0, "the simt backend has one instance per dtype");
  static constexpr auto& similarity = simt::similarity<Element>;
};

}  // namespace hw::kmeans_route
