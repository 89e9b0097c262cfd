// SPDX-License-Identifier: Apache-2.0
// Softmax-type attention, host side: arguments of a call, checks, and what each backend can take.
#include "ops/attention/attention.h"

#include "ops/attention/attention_simt_layout.cuh"
#include "ops/attention/attention_sm80_layout.cuh"

#include "core/arguments.h"
#include "core/registry.h"

namespace hw::attention {
namespace {

enum Function { kForward = 0, kBackward = 1, kColumns = 2, kProbs = 3 };
constexpr const char* kFunctions[] = {"forward", "backward", "columns", "probs"};

void read_scores(Arguments& a, ScoreParams& p) {
  p.q = a.input<4>(), p.k = a.input<4>(), p.bias = a.input<4>();
  p.key_bias = a.input<3>(), p.key_gain = a.input<3>(), p.row_temperature = a.input<3>();
  p.cu_seqlens_q = a.output<1>().as<const int64_t>();
  p.cu_seqlens_k = a.output<1>().as<const int64_t>();
}

void read_scalars(Arguments& a, ScoreParams& p) {
  p.scale = a.scalar(), p.softcap = a.scalar();
  p.causal = a.flag();
  p.left = a.integer(), p.right = a.integer();
  p.activation = static_cast<Activation>(a.integer());
  p.normalizer = static_cast<Normalizer>(a.integer());
  p.gain_begin = a.integer(), p.gain_end = a.integer();
  p.max_q = a.integer(), p.max_k = a.integer();
}

void check_call(int function, const Call& call) {
  switch (function) {
    case kForward: return check_scores(forward_params(call));
    case kBackward: return check_scores(backward_params(call));
    case kColumns: return check_scores(columns_params(call));
    default: return check_scores(probs_params(call));
  }
}

std::string why_not(int, Backend, const Call&) { return {}; }

// Compared with the widths of the tensor-core instances; the other backends take any.
int width(int, Backend backend, const Call& call) {
  return backend == Backend::sm80 ? sm80::dim(call) : 0;
}

int64_t workspace(int function, Backend backend, const Call& call) {
  if (backend == Backend::simt && function == kForward) return simt::workspace_bytes(call);
  if (backend == Backend::sm80 && function == kForward) return sm80::workspace_bytes(call);
  return 0;
}

}  // namespace

void check_scores(const ScoreParams& p) {
  check(p.q.size[3] == p.k.size[3], ErrorKind::value, "attention: q has head dim ", p.q.size[3],
        ", k has ", p.k.size[3]);
  check(p.key_heads() == 0 || p.query_heads() % p.key_heads() == 0, ErrorKind::value,
        "attention: q has ", p.query_heads(), " heads, not a multiple of the ", p.key_heads(),
        " heads of k");
  check(p.packed() == (p.cu_seqlens_k.data != nullptr), ErrorKind::value,
        "attention: cu_seqlens_q and cu_seqlens_k go together");
  check(!p.bias || !p.packed(), ErrorKind::value,
        "attention: bias [B, H, Sq, Sk] has no meaning for packed sequences");
}

void read_forward(Arguments& a, ForwardParams& p) {
  read_scores(a, p);
  p.v = a.input<4>(), p.head_gate = a.input<3>(), p.identity_mix = a.input<2>();
  p.mass_keys = a.input<3>();
  p.o = a.output<4>(), p.w = a.output<4>(), p.row = a.output<3>();
  p.entropy = a.output<3>(), p.p_max = a.output<3>();
  p.sq_norm = a.output<3>(), p.mass = a.output<3>();
  read_scalars(a, p);
  p.skip_dead = a.flag();
}

ForwardParams forward_params(const Call& call) {
  Arguments a(call);
  ForwardParams p;
  read_forward(a, p);
  return p;
}

void read_backward(Arguments& a, BackwardParams& p) {
  read_scores(a, p);
  p.v = a.input<4>(), p.d_w = a.input<4>(), p.row = a.input<3>(), p.delta = a.input<3>();
  p.d_q = a.output<4>(), p.d_k = a.output<4>(), p.d_v = a.output<4>(), p.d_bias = a.output<4>();
  p.d_key_bias = a.output<3>(), p.d_key_gain = a.output<3>();
  p.d_row_temperature = a.output<3>();
  read_scalars(a, p);
}

BackwardParams backward_params(const Call& call) {
  Arguments a(call);
  BackwardParams p;
  read_backward(a, p);
  return p;
}

ColumnsParams columns_params(const Call& call) {
  Arguments a(call);
  ColumnsParams p;
  read_scores(a, p);
  p.x = a.input<4>(), p.row = a.input<3>(), p.row_weight = a.input<3>();
  p.y = a.output<4>(), p.sum = a.output<3>(), p.max = a.output<3>();
  read_scalars(a, p);
  return p;
}

ProbsParams probs_params(const Call& call) {
  Arguments a(call);
  ProbsParams p;
  read_scores(a, p);
  p.row = a.input<3>();
  p.keys = a.output<2>().as<const int64_t>();
  p.rows = a.output<2>().as<const int64_t>();
  p.offsets = a.output<1>().as<const int64_t>();
  p.p = a.output<4>();
  read_scalars(a, p);
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {"attention", kFunctions, &check_call, &why_not, &width, &workspace};

}  // namespace hw::attention
