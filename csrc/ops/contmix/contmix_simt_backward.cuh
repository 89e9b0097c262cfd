// SPDX-License-Identifier: Apache-2.0
// ContMix on CUDA, backward: for each part of the batch entries and groups
//
//   p = weights;  dp = <do, v>;  ds;  da;  sums of dW, dc and dr;  dv from p
//
// and then the sums of sums. Parts follow one another on the stream and use the same memory.
#pragma once

#include <algorithm>

#include "neighborhood/simt/launches.cuh"
#include "ops/contmix/contmix_simt_gradients.cuh"

namespace hw::contmix::simt {

template <class Element>
class Backward {
 public:
  using A = Accum<Element>;

  Backward(const BackwardParams& p, const Call& call)
      : p_(p), call_(call), arena_(call.workspace, "contmix"), memory_(arena_, p, call.context) {}

  void run() {
    for (int64_t b = 0; b < p_.batch(); b += memory_.parts.batch)
      for (int64_t g = 0; g < p_.groups(); g += memory_.parts.groups) {
        const Part part{b, std::min(memory_.parts.batch, p_.batch() - b), g,
                        std::min(memory_.parts.groups, p_.groups() - g)};
        weights(part);
        if (p_.d_v) value_gradients(part);
        if (p_.wants_scores()) score_gradients(part, b == 0 && g == 0);
      }
    finish();
  }

 private:
  struct Part {
    int64_t first_batch, batch, first_group, groups;
  };

  // Of an image, the part's batch entries and groups; `half`: those heads of 2 G.
  template <class T>
  Ref<T, 5> of(const Ref<T, 5>& image, const Part& part, int half = 0) const {
    Ref<T, 5> r = image;
    r.data +=
        part.first_batch * r.stride[0] + (half * p_.groups() + part.first_group) * r.stride[3];
    r.size[0] = part.batch, r.size[3] = part.groups;
    return r;
  }

  // An array of the workspace, [batch, Y, X, groups, T], from a window's first tap on.
  template <class T>
  Ref<T, 5> rows(T* data, const Part& part, int half = -1) const {
    const int64_t taps = p_.weight.size[0], small = p_.window(0).taps();
    Ref<T, 5> r;
    r.data = data + (half == 1 ? small : 0);
    const int64_t last = half == 0 ? small : half == 1 ? taps - small : taps;
    const int64_t sizes[] = {part.batch, p_.v.size[1], p_.v.size[2], part.groups, last};
    int64_t stride = taps;
    for (int d = 4; d >= 0; --d) r.size[d] = sizes[d];
    r.stride[4] = 1;
    for (int d = 3; d >= 0; stride *= sizes[d], --d) r.stride[d] = stride;
    return r;
  }

  int64_t rows_of(const Part& part) const { return part.batch * p_.tokens() * part.groups; }

  void weights(const Part& part) {
    WeightInputs<Element> in(p_);
    in.affinity = of(in.affinity, part);
    for (Ref<const Element, 3>& table : in.table)
      if (table) table.data += part.first_group * table.stride[0];
    launch<StoreKernel<Element>>({in.blocks(), 1, 1}, in.bytes(), call_.context,
                                 {in, rows(memory_.p, part)});
  }

  void value_gradients(const Part& part) {
    for (int m = 0; m < 2; ++m)
      neighborhood::simt::receive(p_.window(m), rows<const A>(memory_.p, part, m),
                                  of(p_.d_o.template as<const Element>(), part, m),
                                  of(p_.d_v.template as<Element>(), part, m), call_.context);
  }

