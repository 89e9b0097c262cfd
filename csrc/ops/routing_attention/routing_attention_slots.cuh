// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys on CUDA: what is not attention. Both CUDA backends
// call these; the attention itself works on slots (of rows, of keys, or of the spans of a key
// region).
//
//   index_tokens    of every token the slots that hold it, index_keys likewise  (Csr)
//   index_regions   of every key region the groups that list it, and its spans  (Regions)
//   mean_slots      o_i = sum_{slots of i} w_slot / (n_i + eps)
//   slot_deltas     D_slot = <d_w_i, w_slot>
//   sum_slots       d_x_i = sum over the query heads of a head, over the slots of i
//   sum_spans       d_x_j = sum over the query heads of a head, over the spans of j's region
//
// Sums run in order of head, then slot or span: the same bits at every call. A warp has a row of
// the result, lanes are columns, so that rows of slots are read whole. Each slot is read once.
//
// Symbols are those of routing_attention.h; T spans, n tokens of a region of keys.
#pragma once

#include <cstring>
#include <type_traits>

#include "ops/routing_attention/routing_attention_simt_layout.h"
#include "softmax/simt/row_dot.cuh"

#include "core/gpu/csr.cuh"
#include "core/gpu/device.cuh"
#include "core/gpu/launch.h"

