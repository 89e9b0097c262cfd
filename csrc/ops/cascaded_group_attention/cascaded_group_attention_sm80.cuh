// SPDX-License-Identifier: Apache-2.0
// Cascaded group attention on tensor cores, fp16 and bf16.
//
// A block has kRows tokens, one window of up to 64 or several smaller ones, and runs their cascade;
// a warp has 16 of the tokens. Per head
//
//   q | k, v [rows, *]  = f W_i         f and W_i in shared memory; the next head's weights are
//                                       copied meanwhile
//   q                   = dwconv(q)     in fp32, a thread a channel of a token
//   s [rows, rows]      = q k^T         in registers, pairs of different windows hidden
//   o [rows, d]         = p v           p in the registers of s; to relu, and with x to the next f
//
// and in the end y = relu W, columns kOutColumns at a time, the groups of W in two stages.
#pragma once

#include <limits>

#include "ops/cascaded_group_attention/cascaded_group_attention.h"
#include "ops/cascaded_group_attention/cascaded_group_attention_sm80_layout.h"

#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"
#include "core/gpu/tile.cuh"

namespace hw::cascaded_group_attention::sm80 {

template <class Element, int kDim>
struct WindowKernel {
  static constexpr int kWarps = kRows / 16, kThreads = kWarps * dev::kWarp;
  static constexpr float kLog2e = 1.4426950408889634f;
  using Group = Tile<Element, kRows, kDim>;  // [tokens, d]
  using Keys = Tile<Element, kRows, 32>;     // [tokens, K]
  using Scores = Fragment<1, kRows / 8>;     // [16, tokens]
  // v and o are made kPart columns at a time, which registers hold beside the other operand.
  static constexpr int kPart = kDim > 64 ? kDim / 2 : kDim;
  using Values = Fragment<1, kPart / 8>;         // [16, kPart]
  using Columns = Fragment<1, kOutColumns / 8>;  // [16, columns of y]

  struct Params {
    ForwardParams f;
    int side, stride;               // R; rows of a window
    bool aligned_qkv, aligned_out;  // weights, for copies of 16 bytes
  };

  // Where a row of the block stands.
  struct Row {
    int window, y, x;  // window of the block, -1: none; within it
  };
  struct HeadWeights {
    Tile<Element, kDim, 32> qk;
    Tile<Element, kDim, kDim> v;
  };
  union Weights {
    HeadWeights head;
    Tile<Element, kDim, kOutColumns> out[2];
  };
  struct Smem {
    Group f, v;
    Keys q, k;
    Weights weights;
    float plane[kRows][kKeyDim + 1];  // q before the convolution
    float table[kRows];               // T of the head, times log2 e: [|dy| width + |dx|]
    Row rows[kRows];
    Group relu[1];  // of each head
  };
  static_assert(sizeof(Smem) <= 2 * sizeof(Group) + 2 * sizeof(Keys) + sizeof(Weights) +
                                    kRows * (kKeyDim + 1) * 4 + 2048 + sizeof(Group));

  HW_DEVICE static void main(const Params& p) {
    Smem& smem = *dev::shared<Smem>();
    const int heads = static_cast<int>(p.f.heads());
    const int tiles = ceil_div(static_cast<int>(p.f.channels()), kOutColumns) * heads;
    load_weights(p, smem, 0);
    dev::copy_async_commit();
    place_rows(p, smem);
    dev::sync_block();
    load_first_group(p, smem);
    HW_UNROLL_BY(1)
    for (int head = 0; head < heads; ++head) {
      dev::copy_async_wait<0>();
      dev::sync_block();
      project(p, smem, head);
      dev::sync_block();
      if (head + 1 < heads)
        load_weights(p, smem, head + 1);
      else
        load_out(p, smem, 0);
      dev::copy_async_commit();
      load_table(p, smem, head);
      convolve(p, smem, head);
      dev::sync_block();
      attend(p, smem, head);
    }
    Columns y;
    HW_UNROLL_BY(1)
    for (int tile = 0; tile < tiles; ++tile) {
      dev::copy_async_wait<0>();
      dev::sync_block();
      if (tile + 1 < tiles) load_out(p, smem, tile + 1);
      dev::copy_async_commit();
      const int head = tile % heads;
      if (head == 0) y.clear();
      multiply_columns(y, rows_of(smem.relu[head]), smem.weights.out[tile % 2]);
      if (head + 1 == heads) store(p, smem, y, tile / heads * kOutColumns);
    }
  }

 private:
  HW_DEVICE HW_INLINE static int64_t first_window(const Params& p) {
    return int64_t{dev::block_index_x()} * (kRows / p.stride);
  }

