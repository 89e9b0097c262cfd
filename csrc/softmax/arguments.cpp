// SPDX-License-Identifier: Apache-2.0
#include "softmax/arguments.h"

#include "core/math.h"

namespace hw::softmax {
namespace {

int64_t slice_end(int64_t end, int64_t rows) {
  return end < 0 ? max_of<int64_t>(end + rows, 0) : min_of(end, rows);
}

// A single row's heads as G rows of H heads; `row`, `head`: the dimensions of these.
template <class T, int N>
void pack(Ref<T, N>& x, int row, int head, int64_t group) {
  if (!x) return;
  const int64_t step = x.stride[head];
  x.size[row] = group, x.stride[row] = step;
  x.size[head] /= group, x.stride[head] = group * step;
}

// Leaves out the first `count` of a dimension.
template <int N>
void skip(Ref<const void, N>& x, int dimension, int64_t count, DType type) {
  if (!x) return;
  x.data = static_cast<const char*>(x.data) + count * x.stride[dimension] * dtype_size(type);
  x.size[dimension] -= count;
}

}  // namespace

void pack_query_heads(ForwardParams& p, DType element) {
  const int heads = p.key_heads();
  bool per_head = p.sink || p.identity_mix || p.head_gate;
  for (const Ref<const void, 3>* x : {&p.key_bias, &p.key_gain, &p.mass_keys})
    per_head |= *x && x->stride[1] != 0;
  if (p.packed() || p.q.size[1] != 1 || per_head || heads == 0) return;
  const int64_t group = p.group();
  if (group < 2 || p.query_heads() != heads * group || p.k.size[1] == 0) return;

  const int64_t last = p.k.size[1] - 1;
  const int64_t first = p.left < 0 ? 0 : max_of<int64_t>(last - p.left, 0);
  p.causal = false, p.left = p.right = -1;
  skip(p.k, 1, first, element), skip(p.v, 1, first, element), skip(p.bias, 3, first, element);
  const DType wide = element == DType::f64 ? DType::f64 : DType::f32;
  for (Ref<const void, 3>* x : {&p.key_bias, &p.key_gain, &p.mass_keys}) {
    skip(*x, 2, first, wide);
    x->size[1] = heads;
  }
  if (p.gain_begin <= 0 && p.gain_end > 0) p.gain_end = group;
  pack(p.q, 1, 2, group), pack(p.o, 1, 2, group), pack(p.w, 1, 2, group);
  pack(p.bias, 2, 1, group);
  pack(p.row_temperature, 1, 2, group);
  for (Ref<void, 3>* x : {&p.row, &p.rest, &p.entropy, &p.p_max, &p.sq_norm, &p.mass})
    pack(*x, 2, 1, group);
  p.max_q = group, p.max_k = p.k.size[1];
}

void complete_scores(ScoreParams& p) {
  const int64_t rows = p.q.size[1], keys = p.k.size[1];
  if (p.packed()) {  // A bound of lengths may be anything; the work is cut by what there can be.
    p.max_q = min_of(p.max_q, rows), p.max_k = min_of(p.max_k, keys);
    p.gain_end = min_of(p.gain_end, rows);
  } else {
    p.max_q = rows, p.max_k = keys;
    p.gain_begin = slice_end(p.gain_begin, rows), p.gain_end = slice_end(p.gain_end, rows);
  }
}

void check_scores(const char* op, const ScoreParams& p, const Call& call) {
  check_narrow(op, "the number of heads", p.q.size[2]);
  check_narrow(op, "the number of heads of k", p.k.size[2]);
  check_narrow(op, "the head dim", p.q.size[3]);
  check(p.k.size[2] > 0 ? p.q.size[2] % p.k.size[2] == 0 : p.q.size[2] == 0, ErrorKind::value, op,
        ": q has ", p.q.size[2], " heads, not a multiple of the ", p.k.size[2], " heads of k");
  check_together(op, "cu_seqlens_q and cu_seqlens_k", bool(p.cu_seqlens_q), bool(p.cu_seqlens_k));
  if (!p.packed()) return;
  check(p.max_q >= 0 && p.max_k >= 0, ErrorKind::value, op, ": the longest sequences have ",
        p.max_q, " and ", p.max_k, " tokens, expected bounds of at least 0");
  check(!p.bias, ErrorKind::value, op, ": bias [B, H, Sq, Sk] has no meaning for packed sequences");
  check_bounds(op, "cu_seqlens_q", p.cu_seqlens_q, call, p.q.size[0], p.q.size[1]);
  check_bounds(op, "cu_seqlens_k", p.cu_seqlens_k, call, p.k.size[0], p.k.size[1]);
}

void check_forward(const char* op, const ForwardParams& p) {
  check_narrow(op, "the number of columns of v", p.v.size[3]);
  check_together(op, "v and o", bool(p.v), bool(p.o));
  check(p.v || !(p.identity_mix || p.w), ErrorKind::value, op, ": v is missing");
  check_together(op, "mass_keys and mass", bool(p.mass_keys), bool(p.mass));
  const bool of_rows = p.w || p.row || p.entropy || p.p_max || p.sq_norm || p.mass;
  check(!p.skip_dead || !of_rows, ErrorKind::value, op,
        ": skip_dead leaves out rows: it goes with o alone, not with w, row or a read-out");
  check(!p.identity_mix || p.q.size[1] == p.k.size[1], ErrorKind::value, op,
        ": identity_mix takes as many queries as keys, got ", p.q.size[1], " and ", p.k.size[1]);
}

void check_statistic(const char* op, const ScoreParams& p, const Ref<const void, 3>& row) {
  check(!p.has_row_statistic() || row, ErrorKind::value, op, ": row is missing");
}

}  // namespace hw::softmax
