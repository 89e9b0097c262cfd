// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: rows and numbers of a source that does not gather, as loads take them;
// gather.cuh has those of one that does.
#pragma once

#include "softmax/key_source.h"

#include "core/gpu/streams.cuh"
#include "core/gpu/tile.cuh"

namespace hw::softmax::sm80 {

// Rows of a tensor [B, S, heads, columns]: tokens from `first` of the tensor on, `count` (> 0) of
// them.
template <class Element>
HW_DEVICE HW_INLINE Rows<Element> token_rows(const Input<Element>& x, int64_t batch, int head,
                                             int64_t first, int64_t count) {
  Rows<Element> rows;
  rows.origin = x.ref.at(batch, first, head);
  rows.row = x.ref.stride[1];
  rows.column = x.ref.stride[3];
  rows.count = static_cast<int>(min_of<int64_t>(count, 1 << 20));
  rows.columns = static_cast<int>(x.ref.size[3]);
  rows.aligned = x.aligned;
  rows.whole = x.whole;
  return rows;
}

template <class Element, KeySource Source>
HW_DEVICE HW_INLINE Rows<Element> query_rows(const Input<Element>& x, const Source&,
                                             const WorkItem& w, int64_t row) {
  return token_rows(x, w.at.batch, w.head, w.at.q_begin + row, w.at.q_count - row);
}
template <class Element, KeySource Source>
HW_DEVICE HW_INLINE Rows<Element> key_rows(const Input<Element>& x, const Source& source,
                                           const WorkItem& w, int64_t key) {
  return token_rows(x, source.key_batch(w), w.key_head, w.at.k_begin + key, w.at.k_count - key);
}

// Numbers [B, Hq, S] (acc) of keys from `key` on.
HW_DEVICE HW_INLINE NumberArray key_array(const Ref<const void, 3>& x, const WorkItem& w,
                                          int64_t key) {
  if (!x) return {};
  const Ref<const float, 3> from = x.as<const float>();
  return {from.at(w.at.batch, w.head, w.at.k_begin + key), from.stride[2]};
}

// Starts loading numbers [B, Hq, S] (acc) of kCount keys or queries into `to`; none where absent.
template <int kCount, int kThreads, KeySource Source>
HW_DEVICE HW_INLINE void key_numbers(float* to, const Ref<const void, 3>& x, const Source&,
                                     const WorkItem& w, int64_t key) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers<kCount, kThreads>(to, from.at(w.at.batch, w.head, w.at.k_begin + key),
                                 from.stride[2], w.at.k_count - key);
}
template <int kCount, int kThreads, int kPitch, KeySource Source>
HW_DEVICE HW_INLINE void query_numbers(float* to, const Ref<const void, 3>& x, const Source&,
                                       const WorkItem& w, int64_t row) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers<kCount, kThreads, kPitch>(to, from.at(w.at.batch, w.head, w.at.q_begin + row),
                                         from.stride[2], w.at.q_count - row);
}
// The same of [B, Sq, Hq].
template <int kCount, int kThreads, KeySource Source>
HW_DEVICE HW_INLINE void temperatures(float* to, const Ref<const void, 3>& x, const Source&,
                                      const WorkItem& w, int64_t row) {
  if (!x) return;
  const Ref<const float, 3> from = x.as<const float>();
  load_numbers<kCount, kThreads>(to, from.at(w.at.batch, w.at.q_begin + row, w.head),
                                 from.stride[1], w.at.q_count - row);
}

}  // namespace hw::softmax::sm80