namespace hw::routing_attention {

inline constexpr int kSlotThreads = 256, kSlotWarps = kSlotThreads / dev::kWarp;

// ---- Indices ------------------------------------------------------------------------------------

// Where lists are the same for all batch entries or heads, one Csr serves them.
template <class T>
Csr shared_where(Csr csr, const Ref<T, 4>& entries) {
  if (entries.stride[0] == 0) csr.batches = 1;
  if (entries.stride[1] == 0) csr.heads = 1;
  return csr;
}

// The token of slot i = g W + slot, or -1.
struct TokenOfSlot {
  Lists lists;
  HW_DEVICE HW_INLINE int64_t operator()(int64_t b, int64_t head, int64_t i) const {
    const int64_t slots = lists.slots();
    return lists.token(b, head, i / slots, i % slots);
  }
};

// The region of item i = g N + n.
struct RegionOfItem {
  Ref<const int64_t, 4> entries;  // [B, Hq, G, N]
  HW_DEVICE HW_INLINE int64_t operator()(int64_t b, int64_t head, int64_t i) const {
    return entries(b, head, i / entries.size[3], i % entries.size[3]);
  }
};

// Slots i = g W + slot of every token, in order. Returns the Csr as it is to be read.
inline Csr index_tokens(const Lists& lists, const Csr& memory, const Context& context) {
  const Csr csr = shared_where(memory, lists.entries);
  make_csr(TokenOfSlot{lists}, csr, context);
  return csr;
}

// Whether two lists are one in memory. Nothing lies between the members: bytes tell.
inline bool same_lists(const Lists& a, const Lists& b) {
  static_assert(std::has_unique_object_representations_v<Lists>);
  return std::memcmp(&a, &b, sizeof(Lists)) == 0;
}

// The same of the keys; where keys are the rows' lists, that of the rows.
inline Csr index_keys(const Routing& r, const Csr& rows, const Csr& memory,
                      const Context& context) {
  return same_lists(r.rows, r.keys) ? rows : index_tokens(r.keys, memory, context);
}

// first[r] = sum_{r' < r} max(ceil(listings of r' / P), 1), and the region of every span. A block
// per list.
struct SpansKernel {
  using Params = Regions;
  static constexpr int kThreads = kSlotThreads;
  struct Smem {
    int32_t sums[kSlotWarps];
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t list = dev::block_index_x();
    const int32_t* begin = p.listed.begin_of(list);
    int32_t *first = p.first_of(list), *region = p.regions_of(list);
    int32_t before = 0;
    for (int64_t base = 0; base < p.listed.buckets; base += kThreads) {
      const int64_t r = base + dev::thread_index();
      const bool exists = r < p.listed.buckets;
      const int64_t listings = exists ? begin[r + 1] - begin[r] : 0;
      const int32_t spans = static_cast<int32_t>(max_of<int64_t>(ceil_div(listings, p.most), 1));
      const Scanned s = scan_block<kSlotWarps>(exists ? spans : 0, dev::shared<Smem>()->sums);
      if (exists) {
        first[r] = before + s.before;
        for (int32_t i = 0; i < spans; ++i) region[first[r] + i] = static_cast<int32_t>(r);
      }
      before += s.all;
    }
    if (dev::thread_index() == 0) first[p.listed.buckets] = before;
    for (int64_t t = before + dev::thread_index(); t < p.spans; t += kThreads) region[t] = -1;
  }
};

// Who lists each key region, and the spans. Returns the Regions as they are to be read.
inline Regions index_regions(const Lists& keys, const Regions& memory, const Context& context) {
  Regions r = memory;
  r.listed = shared_where(memory.listed, keys.entries);
  make_csr(RegionOfItem{keys.entries}, r.listed, context);
  launch<SpansKernel>({r.listed.lists(), 1, 1}, sizeof(SpansKernel::Smem), context, r);
  return r;
}

// ---- Sums ---------------------------------------------------------------------------------------

// The rows of an array by slot or span that are of one token: row(i) for i in [begin, end).
//
// By slot.
struct SlotsOfToken {
  Csr csr;
  struct Rows {
    const int32_t* item;
    int32_t begin, end;
    HW_DEVICE HW_INLINE int64_t row(int32_t i) const { return item[i]; }
  };
  HW_DEVICE HW_INLINE Rows of(int64_t b, int64_t head, int64_t token) const {
    const int64_t list = csr.list(b, head);
    const int32_t* begin = csr.begin_of(list) + token;
    return {csr.items_of(list), begin[0], begin[1]};
  }
};

// By span: a key has row t n + its number in the region, of each span t of that.
struct SpansOfToken {
  Regions regions;
  RegionGrid grid;
  struct Rows {
    int64_t size, in_region;
    int32_t begin, end;
    HW_DEVICE HW_INLINE int64_t row(int32_t span) const { return span * size + in_region; }
  };
  HW_DEVICE HW_INLINE Rows of(int64_t b, int64_t head, int64_t token) const {
    const int64_t y = token / grid.columns_of_image, x = token % grid.columns_of_image;
    const int64_t region = y / grid.height * grid.columns + x / grid.width;
    const int64_t in_region = y % grid.height * grid.width + x % grid.width;
    const int32_t* first = regions.first_of(regions.listed.list(b, head)) + region;
    return {grid.size(), in_region, first[0], first[1]};
  }
};

// to[b, i, h] = sum over the query heads of h, over the rows of `from` that are of token i. A warp
// per row of `to`.
template <class In, class Out, class RowsOfToken>
struct SumKernel {
  using A = Accum<Out>;
  static constexpr int kThreads = kSlotThreads, kMinBlocks = 4;  // it waits for memory
  struct Params {
    RowsOfToken rows;
    Ref<const In, 4> from;  // [B, slots or rows of spans, Hq, width]
    Ref<Out, 4> to;         // [B, S, H, width]
    int64_t share;          // query heads of a head
    bool mean;              // divide by their number + eps
    double eps;
  };

  HW_DEVICE static void main(const Params& p) {
    const int64_t index = static_cast<int64_t>(dev::block_index_x()) * kSlotWarps + dev::warp();
    const int64_t heads = p.to.size[2], head = index % heads, row = index / heads;
    const int64_t token = row % p.to.size[1], b = row / p.to.size[1];
    if (b >= p.to.size[0]) return;
    for (int64_t c = dev::lane(); c < p.to.size[3]; c += dev::kWarp)
      p.to(b, token, head, c) = Out(column(p, b, token, head, c));
  }

