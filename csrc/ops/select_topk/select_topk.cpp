// SPDX-License-Identifier: Apache-2.0
// Selection of the k largest, host side: the list, checks, workspace.
#include "ops/select_topk/select_topk.h"

#include "core/host/registry.h"
#include "core/host/workspace.h"

namespace hw::select_topk {
namespace {

constexpr auto kForwardList = call_list<ForwardParams>(
    in("score", &ForwardParams::score, "R N"), out("index", &ForwardParams::index, "R k").index(),
    flag("keep_order", &ForwardParams::keep_order));

void check_forward(const ForwardParams& p, const Call&) {
  check(p.k() <= p.count(), ErrorKind::value, "select_topk: k is ", p.k(), ", a row has ",
        p.count(), " scores");
}

std::string why_not(const ForwardParams&, const Call&, Backend backend) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "select_topk has no matrix product; simt is its CUDA backend";
  return {};
}

// The selected in the order of the row, before they are ranked.
int64_t workspace(const ForwardParams& p, const Call&, Backend) {
  Arena arena;
  if (!p.keep_order) arena.take<int64_t>(p.rows() * p.k());
  return arena.bytes();
}

constexpr Questions<ForwardParams> kForward{
    .check = &check_forward, .why_not = &why_not, .workspace = &workspace};

constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {"select_topk", kFunctions};

}  // namespace hw::select_topk
