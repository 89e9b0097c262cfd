// SPDX-License-Identifier: Apache-2.0
// Linear attention without tensor cores, one token per sequence: the state is updated in place.
//
//   kv[f, :] += m_f(k) v      z[f] += m_f(k)      o_g = sum_f c_f m_f(q_g) kv[f, :] / z_g
//
// Each element of kv is read and written once, 32 neighbouring columns by a warp, four rows in
// flight per thread; all query heads of the group (8 at a time) read it while it is in registers.
// The features of a tile of 576 are made once per block and kept in shared memory.
//
// One block takes all columns of a key head and is the only one that touches its z. If that leaves
// most of the device idle and the state is large, several blocks share a key head, `kSplitColumns`
// each. Every one of them needs the old z, so none may write it: each adds m(k) to what it read,
// and a second, tiny kernel behind this one updates z. Without normalisation nobody reads z, and
// the first block of the key head updates it; there is one kernel then, always.
// Traffic at D = 16, Dv = 64, fp32: 2 x 39 KB per key head, against 0.5 KB for everything else.
#pragma once

#include "ops/linear_attention/linear_attention_simt_tiles.cuh"

namespace hw::linear_attention::simt {

inline constexpr int kSplitColumns = 32;

template <class Element>
struct StepKernel {
  using Acc = Accum<Element>;
  struct Params {
    Ref<const Element, 3> q;  // [B, Hq, D]
    Ref<const Element, 3> k;  // [B, H, D]
    Ref<const Element, 3> v;  // [B, H, Dv]
    Ref<Acc, 4> kv;           // [B, H, F, Dv]
    Ref<Acc, 3> z;            // [B, H, F]
    Ref<Element, 3> o;        // [B, Hq, Dv]
    FeatureMap map;
    bool normalize;
    Acc scale, eps;
    int key_heads, group, dim, value_dim, features;
    int splits;      // blocks of a key head
    int columns;     // of a block
    bool updates_z;  // by the first block of each key head
  };
  static constexpr int kThreads = 256, kWarps = kThreads / dev::kWarp;
  static constexpr int kHeads = 8;       // query heads at a time
  static constexpr int kFeatures = 576;  // features at a time
  static constexpr int kBatch = 4;       // rows of the state in flight
  // key features, query features, sums of the warps, denominators
  static constexpr int kShared =
      (1 + kHeads) * kFeatures + kWarps * kHeads * dev::kWarp + kWarps * kHeads;

  HW_DEVICE static void main(const Params& p) { StepKernel(p).run(); }

 private:
  HW_DEVICE HW_INLINE explicit StepKernel(const Params& params) : p(params) {
    const int index = dev::block_index_x();
    split = index % p.splits;
    h = index / p.splits % p.key_heads;
    b = index / p.splits / p.key_heads;
    Acc* shared = dev::shared<Acc>();
    key_features = shared;
    query_features = key_features + kFeatures;
    sums = query_features + kHeads * kFeatures;
    denominators = sums + kWarps * kHeads * dev::kWarp;
  }

  HW_DEVICE HW_INLINE void run() {
    for (int head = 0; head < max_of(p.group, 1); head += kHeads) {
      first_head = head;
      heads = min_of(p.group - head, kHeads);
      const int begin = split * p.columns, end = min_of(begin + p.columns, p.value_dim);
      clear_denominators();
      for (int column = begin; column == begin || column < end; column += dev::kWarp) {
        update_columns(column, end, column == begin);
      }
    }
  }

  HW_DEVICE HW_INLINE void clear_denominators() {
    HW_UNROLL
    for (int g = 0; g < kHeads; ++g) z_sum[g] = Acc(0);
  }

