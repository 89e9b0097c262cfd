// SPDX-License-Identifier: Apache-2.0
// Linear attention, host side: the lists of its functions, checks, and what each backend can take.
#include "ops/linear_attention/linear_attention.h"

#include "ops/linear_attention/linear_attention_simt_layout.h"
#include "ops/linear_attention/linear_attention_sm80_layout.h"

#include "core/host/registry.h"

namespace hw::linear_attention {
namespace {

constexpr const char* kName = "linear_attention";

using F = ForwardParams;
using B = BackwardParams;

// Of both passes. F: features, N: sequences.
constexpr auto kInputs = arguments(
    in("q", &F::q, "B S Hq D"), in("k", &F::k, "B S H D"), in("v", &F::v, "B S H Dv"),
    in("kv0", &F::kv0, "N H F Dv").wide().optional(), in("z0", &F::z0, "N H F").wide().optional(),
    in("cu_seqlens", &F::cu_seqlens, "N+1").index().optional(), choice("feature_map", &F::map, 4),
    flag("causal", &F::causal), flag("normalize", &F::normalize), number("scale", &F::scale),
    number("eps", &F::eps));

constexpr auto kForwardList = call_list<ForwardParams>(
    kInputs, out("o", &F::o, "B S Hq Dv"), out("z", &F::z, "B S Hq").wide().optional(),
    out("kv1", &F::kv1, "N H F Dv").wide().optional(),
    out("z1", &F::z1, "N H F").wide().optional());

constexpr auto kBackwardList = call_list<BackwardParams>(
    kInputs, in("o", &F::o, "B S Hq Dv"), in("z", &F::z, "B S Hq").wide().optional(),
    in("d_o", &B::d_o, "B S Hq Dv"), in("d_kv1", &B::d_kv1, "N H F Dv").wide().optional(),
    in("d_z1", &B::d_z1, "N H F").wide().optional(), out("d_q", &B::d_q, "B S Hq D"),
    out("d_k", &B::d_k, "B S H D"), out("d_v", &B::d_v, "B S H Dv"),
    out("d_kv0", &B::d_kv0, "N H F Dv").wide().optional(),
    out("d_z0", &B::d_z0, "N H F").wide().optional());

constexpr auto kStepList = call_list<StepParams>(
    in("q", &StepParams::q, "B Hq D"), in("k", &StepParams::k, "B H D"),
    in("v", &StepParams::v, "B H Dv"), inout("kv", &StepParams::kv, "B H F Dv").wide(),
    inout("z", &StepParams::z, "B H F").wide(), out("o", &StepParams::o, "B Hq Dv"),
    choice("feature_map", &StepParams::map, 4), flag("normalize", &StepParams::normalize),
    number("scale", &StepParams::scale), number("eps", &StepParams::eps));

// ---- Checks -------------------------------------------------------------------------------------

template <class P>
void check_features(const P& p) {
  constexpr int kHeads = std::is_same_v<P, StepParams> ? 1 : 2;
  check_narrow(kName, "the number of heads", p.q.size[kHeads]);
  check_narrow(kName, "the number of heads of k", p.k.size[kHeads]);
  check_narrow(kName, "the head dim", p.q.size[kHeads + 1]);
  check_narrow(kName, "the number of columns of v", p.v.size[kHeads + 1]);
  check(p.key_heads() > 0 ? p.query_heads() % p.key_heads() == 0 : p.query_heads() == 0,
        ErrorKind::value, "linear_attention: q has ", p.query_heads(),
        " heads, not a multiple of the ", p.key_heads(), " heads of k");
  check(p.map != FeatureMap::taylor2 || p.dim() <= kMaxTaylorDim, ErrorKind::value,
        "linear_attention: feature_map='taylor2' takes D <= ", kMaxTaylorDim,
        ", got D = ", p.dim());
}

// A state: both tensors or none, of `sequences` and `features`.
template <class T, class U>
void check_state(const Ref<T, 4>& kv, const Ref<U, 3>& z, int64_t sequences, int64_t features) {
  check_together(kName, "both tensors of a state", bool(kv), bool(z));
  check(!kv || (kv.size[0] == sequences && kv.size[2] == features), ErrorKind::value,
        "linear_attention: a state is of ", kv.size[0], " sequences and ", kv.size[2],
        " features, expected ", sequences, " and ", features);
}

void check_inputs(const ForwardParams& p, const Call& call) {
  check_features(p);
  if (p.cu_seqlens) check_bounds(kName, "cu_seqlens", p.cu_seqlens, call, p.q.size[0], p.q.size[1]);
  check_state(p.kv0, p.z0, p.sequences(), p.features());
}

void check_forward(const ForwardParams& p, const Call& call) {
  check_inputs(p, call);
  check_state(p.kv1, p.z1, p.sequences(), p.features());
}

void check_backward(const BackwardParams& p, const Call& call) {
  check_inputs(p, call);
  check_state(p.d_kv1, p.d_z1, p.sequences(), p.features());
  check_state(p.d_kv0, p.d_z0, p.sequences(), p.features());
  const bool some = p.q.size[0] * p.q.size[1] * p.q.size[2] > 0;
  check(!p.normalize || p.z || !some, ErrorKind::value, "linear_attention: z is missing");
}

void check_step(const StepParams& p, const Call&) {
  check_features(p);
  check_state(p.kv, p.z, p.batch(), p.features());
}

// ---- Backends -----------------------------------------------------------------------------------

std::string why_not_forward(const ForwardParams& p, const Call&, Backend b) {
  return b == Backend::sm80 ? sm80::why_not(p) : std::string();
}
std::string why_not_backward(const BackwardParams& p, const Call&, Backend b) {
  return b == Backend::sm80 ? sm80::why_not_backward(p) : std::string();
}
std::string why_not_step(const StepParams&, const Call&, Backend b) {
  if (b == Backend::sm80) return "a decode step has no matrix product; simt is its CUDA backend";
  return {};
}

// Compared with the value tiles of the tensor-core instances; the other backends take any Dv.
template <class P, bool kGradients>
int value_tile(const P& p, const Call& call, Backend b) {
  return b == Backend::sm80 ? sm80::dim(p, kGradients, call) : 0;
}

int64_t workspace(const ForwardParams& p, const CallSizes& s, bool gradients, const Call& call,
                  Backend b) {
  if (b == Backend::sm80)
    return sm80::workspace_bytes(gradients, s, sm80::tile_of(p, gradients, call));
  return simt::workspace_bytes(s, p.map, call.element, gradients);
}
int64_t forward_workspace(const ForwardParams& p, const Call& call, Backend b) {
  return workspace(p, forward_shape(p, call.context), false, call, b);
}
int64_t backward_workspace(const BackwardParams& p, const Call& call, Backend b) {
  return workspace(p, backward_shape(p, call.context), true, call, b);
}

constexpr Questions<ForwardParams> kForward{.check = &check_forward,
                                            .why_not = &why_not_forward,
                                            .dim = &value_tile<ForwardParams, false>,
                                            .workspace = &forward_workspace};
constexpr Questions<BackwardParams> kBackward{.check = &check_backward,
                                              .why_not = &why_not_backward,
                                              .dim = &value_tile<BackwardParams, true>,
                                              .workspace = &backward_workspace};
constexpr Questions<StepParams> kStep{.check = &check_step, .why_not = &why_not_step};

constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward"),
                                   function<kBackwardList, kBackward>("backward"),
                                   function<kStepList, kStep>("step")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {kName, kFunctions};

}  // namespace hw::linear_attention
