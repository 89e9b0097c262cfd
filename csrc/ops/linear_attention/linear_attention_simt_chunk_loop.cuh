// SPDX-License-Identifier: Apache-2.0
// Linear attention without tensor cores: the walk over chunks that computes o, dq, dk and dv.
//
//   kernel         outer rows    sums over       walks     computes
//   forward        q             k, v    j <= i  forward   apply:  o_i  = sum_j w_ij v_j / z_i
//   grad_queries   q with g, dz  k, v    j <= i  forward   grad:   dq_i = sum_j ds_ij k_j
//   grad_keys      k with v      q, g    i >= j  backward  both:   dv_j = sum_i w_ij g_i,
//                                                                  dk_j = sum_i ds_ij q_i
//   ds_ij = (<y_i, x_j> + dz) w'(s_ij),   y and x the companions (v, or g) of outer and inner rows
// What lies behind the walk is in the state, kv = sum m(b_j) x_j and z = sum m(b_j) (1 or dz):
//   apply adds m(a_i) S,   grad adds sum_f dm_f d m_f / d a_i,  dm_f = <y_i, S_f> + z_f (dz or 1)
// The chunk itself, and in the direct schedule every chunk, is met tile by tile through its scores.
//
// A slice of value columns sees only its part of <y, x>, so dq and dk need all of them: a gradient
// block walks its segment once for each slice, and keeps the sums of the slices before in the
// workspace. A forward block has one slice. dz and z take part in slice 0 only.
//
// Traffic of a block: its rows of q and k (once for each slice), its columns of v and do, a state.
// D = 16, Dv = 64, fp32: forward 37 KB of shared memory, gradients 44 KB; a step of the product
// with the state is 3 shared loads for 10 multiplications and additions of a thread.
#pragma once

#include "ops/linear_attention/linear_attention_simt_state.cuh"

namespace hw::linear_attention::simt {

template <class Element, int kColumns, bool kReverse, bool kApply, bool kGrad>
class ChunkLoop {
 public:
  using Acc = Accum<Element>;

  HW_DEVICE HW_INLINE explicit ChunkLoop(const WalkParams<Element>& params)
      : p(params), g(params.geometry), work(find_work<kGrad>(params)) {}

  HW_DEVICE HW_INLINE void run() {
    if (!work.segment.used) return;
    place_tiles();
    if constexpr (kGrad) {
      for (work.slice = 0; work.slice < g.slices; ++work.slice) {
        dev::sync_block();  // nobody reads the state of the slice before
        walk_slice();
      }
    } else {
      walk_slice();
    }
  }

 private:
  static constexpr int kCount = kColumns / kLanes;      // columns of a thread
  static constexpr int kStride = kColumns + kPad<Acc>;  // of value tiles
  static constexpr bool kOuterQuery = !kReverse, kInnerQuery = kReverse;

  // -- set-up, once and for each slice

  HW_DEVICE HW_INLINE void place_tiles() {
    Acc* shared = dev::shared<Acc>();
    outer = shared + g.shared.outer;
    inner = shared + g.shared.inner;
    values = shared + g.shared.values;
    cotangents = shared + g.shared.cotangents;
    inner_extra = shared + g.shared.inner_extra;
    outer_extra = shared + g.shared.outer_extra;
    weights = shared + g.shared.weights;
    gradient = shared + g.shared.gradient;
    pairs = reinterpret_cast<FeaturePair*>(shared + g.shared.pairs);
    make_pairs(pairs, p.map, g.tile_dim, g.tile_features);
  }

  HW_DEVICE HW_INLINE void walk_slice() {
    prepare_state();
    const int64_t rows = work.segment.end - work.segment.begin;
    const int64_t chunks = ceil_div<int64_t>(rows, kRows);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t chunk = kReverse ? chunks - 1 - i : i;
      walk_chunk(work.segment.begin + chunk * kRows);
    }
    if (g.plan.schedule == Schedule::single && p.causal) {
      dev::sync_block();
      store_final<kColumns>(state, p, work);
    }
  }

