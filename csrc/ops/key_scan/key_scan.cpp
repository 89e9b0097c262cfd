// SPDX-License-Identifier: Apache-2.0
// Key scan, host side: arguments of a call, and what each backend can take.
#include "ops/key_scan/key_scan.h"

#include "ops/key_scan/key_scan_simt_layout.cuh"

#include "core/arguments.h"
#include "core/registry.h"

namespace hw::key_scan {
namespace {

constexpr const char* kFunctions[] = {"forward", "backward"};

void check_call(int function, const Call& call) {
  const ForwardParams p = function == 0 ? forward_params(call) : backward_params(call);
  for (int i = 0; i < 3; ++i)
    check(p.s.size[i] == p.v.size[i], ErrorKind::value, "key_scan: s has size ", p.s.size[i],
          " in dimension ", i, ", v has ", p.v.size[i], "; both are [B, S, H, ...]");
  if (function == 1)
    check(p.o1 || !backward_params(call).d_o1, ErrorKind::value,
          "key_scan: a gradient of the final state needs o1, the final state itself");
}

std::string why_not(int, Backend backend, const Call&) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "key_scan has no matrix product; simt is its CUDA backend";
  return {};
}

int any_dim(int, Backend, const Call&) { return 0; }

int64_t workspace(int function, Backend backend, const Call& call) {
  return backend == Backend::simt ? simt::workspace_bytes(static_cast<simt::Pass>(function), call)
                                  : 0;
}

}  // namespace

ForwardParams forward_params(const Call& call) {
  Arguments a(call);
  ForwardParams p;
  p.s = a.input<3>(), p.v = a.input<4>();
  p.o = a.output<4>(), p.lse = a.output<3>();
  p.o0 = a.input<3>(), p.lse0 = a.input<2>();
  p.o1 = a.output<3>(), p.lse1 = a.output<2>();
  return p;
}

BackwardParams backward_params(const Call& call) {
  Arguments a(call);
  BackwardParams p;
  p.s = a.input<3>(), p.v = a.input<4>();
  p.o = a.output<4>(), p.lse = a.output<3>();
  p.o0 = a.input<3>(), p.lse0 = a.input<2>();
  p.o1 = a.output<3>();
  p.d_o = a.input<4>();
  p.d_o1 = a.input<3>(), p.d_lse1 = a.input<2>();
  p.d_s = a.output<3>(), p.d_v = a.output<4>();
  p.d_o0 = a.output<3>(), p.d_lse0 = a.output<2>();
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {"key_scan", kFunctions, &check_call, &why_not, &any_dim, &workspace};

}  // namespace hw::key_scan
