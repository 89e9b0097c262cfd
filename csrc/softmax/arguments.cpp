// SPDX-License-Identifier: Apache-2.0
#include "softmax/arguments.h"

#include "core/math.h"

namespace hw::softmax {
namespace {

int64_t slice_end(int64_t end, int64_t rows) {
  return end < 0 ? max_of<int64_t>(end + rows, 0) : min_of(end, rows);
}

}  // namespace

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
  check(!p.identity_mix || p.q.size[1] == p.k.size[1], ErrorKind::value, op,
        ": identity_mix takes as many queries as keys, got ", p.q.size[1], " and ", p.k.size[1]);
}

void check_statistic(const char* op, const ScoreParams& p, const Ref<const void, 3>& row) {
  check(!p.has_row_statistic() || row, ErrorKind::value, op, ": row is missing");
}

}  // namespace hw::softmax