  HW_DEVICE HW_INLINE void prepare_state() {
    has_state = g.plan.schedule != Schedule::direct;
    if (!has_state) return;
    const bool with_z = work.slice == 0 || (kApply && !kGrad && p.normalize);
    const bool total = g.plan.has_totals();
    const int64_t slot = total && !p.causal ? work.slot - work.segment.index : work.slot;
    state = place_state<kColumns>(p, work, slot, with_z);
    if (total)
      load_slot<kColumns>(state, p, work, slot);
    else
      load_initial<kColumns>(state, p, work, true);
  }

  // -- one chunk of outer rows

  HW_DEVICE HW_INLINE void walk_chunk(int64_t first) {
    const int heads = kReverse ? 1 : work.queries;
    for (int i = 0; i < heads; ++i) {
      outer_rows = {work.segment.batch, first, work.segment.end,
                    kReverse ? work.key_head : work.first_query + i};
      begin_outer();
      meet_state();
      meet_tiles(i == heads - 1);
      finish_outer();
    }
  }

  HW_DEVICE HW_INLINE void begin_outer() {
    dev::sync_block();  // nobody reads the tiles of the rows before
    clear(applied);
    row_sum[0] = row_sum[1] = Acc(0);
    if constexpr (kGrad) {
      load_values<kColumns>(cotangents, outer_extra, p.outer, outer_rows, value_column());
      mute_extra(outer_extra, kOuterQuery);
    }
  }

  // Slice 0 alone counts dz.
  HW_DEVICE HW_INLINE void mute_extra(Acc* extra, bool query) {
    if (query && work.slice != 0 && column_lane() == 0) {
      for (int row = row_group(); row < kRows; row += kGroups) extra[row] = Acc(0);
    }
  }

  HW_DEVICE HW_INLINE void meet_state() {
    for (int tile = 0; tile < g.dim_tiles; ++tile) {
      if (tile > 0) dev::sync_block();
      load_outer(tile);
      if constexpr (kGrad) start_gradient(tile);
      dev::sync_block();
      if (has_state) {
        const Acc* kv = state.kv + first_feature(tile) * state.stride;
        if constexpr (kApply) {
          read_state<kOuterQuery>(applied, p.map, tile_dim(tile), outer, kv, state.stride);
          if (!kReverse && state.z && p.normalize) {
            read_z<kOuterQuery>(row_sum, pairs, tile_features(tile), g.tile_dim, outer,
                                state.z + first_feature(tile));
          }
        }
        if constexpr (kGrad) chain_state(tile, kv);
      }
      if constexpr (kGrad) put_aside(tile);
    }
  }

  // The inner rows that are met tile by tile: in the direct schedule all that count, otherwise,
  // causal, those of the same chunk.
  HW_DEVICE HW_INLINE void meet_tiles(bool last_outer_head) {
    const int64_t first = outer_rows.first;
    const bool chunk_only = has_state;
    int64_t begin = work.segment.sequence_begin, end = work.segment.sequence_end;
    if (p.causal && (kReverse || chunk_only)) begin = first;
    if (p.causal && (!kReverse || chunk_only)) end = first + 1;
    if (!p.causal && chunk_only) end = begin;
    const int heads = kReverse ? work.queries : 1;
    for (int64_t row = begin; row < end; row += kRows) {
      for (int i = 0; i < heads; ++i) {
        inner_rows = {work.segment.batch, row, work.segment.sequence_end,
                      kReverse ? work.first_query + i : work.key_head};
        meet_tile(p.causal && row == first);
        if (chunk_only && last_outer_head) update_state();
      }
    }
  }

