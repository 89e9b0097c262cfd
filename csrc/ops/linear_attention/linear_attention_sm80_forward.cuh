// SPDX-License-Identifier: Apache-2.0
// Linear attention on tensor cores: totals of segments, and the loop that applies the weights,
//
//   y_i = sum_j w(s_ij) x_j  [/ z_i]          s_ij = scale <a_i, b_j>
//
// which is the forward pass (over keys) and the gradient of v (over queries). A block owns kDim
// columns of one segment and head. Its warps share the slots of the state for the sums
// (_sm80_state.cuh) and the rows of a chunk for the reads, 16 rows x 64 columns each, so that the
// features of a row and its scores are computed once (by two warps with 128 columns):
//
//   state            S^T [64, 160] += x^T [64, 64] Phi(b) [64, 160]    accumulators of all warps
//   published        c S, rounded, in shared memory in the order of operands: 16 bytes of a lane
//   earlier chunks   Phi(a) [16, 160]  S [160, 64]          A from a tile by ldmatrix and products,
//                                                           B as it was published
//   this chunk       w(a b^T) [16, 64] x [64, 64]           scores as in flash attention
//   denominator      n in its accumulators; B of  Phi(a) n  is n split into three parts, so z has
//                    fp32 accuracy with respect to n, and the rounding of Phi(a) and of w cancels
//                    in the quotient: where v is constant, o is that constant
//
// Rounding: S is rounded once per chunk for the read (never what is accumulated), Phi(a), Phi(b)
// and w once per element. One rounding of S costs what one rounding of o costs, because the 153
// terms err independently; only the constant feature, which grows with the number of keys, is read
// in two parts (_sm80_tile.cuh).
//
// Per block: 2 stages of tiles by cp.async, two barriers a chunk (f16: four, because the published
// state comes in two halves). Traffic per token and head:
// 2 (16 + 16 + Dv + Dv) bytes in this loop and 2 (16 + Dv) in the totals, of which there are none
// where sequences and heads fill the device alone.
#pragma once

#include "ops/linear_attention/linear_attention_sm80_loop.cuh"

namespace hw::linear_attention::sm80 {

template <class Element, int kDim, bool kQueries>
struct ApplyKernel {
  using Params = LoopParams<Element>;
  using Stream = Chunks<Element, kDim, Loop::apply, kQueries>;
  using P = Pairs<Element>;
  static constexpr int kWarps = Stream::kWarps, kThreads = Stream::kThreads;
  static constexpr int kMinBlocks = kDim == 64 ? 2 : 1;

  static constexpr int kStripWarps = kWarps / kStrips;  // warps that share the rows of a strip
  static constexpr int kGroups = kWarps / kStripWarps;  // of 16 columns, of a warp's rows
  // Blocks of slots that are published together; tf32 operands are twice as wide.
  static constexpr int kPasses = std::is_same_v<Element, bf16> ? 1 : 2;
  static constexpr int kPublished = kBlocks / kPasses;

  // c S of 16 slots and 16 columns as B, [columns 8 j .. 8 j + 7][slots 2t, 2t+1 | + 8].
  struct Operand {
    Pair<Element> b[2][2];
  };
  // The same of a warp, 16 bytes of each lane side by side.
  struct Published {
    static constexpr int kVectors = sizeof(Operand) / 16;
    struct alignas(16) Sixteen {
      uint32_t word[4];
    } at[kVectors][dev::kWarp];
  };

  struct Smem {
    static constexpr int kPieces = 8, kPitch = kSlots / 2 + 4;
    ChunkSmem<Element, kDim, Loop::apply, kQueries> chunks;
    Published s[kPublished][kWarps];
    If<!kQueries, Pair<Element>[kPieces][kPitch]> n;  // c n in parts 0 .. 2; other rows are zero
  };
  static_assert(kWarps % kStrips == 0, "every strip has the same number of warps");
  static_assert(kBlocks % kPasses == 0, "passes are alike");
  static_assert(sizeof(Smem) <= kSharedLimit && sizeof(Smem) * kMinBlocks <= kWideSharedLimit,
                "shared memory of every architecture from sm_80 on; of sm_80");

  struct Block {
    const Params& p;
    Smem& smem;
    Stream stream;
    int strip, column;  // the warp's rows of a chunk and its first column within the block
    State<Element> state;
    float y[kGroups][2][4];  // tokens of the strip x columns 16 i + 8 j .. + 7 of the warp
    float z[4];              // the strip's row sums, spread over the columns

