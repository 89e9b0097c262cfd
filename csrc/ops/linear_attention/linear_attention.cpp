// SPDX-License-Identifier: Apache-2.0
// Linear attention, host side: arguments of a call, checks, and what each backend can take.
#include "ops/linear_attention/linear_attention.h"

#include "ops/linear_attention/linear_attention_simt_layout.h"
#include "ops/linear_attention/linear_attention_sm80_layout.h"

#include "core/host/arguments.h"
#include "core/host/registry.h"

namespace hw::linear_attention {
namespace {

constexpr const char* kName = "linear_attention";
enum Function { kForward = 0, kBackward = 1, kStep = 2 };
constexpr const char* kFunctions[] = {"forward", "backward", "step"};

// Q: query heads, V: columns of v, N: sequences.
constexpr Argument kForwardTensors[] = {{"q", "BSQD"},
                                        {"k", "BSHD"},
                                        {"v", "BSHV"},
                                        {"o", "BSQV"},
                                        {"z", "BSQ", Kind::wide, Need::optional},
                                        {"kv0", "NHFV", Kind::wide, Need::optional},
                                        {"z0", "NHF", Kind::wide, Need::optional},
                                        {"kv1", "NHFV", Kind::wide, Need::optional},
                                        {"z1", "NHF", Kind::wide, Need::optional},
                                        {"cu_seqlens", "n", Kind::index, Need::optional}};
constexpr Argument kBackwardTensors[] = {{"q", "BSQD"},
                                         {"k", "BSHD"},
                                         {"v", "BSHV"},
                                         {"o", "BSQV"},
                                         {"z", "BSQ", Kind::wide, Need::optional},
                                         {"kv0", "NHFV", Kind::wide, Need::optional},
                                         {"z0", "NHF", Kind::wide, Need::optional},
                                         {"cu_seqlens", "n", Kind::index, Need::optional},
                                         {"d_o", "BSQV"},
                                         {"d_kv1", "NHFV", Kind::wide, Need::optional},
                                         {"d_z1", "NHF", Kind::wide, Need::optional},
                                         {"d_q", "BSQD"},
                                         {"d_k", "BSHD"},
                                         {"d_v", "BSHV"},
                                         {"d_kv0", "NHFV", Kind::wide, Need::optional},
                                         {"d_z0", "NHF", Kind::wide, Need::optional}};
constexpr Argument kStepTensors[] = {
    {"q", "BQD"}, {"k", "BHD"}, {"v", "BHV"}, {"kv", "BHFV", Kind::wide}, {"z", "BHF", Kind::wide},
    {"o", "BQV"}};
constexpr Signature kSignatures[] = {
    {kForwardTensors, 5}, {kBackwardTensors, 5}, {kStepTensors, 4}};

FeatureMap read_map(Arguments& a) {
  const int64_t map = a.integer();
  check(map >= 0 && map <= 3, ErrorKind::value, "linear_attention: there is no feature map ", map);
  return static_cast<FeatureMap>(map);
}

void read_scalars(Arguments& a, ForwardParams& p) {
  p.map = read_map(a);
  p.causal = a.flag();
  p.normalize = a.flag();
  p.scale = a.scalar();
  p.eps = a.scalar();
}

template <class Params>
void check_features(const Params& p, const Call& call) {
  const int heads = call.tensor(0).ndim - 2;
  check_narrow(kName, "the number of heads", call.tensor(0).size[heads]);
  check_narrow(kName, "the number of heads of k", call.tensor(1).size[heads]);
  check_narrow(kName, "the head dim", call.tensor(0).size[heads + 1]);
  check_narrow(kName, "the number of columns of v", call.tensor(2).size[heads + 1]);
  check(p.key_heads() > 0 ? p.query_heads() % p.key_heads() == 0 : p.query_heads() == 0,
        ErrorKind::value, "linear_attention: q has ", p.query_heads(),
        " heads, not a multiple of the ", p.key_heads(), " heads of k");
  check(p.map != FeatureMap::taylor2 || p.dim() <= kMaxTaylorDim, ErrorKind::value,
        "linear_attention: feature_map='taylor2' takes D <= ", kMaxTaylorDim,
        ", got D = ", p.dim());
}

// States, pairs of tensors from number `tensor` on: both or none, of `sequences` and `features`.
void check_states(const Call& call, std::initializer_list<int> tensors, int64_t sequences,
                  int64_t features) {
  for (const int i : tensors) {
    check_together(kName, call, i, i + 1, "both tensors of a state");
    const Tensor& kv = call.tensor(i);
    if (!kv.present()) continue;
    check(kv.size[0] == sequences && kv.size[2] == features, ErrorKind::value,
          "linear_attention: a state is of ", kv.size[0], " sequences and ", kv.size[2],
          " features, expected ", sequences, " and ", features);
  }
}

template <class Params>
void check_sequences(const Params& p, const Call& call, int cu_seqlens,
                     std::initializer_list<int> states) {
  check_features(p, call);
  const Tensor &bounds = call.tensor(cu_seqlens), &q = call.tensor(0);
  if (bounds.present()) check_bounds(kName, "cu_seqlens", bounds, q.size[0], q.size[1]);
  check_states(call, states, bounds.present() ? bounds.size[0] - 1 : q.size[0], p.features());
}

void check_step(const Call& call) {
  const StepParams p = step_params(call);
  check_features(p, call);
  check_states(call, {3}, p.batch(), p.features());
}

void check_backward(const Call& call) {
  const BackwardParams p = backward_params(call);
  check_sequences(p, call, 7, {5, 9, 14});
  check(!p.normalize || call.tensor(4).present(), ErrorKind::value,
        "linear_attention: z is missing");
}

void check_call(int function, const Call& call) {
  switch (function) {
    case kForward: return check_sequences(forward_params(call), call, 9, {5, 7});
    case kBackward: return check_backward(call);
    default: return check_step(call);
  }
}

std::string why_not(int function, Backend backend, const Call& call) {
  if (backend != Backend::sm80) return {};
  if (function == kStep) return "a decode step has no matrix product; simt is its CUDA backend";
  return sm80::why_not(static_cast<sm80::Pass>(function), call);
}

// Compared with the value tiles of the tensor-core instances; the other backends take any Dv.
int value_tile(int function, Backend backend, const Call& call) {
  return backend == Backend::sm80 ? sm80::dim(static_cast<sm80::Pass>(function), call) : 0;
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
  p.map = read_map(a);
  p.normalize = a.flag();
  p.scale = a.scalar();
  p.eps = a.scalar();
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {kName,    kFunctions,  kSignatures, &check_call,
                            &why_not, &value_tile, &workspace};

}  // namespace hw::linear_attention
