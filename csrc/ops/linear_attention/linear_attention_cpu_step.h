// SPDX-License-Identifier: Apache-2.0
// One decode step on the CPU: for each (batch entry, key head)
//   S[f, :] += m_f(k) v       z[f] += m_f(k)
//   o_g = sum_f c_f m_f(q_g) S[f, :] / (sum_f c_f m_f(q_g) z[f] + eps)     for the G query heads
// Every state element is read and written once; the loop runs at memory speed.
#pragma once

#include "ops/linear_attention/linear_attention_cpu_chunk.h"

namespace hw::linear_attention {
namespace {

constexpr int kStepVectors = 4;  // columns of the state that are updated together, in vectors

// out[f] = c_f m_f(x)
template <class A>
void expand_row(const FeatureSizes<A>& s, const Coefficients<A>& c, const A* x, A* out) {
  if (s.map == FeatureMap::taylor2) *out++ = 1;
  for (int a = 0; a < s.d; ++a) *out++ = c.linear * x[a];
  if (s.map != FeatureMap::taylor2) return;
  for (int a = 0; a < s.d; ++a) {
    *out++ = c.square * x[a] * x[a];
    for (int b = a + 1; b < s.d; ++b) *out++ = c.cross * x[a] * x[b];
  }
}

template <class A>
struct StepRows {
  const A* phi_k;  // [F]
  const A* phi_q;  // [F] of the first query head that shares the state
  const A* v;      // [Dvp]
  A* o;            // [Dvp] sums of that query head
};

// kVectors vectors of columns of S [F, Dv] (unit stride inside a row): update if asked, and read.
template <bool kUpdate, int kVectors, class A>
void step_columns(int features, const StepRows<A>& r, A* kv, int64_t kv_row) {
  Vec<A> v[kVectors], o[kVectors];
  HW_UNROLL for (int j = 0; j < kVectors; ++j) {
    v[j] = load(r.v + j * kLanes<A>);
    o[j] = Vec<A>{};
  }
  for (int f = 0; f < features; ++f, kv += kv_row) {
    const Vec<A> k = splat(r.phi_k[f]), q = splat(r.phi_q[f]);
    HW_UNROLL for (int j = 0; j < kVectors; ++j) {
      Vec<A> state = load(kv + j * kLanes<A>);
      if constexpr (kUpdate) {
        state = fma(k, v[j], state);
        store(kv + j * kLanes<A>, state);
      }
      o[j] = fma(q, state, o[j]);
    }
  }
  HW_UNROLL for (int j = 0; j < kVectors; ++j) store(r.o + j * kLanes<A>, o[j]);
}

// The same for columns [from, Dv), and for rows whose elements are not adjacent.
template <bool kUpdate, class A>
void step_elements(int features, const StepRows<A>& r, A* kv, int64_t kv_row, int64_t kv_column,
                   int from, int dv) {
  for (int j = from; j < dv; ++j) r.o[j] = 0;
  for (int f = 0; f < features; ++f)
    for (int j = from; j < dv; ++j) {
      A& state = kv[f * kv_row + j * kv_column];
      if constexpr (kUpdate) state += r.phi_k[f] * r.v[j];
      r.o[j] += r.phi_q[f] * state;
    }
}

template <bool kUpdate, class A>
void step_state(const FeatureSizes<A>& s, StepRows<A> r, A* kv, int64_t kv_row, int64_t kv_column) {
  int j = 0;
  if (kv_column == 1) {
    constexpr int kWide = kStepVectors * kLanes<A>;
    for (; j + kWide <= s.dv; j += kWide)
      step_columns<kUpdate, kStepVectors>(
          s.features, StepRows<A>{r.phi_k, r.phi_q, r.v + j, r.o + j}, kv + j, kv_row);
    for (; j + kLanes<A> <= s.dv; j += kLanes<A>)
      step_columns<kUpdate, 1>(s.features, StepRows<A>{r.phi_k, r.phi_q, r.v + j, r.o + j}, kv + j,
                               kv_row);
  }
  step_elements<kUpdate>(s.features, r, kv, kv_row, kv_column, j, s.dv);
}

// One (batch entry, key head).
template <class T>
void step_head(const StepParams& p, const FeatureSizes<Accum<T>>& s, int64_t b, int h) {
  using A = Accum<T>;
  Scratch& scratch = Scratch::of_thread();
  scratch.reset(2 * Scratch::bytes_of<A>(s.features) + 2 * Scratch::bytes_of<A>(s.dvp) +
                Scratch::bytes_of<A>(s.dp));
  A* phi_k = scratch.take<A>(s.features);
  A* phi_q = scratch.take<A>(s.features);
  A* v = scratch.take<A>(s.dvp);
  A* o = scratch.take<A>(s.dvp);
  A* x = scratch.take<A>(s.dp);

  const auto features = [&](Ref<const T, 3> from, int head, const Coefficients<A>& c, A* phi) {
    for (int a = 0; a < s.d; ++a) x[a] = pre_map(s.map, static_cast<A>(from(b, head, a)));
    expand_row(s, c, x, phi);
  };
  const Ref<A, 4> kv = p.kv.as<A>();
  const Ref<A, 3> z = p.z.as<A>();
  features(p.k.as<const T>(), h, key_coefficients(s), phi_k);
  widen(v, p.v.as<const T>().at(b, h), s.dv, p.v.stride[2]);
  for (int f = 0; f < s.features; ++f) z(b, h, f) += phi_k[f];

  for (int g = 0; g < p.group(); ++g) {
    const int head = h * p.group() + g;
    features(p.q.as<const T>(), head, query_coefficients(s), phi_q);
    const StepRows<A> rows{phi_k, phi_q, v, o};
    if (g == 0)
      step_state<true>(s, rows, kv.at(b, h), kv.stride[2], kv.stride[3]);
    else
      step_state<false>(s, rows, kv.at(b, h), kv.stride[2], kv.stride[3]);
    if (p.normalize) {
      A sum = static_cast<A>(p.eps);
      for (int f = 0; f < s.features; ++f) sum += phi_q[f] * z(b, h, f);
      for (int j = 0; j < s.dv; ++j) o[j] = sum != 0 ? o[j] / sum : A(0);
    }
    narrow(p.o.as<T>().at(b, head), o, s.dv, p.o.stride[2]);
  }
}

template <class T>
void step(const StepParams& p, const Call& call) {
  const FeatureSizes<Accum<T>> shape(p.map, p.dim(), p.value_dim(), kLanes<Accum<T>>, p.scale);
  const int heads = p.key_heads();
  parallel_tasks(p.batch() * heads, call.context.num_threads, [&](int64_t task) {
    step_head<T>(p, shape, task / heads, static_cast<int>(task % heads));
  });
}

}  // namespace
}  // namespace hw::linear_attention