  HW_DEVICE static void place_rows(const Params& p, Smem& smem) {
    const int r = dev::thread_index(), tokens = static_cast<int>(p.f.tokens());
    if (r >= kRows) return;
    const int window = r / p.stride, token = r % p.stride, width = static_cast<int>(p.f.width);
    const bool exists = token < tokens && first_window(p) + window < p.f.windows();
    smem.rows[r] = {exists ? window : -1, token / width, token % width};
  }

  // The element of a token's channel in an image, or null beyond it.
  template <class T>
  HW_DEVICE HW_INLINE static T* token(const Params& p, const Row& row, const Ref<T, 4>& image) {
    if (row.window < 0) return nullptr;
    const ForwardParams::Place at = p.f.place(first_window(p) + row.window);
    const int64_t y = at.y + row.y, x = at.x + row.x;
    return y < image.size[1] && x < image.size[2] ? image.at(at.batch, y, x) : nullptr;
  }

  HW_DEVICE static void load_first_group(const Params& p, Smem& smem) {
    const auto x = p.f.x.template as<const Element>();
    const int group = static_cast<int>(p.f.group());
    for (int i = dev::thread_index(); i < kRows * kDim; i += kThreads) {
      const int r = i / kDim, c = i % kDim;
      const Element* from = c < group ? token(p, smem.rows[r], x) : nullptr;
      smem.f.unit(r, c / 8)[c % 8] = from ? from[c * x.stride[3]] : Element(0.0f);
    }
  }

  HW_DEVICE static void load_weights(const Params& p, Smem& smem, int head) {
    const auto w = p.f.qkv_weight.template as<const Element>();
    const int group = static_cast<int>(p.f.group());
    Rows<Element> rows{w.at(head), w.stride[1], w.stride[2], group, 2 * kKeyDim, p.aligned_qkv};
    load_tile<kThreads>(smem.weights.head.qk, rows);
    rows.origin = w.at(head, 0, 2 * kKeyDim), rows.columns = group;
    load_tile<kThreads>(smem.weights.head.v, rows);
  }

  // The group of a head of kOutColumns columns.
  HW_DEVICE static void load_out(const Params& p, Smem& smem, int tile) {
    const auto w = p.f.out_weight.template as<const Element>();
    const int heads = static_cast<int>(p.f.heads()), group = static_cast<int>(p.f.group());
    const int column = tile / heads * kOutColumns;
    const int columns = min_of(static_cast<int>(p.f.channels()) - column, kOutColumns);
    const Rows<Element> rows{w.at(tile % heads * group, column),
                             w.stride[0],
                             w.stride[1],
                             group,
                             columns,
                             p.aligned_out};
    load_tile<kThreads>(smem.weights.out[tile % 2], rows);
  }

  HW_DEVICE static void load_table(const Params& p, Smem& smem, int head) {
    const auto table = p.f.bias_table.template as<const Element>();
    const int width = static_cast<int>(p.f.width), i = dev::thread_index();
    if (i < static_cast<int>(p.f.tokens()))
      smem.table[i] = static_cast<float>(table(head, i / width * p.side + i % width)) * kLog2e;
  }

  // The warp's rows of a tile as the left operand.
  HW_DEVICE HW_INLINE static Packed<1, kDim / 16> rows_of(const Group& tile) {
    Packed<1, kDim / 16> a;
    const auto loads = MatrixLoads<Group>::left(tile, dev::warp() * 16);
    HW_UNROLL
    for (int step = 0; step < kDim / 16; ++step) loads.load(a.at[0][step], 0, step);
    return a;
  }

  // Two neighbouring elements of a row.
  template <class T>
  HW_DEVICE HW_INLINE static void put(T& tile, int row, int column, float a, float b) {
    *reinterpret_cast<Word*>(tile.unit(row, column / 8) + column % 8) = dev::pack<Element>(a, b);
  }

  // f(j, row, column, a, b) of the neighbours a, b of a fragment that the lane has, by reference.
  template <class T, class F>
  HW_DEVICE HW_INLINE static void each_pair(T& d, F&& f) {
    HW_UNROLL
    for (int j = 0; j < T::kTiles; ++j) {
      HW_UNROLL
      for (int i = 0; i < 4; i += 2)
        f(dev::warp() * 16 + T::row(0, i), T::column(j, i), d.at[0][j][i], d.at[0][j][i + 1]);
    }
  }