  // One tile of outer x inner rows: w and ds from the scores.
  HW_DEVICE HW_INLINE void meet_tile(bool diagonal) {
    const Mask mask = !diagonal ? Mask::all : kReverse ? Mask::from : Mask::up_to;
    dev::sync_block();
    load_values<kColumns>(values, inner_extra, p.inner, inner_rows, value_column());
    mute_extra(inner_extra, kInnerQuery);
    Acc scores[2][4];
    clear(scores);
    for (int tile = 0; tile < g.dim_tiles; ++tile) {
      if (tile > 0) dev::sync_block();
      if (g.dim_tiles > 1) load_outer(tile);
      load_inner(tile);
      dev::sync_block();
      add_scores(scores, outer, inner, tile_dim(tile));
    }
    if constexpr (kApply) {
      store_weights(mask, [&](int r, int u) { return weight(p.map, scores[r][u]); });
      dev::sync_block();
      apply_tile(mask);
    }
    if constexpr (kGrad) {
      Acc ds[2][4];
      weight_gradients(ds, scores);
      if constexpr (kApply) dev::sync_block();
      store_weights(mask, [&](int r, int u) { return ds[r][u]; });
      for (int tile = 0; tile < g.dim_tiles; ++tile) grad_tile(mask, tile);
    }
  }

