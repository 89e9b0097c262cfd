// SPDX-License-Identifier: Apache-2.0
// Linear attention, host side: arguments of a call, checks, and what each backend can take.
#include "ops/linear_attention/linear_attention.h"

#include "ops/linear_attention/linear_attention_simt_layout.cuh"
#include "ops/linear_attention/linear_attention_sm80_layout.cuh"

#include "core/arguments.h"
#include "core/registry.h"

namespace hw::linear_attention {
namespace {

enum Function { kForward = 0, kBackward = 1, kStep = 2 };
constexpr const char* kFunctions[] = {"forward", "backward", "step"};

void read_scalars(Arguments& a, ForwardParams& p) {
  p.map = static_cast<FeatureMap>(a.integer());
  p.causal = a.flag();
  p.normalize = a.flag();
  p.scale = a.scalar();
  p.eps = a.scalar();
}

template <class Params>
void check_features(const Params& p) {
  check(p.key_heads() == 0 || p.query_heads() % p.key_heads() == 0, ErrorKind::value,
        "linear_attention: q has ", p.query_heads(), " heads, not a multiple of the ",
        p.key_heads(), " heads of k");
  check(p.map != FeatureMap::taylor2 || p.dim() <= kMaxTaylorDim, ErrorKind::value,
        "linear_attention: feature_map='taylor2' takes D <= ", kMaxTaylorDim,
        ", got D = ", p.dim());
}

void check_call(int function, const Call& call) {
  if (function == kForward) check_features(forward_params(call));
  if (function == kBackward) check_features(backward_params(call));
  if (function == kStep) check_features(step_params(call));
}

std::string why_not(int function, Backend backend, const Call& call) {
  if (backend != Backend::sm80) return {};
  if (function == kStep) return "a decode step has no matrix product; simt is its CUDA backend";
  return sm80::why_not(static_cast<sm80::Pass>(function), call);
}

// Compared with the value tiles of the tensor-core instances; the other backends take any Dv.
int value_tile(int, Backend backend, const Call& call) {
  return backend == Backend::sm80 ? sm80::dim(call) : 0;
}

int64_t workspace(int function, Backend backend, const Call& call) {
  if (function == kStep || backend == Backend::cpu) return 0;
  if (backend == Backend::sm80)
    return sm80::workspace_bytes(static_cast<sm80::Pass>(function), call);
  return simt::workspace_bytes(static_cast<simt::Pass>(function), call);
}

}  // namespace

ForwardParams forward_params(const Call& call) {
  Arguments a(call);
  ForwardParams p;
  p.q = a.input<4>(), p.k = a.input<4>(), p.v = a.input<4>();
  p.o = a.output<4>(), p.z = a.output<3>();
  p.kv0 = a.input<4>(), p.z0 = a.input<3>();
  p.kv1 = a.output<4>(), p.z1 = a.output<3>();
  p.cu_seqlens = a.output<1>().as<const int64_t>();
  read_scalars(a, p);
  return p;
}

BackwardParams backward_params(const Call& call) {
  Arguments a(call);
  BackwardParams p;
  p.q = a.input<4>(), p.k = a.input<4>(), p.v = a.input<4>();
  p.o = a.output<4>(), p.z = a.output<3>();
  p.kv0 = a.input<4>(), p.z0 = a.input<3>();
  p.cu_seqlens = a.output<1>().as<const int64_t>();
  p.d_o = a.input<4>();
  p.d_kv1 = a.input<4>(), p.d_z1 = a.input<3>();
  p.d_q = a.output<4>(), p.d_k = a.output<4>(), p.d_v = a.output<4>();
  p.d_kv0 = a.output<4>(), p.d_z0 = a.output<3>();
  read_scalars(a, p);
  return p;
}

StepParams step_params(const Call& call) {
  Arguments a(call);
  StepParams p;
  p.q = a.input<3>(), p.k = a.input<3>(), p.v = a.input<3>();
  p.kv = a.output<4>(), p.z = a.output<3>();
  p.o = a.output<3>();
  p.map = static_cast<FeatureMap>(a.integer());
  p.normalize = a.flag();
  p.scale = a.scalar();
  p.eps = a.scalar();
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {"linear_attention", kFunctions,  &check_call,
                            &why_not,           &value_tile, &workspace};

}  // namespace hw::linear_attention