    HW_DEVICE Block(const Params& params, Smem& s, int first)
        : p(params),
          smem(s),
          stream{params, s.chunks, s.chunks.walk, first},
          strip(dev::warp() % kStrips),
          column(dev::warp() / kStrips * kGroups * 16) {}

    HW_DEVICE HW_INLINE void clear() {
      HW_UNROLL
      for (int group = 0; group < kGroups; ++group)
        for (int j = 0; j < 2; ++j)
          for (int i = 0; i < 4; ++i) y[group][j][i] = 0.0f;
      for (int i = 0; i < 4; ++i) z[i] = 0.0f;
    }

    // c S of the blocks of a pass, and with the first c n, for all warps.
    template <int kPass>
    HW_DEVICE HW_INLINE void publish() {
      HW_UNROLL
      for (int k = 0; k < state.kOwn; ++k) {
        const int r = state.block(k);
        if (!state.has(k) || r / kPublished != kPass) continue;
        HW_UNROLL
        for (int group = 0; group < state.kGroups; ++group) {
          Operand operand;
          state_operand(operand.b, k, group);
          Published& to = smem.s[r % kPublished][state.column() / 16 + group];
          HW_UNROLL
          for (int i = 0; i < Published::kVectors; ++i)
            memcpy(&to.at[i][dev::lane()], reinterpret_cast<const char*>(&operand) + 16 * i, 16);
        }
      }
      if constexpr (!kQueries && kPass == 0) publish_sums();
    }

    // y += Phi(a) S,  z += Phi(a) n, of what is published; the first pass is.
    HW_DEVICE HW_INLINE void read_state() {
      uint32_t word[4];
      Pair<Element> own[4];
      tokens_by_columns(word, smem.chunks.a, strip, 0);
      for (int i = 0; i < 4; ++i) own[i] = P::exact(word[i]);
      read_pass<0>(own);
      if constexpr (kPasses > 1) {
        dev::sync_block();
        publish<1>();
        dev::sync_block();
        read_pass<1>(own);
      }
    }

    // Features are made once: of a strip by its warp, which has all columns (of 64) of its rows.
    template <int kPass>
    HW_DEVICE HW_INLINE void read_pass(const Pair<Element> own[4]) {
      const int g = dev::lane() / 4, t = dev::lane() % 4;
      for_each_block([&](auto block) {
        constexpr int r = block;
        if constexpr (r / kPublished == kPass) {
          Pair<Element> phi[4];
          features_of_tokens<Element, r>(phi, own, smem.chunks.a, strip);
          HW_UNROLL
          for (int group = 0; group < kGroups; ++group) {
            Operand s;
            const Published& from = smem.s[r % kPublished][column / 16 + group];
            HW_UNROLL
            for (int i = 0; i < Published::kVectors; ++i)
              memcpy(reinterpret_cast<char*>(&s) + 16 * i, &from.at[i][dev::lane()], 16);
            P::mma(y[group][0], phi, s.b[0]);
            P::mma(y[group][1], phi, s.b[1]);
          }
          if constexpr (!kQueries) {
            const Pair<Element> n[2] = {smem.n[g][8 * r + t], smem.n[g][8 * r + 4 + t]};
            P::mma(z, phi, n);
          }
        }
      });
    }

    // c S of 16 columns of the warp's block k as B: (slots 2t, 2t+1 | + 8; column 8 j + g).
    HW_DEVICE HW_INLINE void state_operand(Pair<Element> b[2][2], int k, int group) {
      const Coefficients c = coefficients(p.scale);
      const bool products = state.block(k) == kProducts;
      const float low = c.at(state.block(k), 0), high = c.at(state.block(k), 1);
      HW_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float* s0 = &state.s[k][group][0][2 * j];
        const float* s1 = &state.s[k][group][1][2 * j];
        const float rest = s1[0] - P::widen(P::round(s1[0], 0.0f)).lo;
        b[j][0] = P::round(s0[0] * low, s0[1] * low);
        b[j][1] = P::round(s1[0] * high, products ? rest : s1[1] * high);
      }
    }

