// SPDX-License-Identifier: Apache-2.0
// Linear attention on tensor cores: the loop that differentiates the scores,
//
//   y_i = scale sum_j (<u_i, x_j> + dz) w'(s_ij) b_j
//
//   over keys      y = dq   u = do, x = v    (<do_i, v_j> + delta_i) / z_i, the division at the end
//   over queries   y = dk   u = v,  x = do   (<v_i, do_j> + delta_j) / z_j
// with delta = -<do, o> of the query, and dz = delta / z. (dv is ApplyKernel over queries.)
//
// A block owns all columns of v and one segment of one head. Its warps share the slots of 64
// columns (_sm80_state.cuh) with the slots as rows, because now the columns of v are summed over:
//
//   earlier chunks   D [64, 16] = U [64, 64] S^T [64, 16] (+ n delta), of the slots of a block r,
//                    is the gradient of 16 features of a; it is chained to a in registers, for the
//                    products x_c x_{c + r}:
//                      y_c += D_c x_{c + r}           elementwise with the rotated fragment
//                      y_{c + r} += D_c x_c           a product with the permutation c -> c + r,
//                                                     which an mma does without leaving the warp
//   this chunk       ((U X^T + delta) w'(s)) b        strips of 16 rows, one per warp
//   state            S [160, 64] += Phi(b)^T [160, 64] x [64, 64]
//   sum over warps   [64, 16] each, through shared memory, in the order of the warps
//
// More than kDim columns are done
// in slices, one launch after another, that add to sums in the workspace. Traffic per token and
// head: 2 (3 16 + 2 Dv) bytes each for dq and dk, 2 (2 16 + 2 Dv) for dv.
#pragma once

#include "ops/linear_attention/linear_attention_sm80_loop.cuh"

namespace hw::linear_attention::sm80 {

// factor = 1 / z (0 where z is) and delta = -<do, o> of every query. 8 lanes per row.
template <class Element>
struct RowsKernel {
  struct Params {
    Input<Element> o, d_o;  // [B, S, Hq, Dv]
    Ref<const float, 3> z;  // [B, S, Hq]
    float *factor, *delta;  // [B, S, Hq] out
    int64_t rows;
  };
  static constexpr int kLanes = 8, kThreads = 256, kRowsOfBlock = kThreads / kLanes;

  HW_DEVICE static void main(const Params& p) {
    const int64_t row =
        static_cast<int64_t>(dev::block_index_x()) * kRowsOfBlock + dev::thread_index() / kLanes;
    const int64_t at = min_of(row, p.rows - 1), heads = p.z.size[2], tokens = p.z.size[1];
    const int64_t h = at % heads, s = at / heads % tokens, b = at / heads / tokens;
    const Ref<const Element, 1> o = p.o.ref.slice(b).slice(s).slice(h);
    const Ref<const Element, 1> d_o = p.d_o.ref.slice(b).slice(s).slice(h);
    const bool aligned = p.o.aligned && p.d_o.aligned;
    const int64_t columns = o.size[0];
    float sum = 0.0f;
    for (int64_t c = dev::lane() % kLanes * 8; c < columns; c += kLanes * 8) {
      if (aligned && c + 8 <= columns) {
        sum += dot8(o.at(c), d_o.at(c));
      } else {
        for (int64_t e = c; e < min_of(c + 8, columns); ++e)
          sum += static_cast<float>(o(e)) * static_cast<float>(d_o(e));
      }
    }
    sum = dev::warp_sum<kLanes>(sum);
    if (dev::lane() % kLanes != 0 || row >= p.rows) return;
    const float z = p.z(b, s, h);
    p.factor[row] = z == 0.0f ? 0.0f : 1.0f / z;
    p.delta[row] = -sum;
  }