  void score_gradients(const Part& part, bool first) {
    const int64_t count = rows_of(part), taps = p_.weight.size[0];
    for (int m = 0; m < 2; ++m)
      neighborhood::simt::dot(p_.window(m), of(p_.d_o.template as<const Element>(), part, m),
                              of(p_.v.template as<const Element>(), part, m),
                              rows(memory_.ds, part, m), call_.context);
    launch<ScoreKernel<A>>({ceil_div<int64_t>(count, kThreads / 32), 1, 1}, 0, call_.context,
                           {memory_.p, memory_.ds, count, taps, p_.window(0).taps()});
    if (p_.d_affinity) {
      const Ref<Element, 5> d_affinity = of(p_.d_affinity.template as<Element>(), part);
      launch<AffinityKernel<Element>>(
          {blocks(count * p_.centres()), 1, 1}, 0, call_.context,
          {memory_.ds, p_.weight.template as<const Element>(), d_affinity, count * p_.centres()});
    }
    if (memory_.map) map_gradients(part, first);
    for (int m = 0; m < 2; ++m)
      if (memory_.table[m]) table_gradients(m, part);
  }

  void map_gradients(const Part& part, bool first) {
    using Kernel = MapKernel<Element>;
    const int64_t taps = p_.weight.size[0];
    launch<Kernel>({ceil_div<int64_t>(taps, kStep), ceil_div<int64_t>(p_.centres() + 1, kStep),
                    memory_.slices},
                   sizeof(typename Kernel::Smem), call_.context,
                   {memory_.ds, of(p_.affinity.template as<const Element>(), part), memory_.map,
                    rows_of(part), taps, memory_.slices, first});
  }

  void table_gradients(int m, const Part& part) {
    const int64_t entries = p_.window(m).offsets(), groups = p_.groups();
    Ref<A, 3> sums;
    sums.data = memory_.table[m] + (part.first_batch * groups + part.first_group) * entries;
    sums.size[0] = part.batch, sums.size[1] = part.groups, sums.size[2] = entries;
    sums.stride[0] = groups * entries, sums.stride[1] = entries, sums.stride[2] = 1;
    const int64_t count = part.batch * part.groups * entries;
    launch<TableKernel<A>>({blocks(count), 1, 1}, 0, call_.context,
                           {rows<const A>(memory_.ds, part, m), sums, p_.window(m), count});
  }

  void finish() {
    const int64_t taps = p_.weight.size[0], width = p_.centres() + 1;
    const int64_t slice = taps * width;
    if (p_.d_weight)
      sum(memory_.map, memory_.slices, slice, 0, width, matrix(p_.d_weight, p_.centres()));
    if (p_.d_bias) {
      Ref<void, 2> column;
      column.data = p_.d_bias.data, column.size[0] = taps, column.stride[0] = p_.d_bias.stride[0];
      sum(memory_.map + p_.centres(), memory_.slices, slice, 0, width, matrix(column, 1));
    }
    for (int m = 0; m < 2; ++m) {
      if (!p_.d_table(m)) continue;
      const Ref<Element, 3> to = p_.d_table(m).template as<Element>();
      const int64_t entries = to.size[1] * to.size[2];
      sum(memory_.table[m], p_.batch(), p_.groups() * entries, entries, to.size[2], to);
    }
  }

  // [1, T, columns]
  Ref<Element, 3> matrix(const Ref<void, 2>& x, int64_t columns) const {
    Ref<Element, 3> r;
    r.data = static_cast<Element*>(x.data);
    r.size[0] = 1, r.size[1] = x.size[0], r.size[2] = columns;
    r.stride[1] = x.stride[0], r.stride[2] = x.stride[1];
    return r;
  }

  void sum(const A* from, int64_t terms, int64_t step, int64_t outer, int64_t inner,
           const Ref<Element, 3>& to) {
    const int64_t count = to.size[0] * to.size[1] * to.size[2];
    launch<FinishKernel<Element>>({blocks(count), 1, 1}, 0, call_.context,
                                  {from, terms, step, outer, inner, to, count});
  }

  static int64_t blocks(int64_t threads) { return ceil_div<int64_t>(threads, kThreads); }

  const BackwardParams& p_;
  const Call& call_;
  Arena arena_;
  const Workspace<A> memory_;
};

template <class Element>
void backward(const BackwardParams& p, const Call& call) {
  Backward<Element>(p, call).run();
}

}  // namespace hw::contmix::simt