  HW_DEVICE static void project(const Params& p, Smem& smem, int head) {
    const auto bias = p.f.qkv_bias.template as<const Element>().slice(head);
    const int group = static_cast<int>(p.f.group());
    const Packed<1, kDim / 16> f = rows_of(smem.f);
    Fragment<1, 4> qk;
    qk.clear();
    multiply_columns(qk, f, smem.weights.head.qk);
    each_pair(qk, [&](int row, int column, float a, float b) {
      a += static_cast<float>(bias(column)), b += static_cast<float>(bias(column + 1));
      if (column < kKeyDim)
        smem.plane[row][column] = a, smem.plane[row][column + 1] = b;
      else
        put(smem.k, row, column - kKeyDim, a, b);
    });
    HW_UNROLL_BY(1)
    for (int first = 0; first < kDim; first += kPart) {
      Values v;
      v.clear();
      multiply_columns(v, f, smem.weights.head.v, first / 8);
      each_pair(v, [&](int row, int column, float a, float b) {
        column += first;
        if (column < group) a += static_cast<float>(bias(2 * kKeyDim + column));
        if (column + 1 < group) b += static_cast<float>(bias(2 * kKeyDim + column + 1));
        const bool exists = smem.rows[row].window >= 0;  // else a weight of 0 must meet no infinity
        put(smem.v, row, column, exists ? a : 0.0f, exists ? b : 0.0f);
      });
    }
  }

  HW_DEVICE static void convolve(const Params& p, Smem& smem, int head) {
    const auto taps = p.f.conv_weight.template as<const Element>().slice(head);
    const auto bias = p.f.conv_bias.template as<const Element>().slice(head);
    const int reach = static_cast<int>(p.f.kernel()) / 2;
    const int height = static_cast<int>(p.f.height), width = static_cast<int>(p.f.width);
    for (int i = dev::thread_index(); i < kRows * kKeyDim; i += kThreads) {
      const int r = i / kKeyDim, c = i % kKeyDim;
      const Row at = smem.rows[r];
      float sum = 0;
      if (at.window >= 0) {
        sum = static_cast<float>(bias(c));
        for (int dy = max_of(-reach, -at.y); dy <= min_of(reach, height - 1 - at.y); ++dy)
          for (int dx = max_of(-reach, -at.x); dx <= min_of(reach, width - 1 - at.x); ++dx)
            sum += static_cast<float>(taps(dy + reach, dx + reach, c)) *
                   smem.plane[r + dy * width + dx][c];
      }
      smem.q.unit(r, c / 8)[c % 8] = Element(sum);
    }
  }

  HW_DEVICE static void attend(const Params& p, Smem& smem, int head) {
    Scores s;
    s.clear();
    multiply_keys(s, smem);
    add_bias(p, smem, s);
    float inverse[2];
    HW_UNROLL
    for (int half = 0; half < 2; ++half) {
      constexpr float kLeast = -std::numeric_limits<float>::infinity();
      const float most = s.row_max(0, half, kLeast);
      HW_UNROLL
      for (int j = 0; j < Scores::kTiles; ++j) {
        HW_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i)
          s.at[0][j][i] = dev::exp2_fast(s.at[0][j][i] - most);
      }
      inverse[half] = 1.0f / s.row_sum(0, half);
    }
    const Packed<1, kRows / 16> weights = pack<Element>(s);
    HW_UNROLL_BY(1)
    for (int first = 0; first < kDim; first += kPart) {
      Values o;
      o.clear();
      multiply_values(p, o, weights, smem, first);
      o.scale_row(0, 0, inverse[0]), o.scale_row(0, 1, inverse[1]);
      hand_over(p, smem, head, o, first);
    }
  }

  HW_DEVICE HW_INLINE static void multiply_keys(Scores& s, const Smem& smem) {
    uint32_t q[4];
    MatrixLoads<Keys>::left(smem.q, dev::warp() * 16).load(q, 0, 0);
    const auto loads = MatrixLoads<Keys>::right(smem.k, 0);
    HW_UNROLL
    for (int j = 0; j < Scores::kTiles; j += 2) {
      uint32_t k[4];
      loads.load(k, 8 * j, 0);
      dev::mma_16x8x16<Element>(s.at[0][j], q, k);
      dev::mma_16x8x16<Element>(s.at[0][j + 1], q, k + 2);
    }
  }