  struct alignas(16) Eight {
    uint32_t word[4];
  };
  HW_DEVICE static HW_INLINE float dot8(const Element* x, const Element* y) {
    Eight a, b;
    memcpy(&a, __builtin_assume_aligned(x, sizeof(Eight)), sizeof(Eight));
    memcpy(&b, __builtin_assume_aligned(y, sizeof(Eight)), sizeof(Eight));
    float sum = 0.0f;
    HW_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Two u = dev::unpack<Element>(a.word[i]), v = dev::unpack<Element>(b.word[i]);
      sum += u.lo * v.lo + u.hi * v.hi;
    }
    return sum;
  }
};

template <class Element, int kDim, bool kQueries>
struct GradientKernel {
  using Params = LoopParams<Element>;
  using Stream = Chunks<Element, kDim, Loop::gradient, kQueries>;
  using P = Pairs<Element>;
  static constexpr int kWarps = Stream::kWarps, kThreads = Stream::kThreads;
  static constexpr int kMinBlocks = kDim == 64 ? 2 : 1;
  static constexpr int kStripWarps = kWarps / kStrips;  // warps that share the columns of a strip
  // Strips that read the state together; one rounding of the state serves them. tf32 operands are
  // twice as wide and leave registers for two.
  static constexpr int kTogether = std::is_same_v<Element, bf16> ? 4 : 2;

  struct Smem {
    static constexpr int kPitch = kPadded + 4;
    ChunkSmem<Element, kDim, Loop::gradient, kQueries> chunks;
    float n[kSlots];  // c n
    Coefficients c;
    alignas(16) float y[kWarps][kTile][kPitch];  // each warp's part of y
  };
  static_assert(kWarps % kStrips == 0, "every strip has the same number of warps");
  static_assert(sizeof(Smem) <= (kDim == kLeastTile ? kSharedLimit : kWideSharedLimit) &&
                    sizeof(Smem) * kMinBlocks <= kWideSharedLimit,
                "shared memory of every architecture from sm_80 on, or of sm_80");

  struct Block {
    const Params& p;
    Smem& smem;
    Stream stream;
    Coefficients c;
    int strip, part;
    State<Element> state;
    float chunk_y[2][4];  // this chunk's part of strip `strip`, columns 0 .. 7 and 8 .. 15

    HW_DEVICE Block(const Params& params, Smem& s)
        : p(params),
          smem(s),
          stream{params, s.chunks, s.chunks.walk, params.first},
          c(coefficients(params.scale)),
          strip(dev::warp() % kStrips),
          part(dev::warp() / kStrips) {}

    HW_DEVICE HW_INLINE void start() {
      const int64_t index = state_index(p, stream.walk.segment, dev::block_index_x());
      smem.chunks.features.template fill<kThreads>(p.dim());
      dev::sync_block();
      state.template load<false>(p.before, index, stream.walk.state_head, p.first,
                                 smem.chunks.features, factors_in(p.scale, kQueries));
      publish_sums();
      if (dev::thread_index() == 0) smem.c = c;
    }

    HW_DEVICE HW_INLINE void publish_sums() {
      if (part != 0) return;
      state.visit_sums(c, [&](float& upper, float& lower, int slot, float coefficient) {
        if (dev::lane() % 4 == 0) smem.n[slot] = (upper + lower) * coefficient;
      });
    }

    // Parts of y from earlier chunks, into shared memory.
    template <class S>
    HW_DEVICE HW_INLINE void read_state(const S& s, bool empty) {
      for (int i = 0; i < 8; ++i) chunk_y[i / 4][i % 4] = 0.0f;
      HW_UNROLL_BY(1)
      for (int strips = 0; strips < kStrips; strips += kTogether) {
        float y[kTogether][2][4];
        HW_UNROLL
        for (int i = 0; i < kTogether * 8; ++i) y[i / 8][i / 4 % 2][i % 4] = 0.0f;
        if (!empty) read_strips(y, s, strips);
        HW_UNROLL
        for (int i = 0; i < kTogether; ++i) store_part(y[i], strips + i);
      }
    }