  // 32 columns, all features; `begin`: the first columns of the block, which also see to z.
  HW_DEVICE HW_INLINE void update_columns(int column, int end, bool begin) {
    const int c = column + dev::lane();
    const bool inside = c < end;
    const Acc value = inside ? static_cast<Acc>(p.v(b, h, c)) : Acc(0);
    Acc o[kHeads] = {};
    for (int first = 0; first < p.features; first += kFeatures) {
      const int count = min_of(p.features - first, kFeatures);
      if (begin || p.features > kFeatures) {
        dev::sync_block();
        make_features(first, count);
        dev::sync_block();
        if (begin) update_z(first, count);
      }
      if (inside) update_state(first, count, c, value, o);
    }
    store_sums(o);
    if (begin) store_denominators();
    dev::sync_block();
    if (inside) finish(c);
  }

  HW_DEVICE HW_INLINE void make_features(int first, int count) {
    for (int i = dev::thread_index(); i < count; i += kThreads) {
      const FeaturePair pair = feature_pair(p.map, p.dim, 255, first + i);
      const auto [a, bb] = columns_of(first + i, pair);
      key_features[i] = feature(p.k.at(b, h), p.k.stride[2], Acc(1), a, bb);
      const Acc c = coefficient<true, Acc>(pair, 255);
      for (int g = 0; g < heads; ++g) {
        const Element* q = p.q.at(b, h * p.group + first_head + g);
        query_features[g * kFeatures + i] = c * feature(q, p.q.stride[2], p.scale, a, bb);
      }
    }
  }

  struct Columns {
    int a, b;  // -1: the constant 1
  };
  HW_DEVICE HW_INLINE Columns columns_of(int f, FeaturePair pair) const {
    if (p.map != FeatureMap::taylor2) return {f, -1};
    return {pair.a == 255 ? -1 : pair.a, pair.b == 255 ? -1 : pair.b};
  }
  HW_DEVICE HW_INLINE Acc feature(const Element* x, int64_t stride, Acc scale, int a,
                                  int bb) const {
    const auto at = [&](int i) {
      return i < 0 ? Acc(1) : pre_map(p.map, static_cast<Acc>(x[i * stride])) * scale;
    };
    return at(a) * at(bb);
  }

  // z of this step: read, joined by the key, written by the one block that may; and its products.
  // A thread sees the same features for all query heads, so it reads back its own z.
  HW_DEVICE HW_INLINE void update_z(int first, int count) {
    if (!p.z) return;
    const bool writes = p.updates_z && split == 0;
    if (!writes && !p.normalize) return;
    for (int i = dev::thread_index(); i < count; i += kThreads) {
      Acc& stored = p.z(b, h, first + i);
      const bool joined = writes && first_head > 0;
      const Acc z = joined ? stored : stored + key_features[i];
      if (writes && !joined) stored = z;
      HW_UNROLL
      for (int g = 0; g < kHeads; ++g) {
        if (g < heads) z_sum[g] += query_features[g * kFeatures + i] * z;
      }
    }
  }

  // The rows f = warp, warp + kWarps, ... of one column: joined by the key with the first query
  // heads, read again with later ones.
  HW_DEVICE HW_INLINE void update_state(int first, int count, int c, Acc value, Acc (&o)[kHeads]) {
    const int64_t stride = p.kv.stride[2];
    Acc* state = p.kv.at(b, h, first, c);
    for (int f0 = dev::warp(); f0 < count; f0 += kBatch * kWarps) {
      Acc s[kBatch];
      HW_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const int f = f0 + i * kWarps;
        s[i] = f < count ? state[f * stride] : Acc(0);
      }
      HW_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const int f = f0 + i * kWarps;
        if (f >= count) continue;
        if (first_head == 0) {
          s[i] += key_features[f] * value;
          state[f * stride] = s[i];
        }
        HW_UNROLL
        for (int g = 0; g < kHeads; ++g) {
          if (g < heads) o[g] += query_features[g * kFeatures + f] * s[i];
        }
      }
    }
  }

  HW_DEVICE HW_INLINE void store_sums(const Acc (&o)[kHeads]) {
    dev::sync_block();  // the sums of the columns before have been read
    HW_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      sums[(dev::warp() * kHeads + g) * dev::kWarp + dev::lane()] = o[g];
    }
  }

  HW_DEVICE HW_INLINE void store_denominators() {
    HW_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      const Acc sum = dev::warp_sum(z_sum[g]);
      if (dev::lane() == 0) denominators[dev::warp() * kHeads + g] = sum;
    }
  }

  // Each warp finishes its share of the query heads.
  HW_DEVICE HW_INLINE void finish(int c) {
    for (int g = dev::warp(); g < heads; g += kWarps) {
      Acc o = 0, z = p.eps;
      for (int w = 0; w < kWarps; ++w) {
        o += sums[(w * kHeads + g) * dev::kWarp + dev::lane()];
        z += denominators[w * kHeads + g];
      }
      if (p.normalize) o = z == Acc(0) ? Acc(0) : o / z;
      p.o(b, h * p.group + first_head + g, c) = Element(o);
    }
  }

  const Params& p;
  int split, h, first_head, heads;
  int64_t b;
  Acc* key_features;    // [kFeatures]
  Acc* query_features;  // [kHeads][kFeatures]
  Acc* sums;            // [kWarps][kHeads][32]
  Acc* denominators;    // [kWarps][kHeads]
  Acc z_sum[kHeads];
};