    // y += w(a b^T) x and z += its row sums, over the keys of the item that each row sees.
    HW_DEVICE HW_INLINE void read_chunk(Item item) {
      const auto& s = stream.stage(item);
      const int count = stream.walk.count(item.chunk);
      const bool diagonal = p.causal && stream.walk.diagonal(item);
      uint32_t a[4];
      tokens_by_columns(a, smem.chunks.a, strip, 0);
      HW_UNROLL_BY(1)
      for (int keys = 0; keys * kRows < count && (keys <= strip || !diagonal); ++keys) {
        uint32_t b[4];
        keys_of_scores(b, smem.chunks.b, keys);
        float w[2][4];
        weights(w, a, b);
        if (diagonal && keys == strip) mask(w, [](int row, int key) { return key <= row; });
        if (count < (keys + 1) * kRows)
          mask(w, [=](int, int key) { return keys * kRows + key < count; });
        if constexpr (kQueries) scale_columns(w, s.scalars.factor + keys * kRows);
        Pair<Element> operand[4];
        for (int i = 0; i < 4; ++i)
          operand[i] = P::round(w[i / 2][i % 2 * 2], w[i / 2][i % 2 * 2 + 1]);
        HW_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          uint32_t word[4];
          Pair<Element> x[4];
          tokens_of_values(word, s.x, keys, column + 16 * group);
          for (int i = 0; i < 4; ++i) x[i] = P::exact(word[i]);
          P::mma(y[group][0], operand, x);
          P::mma(y[group][1], operand, x + 2);
        }
        if constexpr (!kQueries) add_row_sums(operand);
      }
    }

    // w of 16 rows and 16 keys: w[h] rows x keys 8 h .. 8 h + 7.
    HW_DEVICE HW_INLINE void weights(float w[2][4], const uint32_t a[4], const uint32_t b[4]) {
      HW_UNROLL
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 4; ++i) w[h][i] = 0.0f;
        dev::mma_16x8x16<Element>(w[h], a, b + 2 * h);
        for (int i = 0; i < 4; ++i) w[h][i] = weight(FeatureMap::taylor2, w[h][i] * p.scale);
      }
    }

    // Zeros where a row does not see a key.
    template <class Sees>
    HW_DEVICE HW_INLINE void mask(float w[2][4], Sees sees) {
      const int g = dev::lane() / 4, t = dev::lane() % 4;
      HW_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int row = g + (i & 2) * 4, key = i / 4 * 8 + 2 * t + (i & 1);
        if (!sees(row, key)) w[i / 4][i % 4] = 0.0f;
      }
    }

    HW_DEVICE HW_INLINE void scale_columns(float w[2][4], const float* factor) {
      HW_UNROLL
      for (int i = 0; i < 8; ++i) {
        w[i / 4][i % 4] *= factor[i / 4 * 8 + 2 * (dev::lane() % 4) + (i & 1)];
      }
    }

    HW_DEVICE HW_INLINE void add_row_sums(const Pair<Element> w[4]) {
      const float one = dev::lane() / 4 == 0 ? 1.0f : 0.0f;
      const Pair<Element> ones[2] = {P::round(one, one), P::round(one, one)};
      P::mma(z, w, ones);
    }

    // 1 / z of row g + 8 i of the strip.
    HW_DEVICE HW_INLINE float inverse(int i, int64_t token, bool stored) {
      const float sum = dev::warp_sum<4>(z[2 * i] + z[2 * i + 1]) + p.eps;
      if (p.z && stored && column == 0 && stream.first == 0 && dev::lane() % 4 == 0)
        p.z(stream.walk.segment.batch, token, stream.walk.head) = sum;
      return sum == 0.0f ? 0.0f : 1.0f / sum;
    }

    HW_DEVICE HW_INLINE void store(int chunk) {
      const int g = dev::lane() / 4, t = dev::lane() % 4, count = stream.walk.count(chunk);
      HW_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = strip * kRows + g + 8 * i;
        const int64_t token = stream.walk.token(chunk, row);
        float factor = 1.0f;
        if constexpr (!kQueries) {
          const float inverse_z = inverse(i, token, row < count);
          if (p.normalize) factor = inverse_z;
        }
        if (row >= count) continue;
        const Ref<Element, 1> to =
            p.y.slice(stream.walk.segment.batch).slice(token).slice(stream.walk.head);
        HW_UNROLL
        for (int k = 0; k < 2 * kGroups; ++k) {
          const float* value = &y[k / 2][k % 2][2 * i];
          store_pair(to, stream.first + column + 8 * k + 2 * t, p.y_paired, value[0] * factor,
                     value[1] * factor);
        }
      }
    }

    // c n in three parts: B of  Phi(a) n.
    HW_DEVICE HW_INLINE void publish_sums() {
      if (state.column() != 0) return;
      const int g = dev::lane() / 4, t = dev::lane() % 4;
      HW_UNROLL
      for (int k = 0; k < state.kOwn; ++k) {
        const int r = state.block(k);
        if (!state.has(k)) return;
        HW_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float* n = &state.n[k][2 * h];
          float here = (n[0] + n[1]) * coefficients(p.scale).at(r, h);
          if (r == kProducts && h == 1 && g != 0) here = 0.0f;
          float next = dev::shuffle_down(here, 4);
          if (t != 0 || g % 2 != 0) continue;
          HW_UNROLL
          for (int part = 0; part < 3; ++part) {
            const Pair<Element> rounded = P::round(here, next);
            smem.n[part][8 * r + 4 * h + g / 2] = rounded;
            here -= P::widen(rounded).lo;
            next -= P::widen(rounded).hi;
          }
        }
      }
    }

    HW_DEVICE HW_INLINE void start() {
      const int64_t index = state_index(p, stream.walk.segment, dev::block_index_x());
      smem.chunks.features.template fill<kThreads>(p.dim());
      dev::sync_block();
      state.template load<true>(p.before, index, stream.walk.state_head, stream.first,
                                smem.chunks.features, factors_in(p.scale, kQueries));
      if constexpr (!kQueries) {
        for (int i = dev::thread_index(); i < Smem::kPieces * Smem::kPitch; i += kThreads)
          smem.n[i / Smem::kPitch][i % Smem::kPitch] = P::zero();
      }
    }

    // The final state; of the query heads that share a key head the first one stores it.
    HW_DEVICE HW_INLINE void finish() {
      if (!kQueries && stream.walk.head % p.group != 0) return;
      state.template store<true>(p.after, stream.walk.segment.sequence, stream.walk.state_head,
                                 stream.first, smem.chunks.features,
                                 factors_out(p.scale, kQueries));
    }
  };

  HW_DEVICE static void main(const Params& p) {
    Smem& smem = *dev::shared<Smem>();
    if (!find_chunks<kQueries>(smem.chunks.walk, p, p.group)) return;
    Block block(p, smem, dev::block_index_z() * kDim);
    const Stream& stream = block.stream;
    // Asked anew for every chunk: registers are short.
    const auto reads_start = [&] { return p.before.kv || p.before.z; };
    const auto stores_end = [&] { return p.after.kv || p.after.z; };
    const auto adds = [&] { return p.causal && !stream.walk.direct; };
    stream.prefetch(Item{});
    block.start();
    for (Item item; stream.walk.has(item); item = stream.walk.next(item)) {
      const Item next = stream.walk.next(item);
      const bool last = stream.walk.last_of_rows(item);
      stream.await();
      stream.prefetch(next);
      const bool reads = stream.walk.first_of_rows(item) && !stream.walk.direct &&
                         (item.chunk > 0 || reads_start());
      if (reads) block.template publish<0>();
      stream.turn(item);
      if (stream.walk.first_of_rows(item)) block.clear();
      if (reads) block.read_state();
      if (stream.needs_keys()) block.read_chunk(item);
      if (last) block.store(stream.walk.row_chunk(item));
      if (adds() && (stream.walk.has(next) || stores_end())) {
        stream.template add<true>(block.state, item);
      }
    }
    if (adds()) block.finish();
  }
};