    template <class S>
    HW_DEVICE HW_INLINE void read_strips(float y[kTogether][2][4], const S& s, int first_strip) {
      // Read anew: with c in registers the compiler would round the state once for all strips, and
      // keep the rounded one in registers.
      const Coefficients factors = smem.c;
      HW_UNROLL
      for (int k = 0; k < state.kOwn; ++k) {
        if (!state.has(k)) continue;
        Pair<Element> operand[state.kGroups][2][2], turn[2];
        state_operand(operand, k, factors);
        permutation(turn, state.block(k));
        float n[4];
        load_sums(n, k);
        HW_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          float d[2][4];
          uint32_t mine[4], other[4];
          feature_gradient(d, s, operand, n, first_strip + i);
          factors_of(mine, other, k, first_strip + i);
          chain(y[i], d, mine, other, turn);
        }
      }
    }

    // c S of the warp's block k as B: [16 columns][h] = (columns 2t, 2t+1 | + 8; slot 8 h + g).
    HW_DEVICE HW_INLINE void state_operand(Pair<Element> s[][2][2], int k,
                                           const Coefficients& factors) {
      HW_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float factor = factors.at(state.block(k), h);
        HW_UNROLL
        for (int i = 0; i < state.kGroups * 2; ++i) {
          const float* tile = &state.s[k][i / 2][i % 2][2 * h];
          s[i / 2][h][i % 2] = P::round(tile[0] * factor, tile[1] * factor);
        }
      }
    }

    // The permutation c -> c + r as B: of columns 0 .. 7; those of columns 8 .. 15 are swapped.
    HW_DEVICE HW_INLINE void permutation(Pair<Element> turn[2], int r) {
      const int source = (dev::lane() / 4 - r + 16) % 16 - 2 * (dev::lane() % 4);
      HW_UNROLL
      for (int i = 0; i < 2; ++i)
        turn[i] = P::round(source == 8 * i ? 1.0f : 0.0f, source == 8 * i + 1 ? 1.0f : 0.0f);
    }

    // n of slots 2t, 2t+1 | + 8 of the warp's block k. It takes part once, in the first columns.
    HW_DEVICE HW_INLINE void load_sums(float n[4], int k) {
      const bool first = part == 0 && p.first == 0;
      const float* from = smem.n + 16 * state.block(k) + 2 * (dev::lane() % 4);
      HW_UNROLL
      for (int i = 0; i < 4; ++i) n[i] = first ? from[(i & 2) * 4 + (i & 1)] : 0.0f;
    }

    // d = u S^T + e n: the gradient of the features of a block of slots, of one strip; e = delta,
    // over queries 1.
    template <class S>
    HW_DEVICE HW_INLINE void feature_gradient(float d[2][4], const S& stage,
                                              const Pair<Element> s[][2][2], const float n[4],
                                              int i) {
      const float* delta = stage.scalars.delta + i * kRows + dev::lane() / 4;
      const float low = kQueries ? 1.0f : delta[0], high = kQueries ? 1.0f : delta[8];
      HW_UNROLL
      for (int e = 0; e < 8; ++e) d[e / 4][e % 4] = n[e / 4 * 2 + (e & 1)] * (e & 2 ? high : low);
      HW_UNROLL
      for (int group = 0; group < state.kGroups; ++group) {
        uint32_t word[4];
        Pair<Element> a[4];
        tokens_by_values(word, stage.u, i, state.column() + 16 * group);
        for (int e = 0; e < 4; ++e) a[e] = P::exact(word[e]);
        P::mma(d[0], a, s[group][0]);
        P::mma(d[1], a, s[group][1]);
      }
    }

    // The two columns of a whose product a slot of the warp's block k is: x_c and x_{c + r}. Of the
    // linear block 0 and 1, of the constants 0 and 0.
    HW_DEVICE HW_INLINE void factors_of(uint32_t mine[4], uint32_t other[4], int k, int i) {
      tokens_by_columns(mine, smem.chunks.a, i, 0);
      if (k < state.kOwn - 1) {
        tokens_by_columns(other, smem.chunks.a, i, state.block(k));
        return;
      }
      const bool products = state.block(k) == kProducts;
      const uint32_t ones = dev::pack<Element>(1.0f, 1.0f);
      HW_UNROLL
      for (int e = 0; e < 2; ++e) {
        other[e] = products ? mine[e + 2] : ones;
        other[e + 2] = products ? 0 : ones;
        mine[e] = products ? mine[e] : 0;
        mine[e + 2] = 0;
      }
    }

    // y += d chained through a block: y_c += d_c other_c, y_{c + r} += d_c mine_c. A square thus
    // counts twice.
    HW_DEVICE HW_INLINE void chain(float y[2][4], const float d[2][4], const uint32_t mine[4],
                                   const uint32_t other[4], const Pair<Element> turn[2]) {
      Pair<Element> moved[4];
      HW_UNROLL
      for (int k = 0; k < 4; ++k) {  // word k: half k / 2, row g + 8 (k mod 2)
        const float *from = &d[k / 2][k % 2 * 2], lo = from[0], hi = from[1];
        const Two x = dev::unpack<Element>(other[k]), z = dev::unpack<Element>(mine[k]);
        y[k / 2][k % 2 * 2] += lo * x.lo;
        y[k / 2][k % 2 * 2 + 1] += hi * x.hi;
        moved[k] = P::round(lo * z.lo, hi * z.hi);
      }
      const Pair<Element> swapped[2] = {turn[1], turn[0]};
      P::mma(y[0], moved, turn);
      P::mma(y[1], moved, swapped);
    }

    HW_DEVICE HW_INLINE void store_part(const float y[2][4], int i) {
      const int g = dev::lane() / 4, t = dev::lane() % 4;
      HW_UNROLL
      for (int k = 0; k < 8; ++k)
        smem.y[dev::warp()][i * kRows + g + (k & 2) * 4][k / 4 * 8 + 2 * t + (k & 1)] =
            y[k / 4][k % 4];
    }

    // chunk_y += ((U X^T + dz) w'(s)) b over the keys of this item, for the warp's strip and its
    // part of the columns.
    HW_DEVICE HW_INLINE void read_chunk(Item item) {
      const auto& s = stream.stage(item);
      const int count = stream.walk.count(item.chunk);
      const bool diagonal = p.causal && stream.walk.diagonal(item);
      uint32_t a[4];
      tokens_by_columns(a, smem.chunks.a, strip, 0);
      HW_UNROLL_BY(1)
      for (int keys = 0; keys * kRows < count && (keys <= strip || !diagonal); ++keys) {
        float ds[2][4];
        score_gradients(ds, s, a, keys, diagonal ? strip * kRows : kTile);
        uint32_t word[4];
        tokens_of_columns(word, smem.chunks.b, keys);
        const Pair<Element> left[2] = {P::exact(word[0]), P::exact(word[1])};
        const Pair<Element> right[2] = {P::exact(word[2]), P::exact(word[3])};
        Pair<Element> operand[4];
        for (int k = 0; k < 4; ++k)
          operand[k] = P::round(ds[k / 2][k % 2 * 2], ds[k / 2][k % 2 * 2 + 1]);
        P::mma(chunk_y[0], operand, left);
        P::mma(chunk_y[1], operand, right);
      }
    }

    // ds[h]: rows of the strip x keys 8 h .. 8 h + 7 of strip `keys`. Row i sees the keys
    // <= seen + i. (Keys beyond the sequence are zeros: they add nothing.)
    template <class S>
    HW_DEVICE HW_INLINE void score_gradients(float ds[2][4], const S& s, const uint32_t a[4],
                                             int keys, int seen) {
      const int g = dev::lane() / 4, t = dev::lane() % 4;
      uint32_t b[4];
      keys_of_scores(b, smem.chunks.b, keys);
      float score[2][4];
      for (int k = 0; k < 8; ++k) ds[k / 4][k % 4] = score[k / 4][k % 4] = 0.0f;
      for (int h = 0; h < 2; ++h) dev::mma_16x8x16<Element>(score[h], a, b + 2 * h);
      HW_UNROLL
      for (int columns = 0; columns < kDim / kStripWarps; columns += 16) {
        uint32_t u[4], x[4];
        tokens_by_values(u, s.u, strip, part * (kDim / kStripWarps) + columns);
        keys_by_values(x, s.x, keys, part * (kDim / kStripWarps) + columns);
        for (int h = 0; h < 2; ++h) dev::mma_16x8x16<Element>(ds[h], u, x + 2 * h);
      }
      HW_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int row = g + (k & 2) * 4;
        const int key = keys * kRows + k / 4 * 8 + 2 * t + (k & 1);
        float value = ds[k / 4][k % 4];
        if (part == 0 && p.first == 0)
          value += s.scalars.delta[kQueries ? key : strip * kRows + row];
        if constexpr (kQueries) value *= s.scalars.factor[key];
        value *= p.scale * weight_derivative(FeatureMap::taylor2, score[k / 4][k % 4] * p.scale);
        ds[k / 4][k % 4] = key > seen + row ? 0.0f : value;
      }
    }

    // Adds this chunk's part, sums over the warps and stores the rows.
    HW_DEVICE HW_INLINE void store(Item item) {
      const int g = dev::lane() / 4, t = dev::lane() % 4;
      HW_UNROLL
      for (int k = 0; k < 8; ++k)
        smem.y[dev::warp()][strip * kRows + g + (k & 2) * 4][k / 4 * 8 + 2 * t + (k & 1)] +=
            chunk_y[k / 4][k % 4];
      dev::sync_block();
      const int chunk = stream.walk.row_chunk(item);
      for (int i = dev::thread_index(); i < kTile * kPadded / 2; i += kThreads) {
        const int row = i / (kPadded / 2), at = i % (kPadded / 2) * 2;
        if (row >= stream.walk.count(chunk) || at >= p.dim()) continue;
        float lo = 0.0f, hi = 0.0f;
        HW_UNROLL
        for (int w = 0; w < kWarps; ++w) lo += smem.y[w][row][at], hi += smem.y[w][row][at + 1];
        const float factor = kQueries ? 1.0f : stream.stage(item).scalars.factor[row];
        store_sum(stream.walk.token(chunk, row), at, lo, hi, factor);
      }
    }

    // Columns at, at + 1 of a row of y; with more slices to come, of the sum over slices.
    HW_DEVICE HW_INLINE void store_sum(int64_t token, int at, float lo, float hi, float factor) {
      const int64_t batch = stream.walk.segment.batch;
      const int head = stream.walk.head;
      if (p.sum) {
        float* sum = p.sum.at(batch, token, head, at);
        if (p.first > 0) lo += sum[0], hi += sum[1];
        sum[0] = lo;
        sum[1] = hi;
        if (p.first + kDim < p.x.ref.size[3]) return;
      }
      store_pair(p.y.slice(batch).slice(token).slice(head), at, p.y_paired, lo * factor,
                 hi * factor);
    }
  };

  HW_DEVICE static void main(const Params& p) {
    Smem& smem = *dev::shared<Smem>();
    if (!find_chunks<kQueries>(smem.chunks.walk, p, p.group)) return;
    Block block(p, smem);
    const Stream& stream = block.stream;
    const bool reads_start = p.before.kv || p.before.z;
    stream.prefetch(Item{});
    block.start();
    for (Item item; stream.walk.has(item); item = stream.walk.next(item)) {
      const Item next = stream.walk.next(item);
      const bool last = stream.walk.last_of_rows(item);
      stream.await();
      stream.prefetch(next);
      stream.turn(item);
      if (stream.walk.first_of_rows(item)) {
        block.read_state(stream.stage(item),
                         stream.walk.direct || (item.chunk == 0 && !reads_start));
      }
      if (stream.needs_keys()) block.read_chunk(item);
      if (last) block.store(item);
      if (p.causal && !stream.walk.direct && stream.walk.has(next)) {
        stream.template add<false>(block.state, item);
        if (last) block.publish_sums();  // behind the barrier of store()
      }
    }
  }
};

}  // namespace hw::linear_attention::sm80
