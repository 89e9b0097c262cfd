// SPDX-License-Identifier: Apache-2.0
// Selection of the k largest, host side: arguments of a call, checks, workspace.
#include "ops/select_topk/select_topk.h"

#include "core/host/arguments.h"
#include "core/host/registry.h"

namespace hw::select_topk {
namespace {

constexpr const char* kFunctions[] = {"forward"};
constexpr Argument kTensors[] = {{"score", "RN"}, {"index", "Rk", Kind::index}};
constexpr Signature kSignatures[] = {{kTensors, 1}};

void check_call(int, const Call& call) {
  const ForwardParams p = forward_params(call);
  check(p.k() <= p.count(), ErrorKind::value, "select_topk: k is ", p.k(), ", a row has ",
        p.count(), " scores");
}

std::string why_not(int, Backend backend, const Call&) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "select_topk has no matrix product; simt is its CUDA backend";
  return {};
}

int any_dim(int, Backend, const Call&) { return 0; }

// The selected in the order of the row, before they are ranked.
int64_t workspace(int, Backend backend, const Call& call) {
  const ForwardParams p = forward_params(call);
  if (backend != Backend::simt || p.keep_order) return 0;
  return p.rows() * p.k() * static_cast<int64_t>(sizeof(int64_t));
}

}  // namespace

ForwardParams forward_params(const Call& call) {
  Arguments a(call);
  ForwardParams p;
  p.score = a.input<2>();
  p.index = a.output<2>().as<int64_t>();
  p.keep_order = a.flag();
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {"select_topk", kFunctions, kSignatures, &check_call,
                            &why_not,      &any_dim,   &workspace};

}  // namespace hw::select_topk
