// SPDX-License-Identifier: Apache-2.0
// Rows of mixture-of-heads attention, host side: the list.
#include "ops/moh_route/moh_route.h"

#include "core/host/registry.h"

namespace hw::moh_route {
namespace {

constexpr auto kForwardList = call_list<ForwardParams>(
    in("gate", &ForwardParams::gate, "B S H"), out("rows", &ForwardParams::rows, "B H S").index());

std::string why_not(const ForwardParams&, const Call&, Backend backend) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "moh_route multiplies nothing; simt is its CUDA backend";
  return {};
}

constexpr Questions<ForwardParams> kForward{.why_not = &why_not};

constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {"moh_route", kFunctions};

}  // namespace hw::moh_route