// z[f] += m_f(k), behind a StepKernel that only read it. A thread per feature.
template <class Element>
struct StepZKernel {
  using Acc = Accum<Element>;
  using Params = typename StepKernel<Element>::Params;
  static constexpr int kThreads = 128;

  static int64_t blocks_per_head(const Params& p) {
    return ceil_div<int64_t>(p.features, kThreads);
  }

  HW_DEVICE static void main(const Params& p) {
    const int per_head = ceil_div(p.features, kThreads);
    const int index = dev::block_index_x(), f = index % per_head * kThreads + dev::thread_index();
    const int h = index / per_head % p.key_heads;
    const int64_t b = index / per_head / p.key_heads;
    if (f >= p.features) return;
    const auto x = [&](int a) { return pre_map(p.map, static_cast<Acc>(p.k(b, h, a))); };
    Acc m;
    if (p.map == FeatureMap::taylor2) {
      const FeaturePair pair = feature_pair(p.map, p.dim, 255, f);
      m = (pair.a == 255 ? Acc(1) : x(pair.a)) * (pair.b == 255 ? Acc(1) : x(pair.b));
    } else {
      m = x(f);
    }
    p.z(b, h, f) += m;
  }
};

template <class Element>
void step(const StepParams& s, const Call& call) {
  using Acc = Accum<Element>;
  typename StepKernel<Element>::Params p{};
  p.q = s.q.template as<const Element>();
  p.k = s.k.template as<const Element>();
  p.v = s.v.template as<const Element>();
  p.kv = s.kv.template as<Acc>();
  p.z = s.z.template as<Acc>();
  p.o = s.o.template as<Element>();
  p.map = s.map;
  p.normalize = s.normalize;
  p.scale = static_cast<Acc>(s.scale);
  p.eps = static_cast<Acc>(s.eps);
  p.key_heads = s.key_heads();
  p.group = s.group();
  p.dim = s.dim();
  p.value_dim = s.value_dim();
  p.features = s.features();

  // Several blocks per key head pay for the second launch only if each has real work.
  const int64_t heads = s.batch() * s.key_heads();
  const int64_t state_bytes = int64_t{p.features} * p.value_dim * static_cast<int>(sizeof(Acc));
  const bool split = heads * 2 <= call.context.multiprocessors && p.value_dim > kSplitColumns &&
                     (!p.normalize || state_bytes > 64 * 1024);
  p.columns = split ? kSplitColumns : max_of(p.value_dim, 1);
  p.splits = split ? ceil_div(p.value_dim, kSplitColumns) : 1;
  p.updates_z = !split || !p.normalize;
  constexpr int bytes = StepKernel<Element>::kShared * static_cast<int>(sizeof(Acc));
  launch<StepKernel<Element>>({heads * p.splits, 1, 1}, bytes, call.context, p);
  if (p.updates_z || !p.z) return;
  launch<StepZKernel<Element>>({heads * StepZKernel<Element>::blocks_per_head(p), 1, 1}, 0,
                               call.context, p);
}

}  // namespace hw::linear_attention::simt