  HW_DEVICE HW_INLINE static A column(const Params& p, int64_t b, int64_t token, int64_t head,
                                      int64_t c) {
    A sum = 0;
    int32_t count = 0;
    for (int64_t h = head * p.share; h < (head + 1) * p.share; ++h) {
      const auto rows = p.rows.of(b, h, token);
      const In* from = p.from.at(b, 0, h, c);
      for (int32_t i = rows.begin; i < rows.end; ++i)
        sum += static_cast<A>(from[rows.row(i) * p.from.stride[1]]);
      count += rows.end - rows.begin;
    }
    if (!p.mean) return sum;
    return count > 0 ? sum / (static_cast<A>(count) + static_cast<A>(p.eps)) : A(0);
  }

  static void run(const Params& p, const Context& context) {
    const int64_t rows = p.to.size[0] * p.to.size[1] * p.to.size[2];
    if (p.to.size[3] == 0) return;
    launch<SumKernel>({ceil_div<int64_t>(rows, kSlotWarps), 1, 1}, 0, context, p);
  }
};

// o [B, Sq, Hq, Dv] from w [B, G Wq, Hq, Dv]; `rows` as index_tokens returned it.
template <class Element>
void mean_slots(const ForwardParams& f, const Csr& rows, const Context& context) {
  using Kernel = SumKernel<Element, Element, SlotsOfToken>;
  Kernel::run(
      {{rows}, f.w.template as<const Element>(), f.o.template as<Element>(), 1, true, f.mean_eps},
      context);
}

// A contiguous array [B, rows, Hq, width] of the workspace.
template <class A>
Ref<A, 4> array_of_rows(A* data, int64_t batch, int64_t rows, int64_t heads, int64_t width) {
  Ref<A, 4> r;
  r.data = data;
  const int64_t size[] = {batch, rows, heads, width};
  const int64_t stride[] = {rows * heads * width, heads * width, width, 1};
  for (int d = 0; d < 4; ++d) r.size[d] = size[d], r.stride[d] = stride[d];
  return r;
}

// A gradient per token [B, S, H, width] from those of slots [B, G W, Hq, width].
template <class Element>
void sum_slots(const Csr& csr, const Ref<Accum<Element>, 4>& from, const Ref<void, 4>& to,
               const Context& context) {
  using A = Accum<Element>;
  using Kernel = SumKernel<A, Element, SlotsOfToken>;
  if (to.size[2] == 0) return;
  const int64_t share = from.size[2] / to.size[2];
  Kernel::run({{csr}, from.template as<const A>(), to.template as<Element>(), share, false, 0},
              context);
}

// d_row_temperature [B, Sq, Hq] from those of slots, [B, slots, Hq].
template <class A>
void sum_temperatures(const Csr& rows, A* from, const Ref<void, 3>& to, int64_t slots,
                      const Context& context) {
  if (!to) return;
  const Ref<void, 4> columns{to.data,
                             {to.size[0], to.size[1], to.size[2], 1},
                             {to.stride[0], to.stride[1], to.stride[2], 1}};
  sum_slots<A>(rows, array_of_rows(from, to.size[0], slots, to.size[2], 1), columns, context);
}

// A gradient per key [B, Sk, H, width] from those of spans [B, T n, Hq, width].
template <class Element>
void sum_spans(const Regions& regions, const RegionGrid& grid, const Ref<Accum<Element>, 4>& from,
               const Ref<void, 4>& to, const Context& context) {
  using A = Accum<Element>;
  using Kernel = SumKernel<A, Element, SpansOfToken>;
  if (to.size[2] == 0) return;
  const int64_t share = from.size[2] / to.size[2];
  Kernel::run(
      {{regions, grid}, from.template as<const A>(), to.template as<Element>(), share, false, 0},
      context);
}

// ---- D of slots ---------------------------------------------------------------------------------

// D [B, Hq, G Wq] of slots; 0 where there is no token.
template <class Element>
void slot_deltas(const BackwardParams& b, Accum<Element>* delta, const Context& context) {
  const int64_t heads = b.slots.size[2], slots = b.slots.size[1];
  softmax::simt::launch_row_dot<Element>(
      TokenOfSlot{b.rows}, b.d_w, b.slots,
      {delta, {b.slots.size[0], heads, slots}, {heads * slots, slots, 1}}, context);
}

}  // namespace hw::routing_attention