  // o += p v of the keys of the warp's window, columns of v from `first` on.
  HW_DEVICE HW_INLINE static void multiply_values(const Params& p, Values& o,
                                                  const Packed<1, kRows / 16>& weights,
                                                  const Smem& smem, int first) {
    const int own = dev::warp() * 16 / p.stride;
    const auto loads = MatrixLoads<Group>::left(smem.v, 0);
    HW_UNROLL
    for (int step = 0; step < kRows / 16; ++step) {
      if (step * 16 / p.stride != own) continue;
      HW_UNROLL
      for (int j = 0; j < Values::kTiles; j += 2) {
        uint32_t v[4];
        loads.load_transposed(v, 16 * step, first / 16 + j / 2);
        dev::mma_16x8x16<Element>(o.at[0][j], weights.at[0][step], v);
        dev::mma_16x8x16<Element>(o.at[0][j + 1], weights.at[0][step], v + 2);
      }
    }
  }

  // Scores to base 2. A row that is none sees everything; nobody reads what comes of it.
  HW_DEVICE HW_INLINE static void add_bias(const Params& p, const Smem& smem, Scores& s) {
    constexpr float kNever = -std::numeric_limits<float>::infinity(), kUnit = 0.25f * kLog2e;
    const int width = static_cast<int>(p.f.width);
    Scores::each([&](int, int j, int i) {
      const Row row = smem.rows[dev::warp() * 16 + Scores::row(0, i)];
      const Row key = smem.rows[Scores::column(j, i)];
      float& score = s.at[0][j][i];
      score *= kUnit;
      if (row.window < 0) return;
      const int dy = row.y - key.y, dx = row.x - key.x;
      const int at = (dy < 0 ? -dy : dy) * width + (dx < 0 ? -dx : dx);
      score = key.window == row.window ? score + smem.table[at] : kNever;
    });
  }

  // o of the warp's rows, columns from `first` on: its positive part to relu, with the next group
  // to f.
  HW_DEVICE static void hand_over(const Params& p, Smem& smem, int head, Values& o, int first) {
    const auto x = p.f.x.template as<const Element>();
    const int group = static_cast<int>(p.f.group());
    const bool more = head + 1 < static_cast<int>(p.f.heads());
    const Element* from[2];
    HW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Row row = smem.rows[dev::warp() * 16 + Values::row(0, 2 * half)];
      from[half] = more ? token(p, row, x) : nullptr;
    }
    each_pair(o, [&](int row, int column, float a, float b) {
      column += first;
      put(smem.relu[head], row, column, a < 0.0f ? 0.0f : a, b < 0.0f ? 0.0f : b);  // NaN stays
      if (!more) return;
      const Element* own = row % 16 < 8 ? from[0] : from[1];
      const int64_t at = int64_t{head + 1} * group + column;
      if (own && column < group) a += static_cast<float>(own[at * x.stride[3]]);
      if (own && column + 1 < group) b += static_cast<float>(own[(at + 1) * x.stride[3]]);
      put(smem.f, row, column, a, b);
    });
  }

  HW_DEVICE static void store(const Params& p, const Smem& smem, Columns& y, int first) {
    const auto image = p.f.y.template as<Element>();
    const auto bias = p.f.out_bias.template as<const Element>();
    const int channels = static_cast<int>(p.f.channels());
    each_pair(y, [&](int row, int column, float a, float b) {
      Element* to = token(p, smem.rows[row], image);
      const int c = first + column;
      if (to == nullptr) return;
      if (c < channels) to[c * image.stride[3]] = Element(a + static_cast<float>(bias(c)));
      if (c + 1 < channels)
        to[(c + 1) * image.stride[3]] = Element(b + static_cast<float>(bias(c + 1)));
    });
  }
};

// Whether rows of a matrix start at multiples of 16 bytes and are contiguous.
template <class Element, int N>
bool has_units(const Ref<const Element, N>& x) {
  bool yes = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[N - 1] == 1;
  for (int i = 0; i < N - 1; ++i) yes = yes && x.stride[i] % 8 == 0;
  return yes;
}

template <class Element, int kDim>
void forward(const ForwardParams& f, const Call& call) {
  using Kernel = WindowKernel<Element, kDim>;
  const int64_t stride = rows_of_window(f);
  launch<Kernel>({ceil_div(f.windows(), kRows / stride), 1, 1},
                 static_cast<int>(shared_bytes(kDim, f.heads())), call.context,
                 {f, static_cast<int>(f.side()), static_cast<int>(stride),
                  has_units(f.qkv_weight.template as<const Element>()),
                  has_units(f.out_weight.template as<const Element>())});
}

}  // namespace hw::cascaded_group_attention::sm80

namespace hw::cascaded_group_attention {

template <class Element, int kDim>
struct Sm80 {
  static constexpr auto& forward = sm80::forward<Element, kDim>;
};

}  // namespace hw::cascaded_group_attention