  // weights[inner][outer] = value(r, u), 0 where the two do not meet or a row does not exist.
  template <class Value>
  HW_DEVICE HW_INLINE void store_weights(Mask mask, const Value& value) {
    HW_UNROLL
    for (int u = 0; u < 4; ++u) {
      HW_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int i = row_group() + kGroups * r, j = column_lane() + kLanes * u;
        const bool met = meets(mask, i, j) && inner_rows.valid(j);
        weights[j * kRowStride<Acc> + i] = met ? value(r, u) : Acc(0);
      }
    }
  }

  HW_DEVICE HW_INLINE void apply_tile(Mask mask) {
    const Acc* column = values + column_lane() * kCount;
    add_weighted(applied, mask, weights,
                 [&](int n) { return load_vector<kCount>(column + n * kStride); });
    if constexpr (!kReverse) {
      if (p.normalize) add_row_sums();
    }
  }

  HW_DEVICE HW_INLINE void add_row_sums() {
    for (int n = column_lane(); n < kRows; n += kLanes) {
      const auto w = load_vector<2>(weights + n * kRowStride<Acc> + 2 * row_group());
      row_sum[0] += w.v[0];
      row_sum[1] += w.v[1];
    }
  }

  // ds = (<y_i, x_j> + extra) w'(s)
  HW_DEVICE HW_INLINE void weight_gradients(Acc (&ds)[2][4], const Acc (&scores)[2][4]) {
    clear(ds);
    add_dot<kColumns>(ds, cotangents, values, kStride, kRows - 1);
    HW_UNROLL
    for (int u = 0; u < 4; ++u) {
      HW_UNROLL
      for (int r = 0; r < 2; ++r) {
        const Acc extra =
            outer_extra[row_group() + kGroups * r] * inner_extra[column_lane() + kLanes * u];
        ds[r][u] = (ds[r][u] + extra) * weight_derivative(p.map, scores[r][u]);
      }
    }
  }

  // gradient[a][i] += sum_j ds_ij b_j[a]
  HW_DEVICE HW_INLINE void grad_tile(Mask mask, int tile) {
    if (g.dim_tiles > 1) {
      dev::sync_block();  // nobody reads the inner rows, for the scores
      load_inner(tile);
      take_back(tile);
    }
    dev::sync_block();
    Acc sum[2][4];
    clear(sum);
    const Acc* row[4];
    HW_UNROLL
    for (int u = 0; u < 4; ++u) {
      row[u] = inner + min_of(column_lane() + kLanes * u, g.tile_dim) * kRowStride<Acc>;
    }
    add_weighted(sum, mask, weights,
                 [&](int n) { return Vec<Acc, 4>{{row[0][n], row[1][n], row[2][n], row[3][n]}}; });
    HW_UNROLL
    for (int u = 0; u < 4; ++u) {
      const int a = column_lane() + kLanes * u;
      if (a >= tile_dim(tile)) continue;
      HW_UNROLL
      for (int r = 0; r < 2; ++r) gradient[a * kRowStride<Acc> + 2 * row_group() + r] += sum[r][u];
    }
    put_aside(tile);
  }

  // The inner rows join the state.
  HW_DEVICE HW_INLINE void update_state() {
    for (int tile = 0; tile < g.dim_tiles; ++tile) {
      if (g.dim_tiles > 1) {
        dev::sync_block();
        load_inner(tile);
        dev::sync_block();
      }
      const int first = first_feature(tile);
      add_to_state<kInnerQuery, kColumns>(
          state.kv + first * state.stride, state.stride, state.z ? state.z + first : nullptr, pairs,
          tile_features(tile), g.tile_dim, inner, values, inner_extra);
    }
  }

  // gradient[a][i] += sum_f dm_f(i) d m_f / d a, with dm_f(i) = <y_i, S_f> + z_f extra_i, for 32
  // features at a time. Each warp keeps the columns a that are its number modulo 4, each of its
  // lanes one row.
  HW_DEVICE HW_INLINE void chain_state(int tile, const Acc* kv) {
    const int count = tile_features(tile);
    for (int f0 = 0; f0 < count; f0 += kTileDim) {
      Acc dm[2][4];
      clear(dm);
      add_dot<kColumns>(dm, cotangents, kv + f0 * state.stride, state.stride, count - 1 - f0);
      HW_UNROLL
      for (int u = 0; u < 4; ++u) {
        const int f = f0 + column_lane() + kLanes * u;
        const bool counts = state.z && f < count;
        const Acc z = counts ? state.z[first_feature(tile) + f] : Acc(0);
        HW_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int i = row_group() + kGroups * r;
          weights[(f - f0) * kRowStride<Acc> + i] = dm[r][u] + z * outer_extra[i];
        }
      }
      dev::sync_block();
      chain_features(f0, min_of(count - f0, kTileDim));
      dev::sync_block();
    }
  }

  HW_DEVICE HW_INLINE void chain_features(int f0, int count) {
    const int mine = dev::warp(), i = dev::lane();
    for (int f = 0; f < count; ++f) {
      const FeaturePair pair = pairs[f0 + f];
      const bool a = pair.a != g.tile_dim && pair.a % 4 == mine;
      const bool b = pair.b != g.tile_dim && pair.b % 4 == mine;
      if (!a && !b) continue;
      const Acc dm =
          coefficient<kOuterQuery, Acc>(pair, g.tile_dim) * weights[f * kRowStride<Acc> + i];
      Acc* column = gradient + i;
      const Acc* x = outer + i;
      if (a) column[pair.a * kRowStride<Acc>] += dm * x[pair.b * kRowStride<Acc>];
      if (b) column[pair.b * kRowStride<Acc>] += dm * x[pair.a * kRowStride<Acc>];
    }
  }

  // -- results

  HW_DEVICE HW_INLINE void finish_outer() {
    if constexpr (kApply) store_applied();
    if constexpr (kGrad) store_gradient();
  }

  // o or dv; the division comes before the only rounding.
  HW_DEVICE HW_INLINE void store_applied() {
    const int column = column_lane() * kCount;
    HW_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * row_group() + r;
      const int64_t at = outer_rows.first + row;
      if (!kReverse && p.normalize) {
        const Acc z = dev::warp_sum<kLanes>(row_sum[r]) + p.eps;
        HW_UNROLL
        for (int u = 0; u < kCount; ++u) {
          applied[r][u] = z == Acc(0) ? Acc(0) : applied[r][u] / z;
        }
        if (p.z && work.slice == 0 && column_lane() == 0 && outer_rows.valid(row)) {
          p.z(outer_rows.batch, at, outer_rows.head) = z;
        }
      }
      if (!outer_rows.valid(row)) continue;
      const int available = p.value_dim - value_column() - column;
      if (available <= 0) continue;
      store_columns(p.applied.at(outer_rows.batch, at, outer_rows.head, value_column() + column),
                    p.applied.stride[3], p.applied_vectors, available, applied[r]);
    }
  }

  // With one tile of q and k the gradient of a slice stays in shared memory until all is summed;
  // with more, the other tiles wait in the workspace. A thread takes back what it put aside itself.
  HW_DEVICE HW_INLINE void start_gradient(int tile) {
    for_gradient(tile,
                 [&](Acc& sum, Acc* aside, int, int) { sum = work.slice == 0 ? Acc(0) : *aside; });
  }
  HW_DEVICE HW_INLINE void put_aside(int tile) {
    if (g.dim_tiles == 1) return;
    dev::sync_block();
    for_gradient(tile, [&](Acc& sum, Acc* aside, int, int) { *aside = sum; });
  }
  HW_DEVICE HW_INLINE void take_back(int tile) {
    for_gradient(tile, [&](Acc& sum, Acc* aside, int, int) { sum = *aside; });
  }

  // The last slice finishes the gradient: scale, pre', the only rounding.
  HW_DEVICE HW_INLINE void store_gradient() {
    const bool last = work.slice == g.slices - 1;
    if (g.dim_tiles == 1) dev::sync_block();
    for (int tile = 0; tile < g.dim_tiles; ++tile) {
      for_gradient(tile, [&](Acc& sum, Acc* aside, int row, int a) {
        const Acc total = g.dim_tiles == 1 ? sum : *aside;
        if (!last) {
          *aside = total;
          return;
        }
        const int64_t at = outer_rows.first + row;
        const Acc x = p.outer.key(outer_rows.batch, at, outer_rows.head, a);
        const Acc factor = (kOuterQuery ? p.scale : Acc(1)) * pre_map_derivative(p.map, x);
        p.graded(outer_rows.batch, at, outer_rows.head, a) = Element(total * factor);
      });
    }
  }

  // visit(sum, its place in the workspace or null, row, column) over the gradients of one tile.
  template <class Visit>
  HW_DEVICE HW_INLINE void for_gradient(int tile, const Visit& visit) {
    const Ref<const Element, 4>& key = p.outer.key;
    const int first = tile * kTileDim;
    for (int row = row_group(); row < kRows; row += kGroups) {
      if (!outer_rows.valid(row)) continue;
      int64_t at = outer_rows.batch * key.size[1] + outer_rows.first + row;
      at = at * key.size[2] + outer_rows.head;
      Acc* aside = p.sums ? p.sums + at * p.dim + first : nullptr;
      for (int a = column_lane(); a < tile_dim(tile); a += kLanes) {
        visit(gradient[a * kRowStride<Acc> + row], aside ? aside + a : nullptr, row, first + a);
      }
    }
  }

  // -- loading

  HW_DEVICE HW_INLINE void load_outer(int tile) {
    load_keys(outer, p.outer, p.map, p.scale, outer_rows, tile * kTileDim, tile_dim(tile),
              g.tile_dim);
  }
  HW_DEVICE HW_INLINE void load_inner(int tile) {
    load_keys(inner, p.inner, p.map, p.scale, inner_rows, tile * kTileDim, tile_dim(tile),
              g.tile_dim);
  }

  // -- sizes

  HW_DEVICE HW_INLINE int value_column() const { return work.slice * kColumns; }
  HW_DEVICE HW_INLINE int tile_dim(int tile) const {
    return min_of(p.dim - tile * kTileDim, g.tile_dim);
  }
  HW_DEVICE HW_INLINE int first_feature(int tile) const { return tile * kTileDim; }
  HW_DEVICE HW_INLINE int tile_features(int tile) const {
    return p.map == FeatureMap::taylor2 ? p.features : tile_dim(tile);
  }

  const WalkParams<Element>& p;
  const Geometry& g;
  Work work;
  Acc *outer, *inner, *values, *cotangents, *inner_extra, *outer_extra, *weights, *gradient;
  FeaturePair* pairs;
  bool has_state;
  State<Acc> state;
  TileRows outer_rows, inner_rows;
  Acc applied[2][kCount];  // of rows 2g, 2g + 1
  Acc row_sum[2];          // this lane's share of z of these rows
};

template <class Element, int kColumns, bool kReverse, bool kApply, bool kGrad>
struct WalkKernel {
  using Params = WalkParams<Element>;
  static constexpr int kThreads = simt::kThreads;
  // fp32, wide: at most 128 or 168 registers and as many blocks as shared memory takes on sm_80.
  static constexpr bool kSlim = kColumns != kNarrow && sizeof(Accum<Element>) == 4;
  static constexpr int kMinBlocks = !kSlim ? 2 : kGrad ? 3 : 4;
  HW_DEVICE static void main(const Params& p) {
    ChunkLoop<Element, kColumns, kReverse, kApply, kGrad>(p).run();
  }
};

}  // namespace hw::linear_attention::simt
