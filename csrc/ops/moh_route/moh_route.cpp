// SPDX-License-Identifier: Apache-2.0
// Rows of mixture-of-heads attention, host side: arguments of a call and checks.
#include "ops/moh_route/moh_route.h"

#include "core/host/arguments.h"
#include "core/host/registry.h"

namespace hw::moh_route {
namespace {

constexpr const char* kFunctions[] = {"forward"};
constexpr Argument kTensors[] = {{"gate", "BSH"}, {"rows", "BHS", Kind::index}};
constexpr Signature kSignatures[] = {{kTensors, 0}};

void check_call(int, const Call&) {}

std::string why_not(int, Backend backend, const Call&) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "moh_route multiplies nothing; simt is its CUDA backend";
  return {};
}

int any_dim(int, Backend, const Call&) { return 0; }
int64_t no_workspace(int, Backend, const Call&) { return 0; }

}  // namespace

ForwardParams forward_params(const Call& call) {
  Arguments a(call);
  ForwardParams p;
  p.gate = a.input<3>();
  p.rows = a.output<3>().as<int64_t>();
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {"moh_route", kFunctions, kSignatures,  &check_call,
                            &why_not,    &any_dim,   &no_workspace};

}  // namespace hw::moh_route