// Phase (a): the state of a segment's own keys (queries), stored in its slot.
template <class Element, int kDim, bool kQueries>
struct TotalsKernel {
  using Params = LoopParams<Element>;
  using Stream = Chunks<Element, kDim, Loop::totals, kQueries>;
  using Smem = ChunkSmem<Element, kDim, Loop::totals, kQueries>;
  static constexpr int kWarps = Stream::kWarps, kThreads = Stream::kThreads;
  // tf32 operands are twice as wide.
  static constexpr int kMinBlocks = kDim > 64 ? 1 : std::is_same_v<Element, bf16> ? 3 : 2;

  HW_DEVICE static void main(const Params& p) {
    Smem& smem = *dev::shared<Smem>();
    const ChunkRange& walk = smem.walk;
    // Blocks are per key head: a walk over keys of one head, or over the queries of its group.
    if (!find_chunks<kQueries>(smem.walk, p, kQueries ? p.group : 1)) return;
    const Stream stream{p, smem, walk, dev::block_index_z() * kDim};
    State<Element> state;
    state.clear();
    stream.prefetch(Item{});
    smem.features.template fill<kThreads>(p.dim());
    dev::sync_block();
    for (Item item; walk.has(item); item = walk.next(item)) {
      stream.await();
      stream.prefetch(walk.next(item));
      stream.turn(item);
      stream.template add<true>(state, item);
    }
    state.template store<true>(p.after, dev::block_index_x(), walk.state_head, stream.first,
                               smem.features, factors_out(p.scale, kQueries));
  }
};

}  // namespace hw::linear_attention::sm80
