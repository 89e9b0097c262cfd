// SPDX-License-Identifier: Apache-2.0
// Key scan, host side: arguments of a call, and what each backend can take.
#include "ops/key_scan/key_scan.h"

#include "ops/key_scan/key_scan_simt_layout.h"

#include "core/host/arguments.h"
#include "core/host/registry.h"

namespace hw::key_scan {
namespace {

constexpr const char* kName = "key_scan";
constexpr const char* kFunctions[] = {"forward", "backward"};

constexpr Argument kForwardTensors[] = {{"s", "BSH"},
                                        {"v", "BSHV"},
                                        {"o", "BSHV"},
                                        {"lse", "+BSH", Kind::wide},
                                        {"o0", "BHV", Kind::wide, Need::optional},
                                        {"lse0", "BH", Kind::wide, Need::optional},
                                        {"o1", "BHV", Kind::wide, Need::optional},
                                        {"lse1", "BH", Kind::wide, Need::optional},
                                        {"wide", "BSHV", Kind::wide, Need::optional}};
constexpr Argument kBackwardTensors[] = {{"s", "BSH"},
                                         {"v", "BSHV"},
                                         {"wide", "BSHV", Kind::wide},
                                         {"lse", "+BSH", Kind::wide},
                                         {"o0", "BHV", Kind::wide, Need::optional},
                                         {"lse0", "BH", Kind::wide, Need::optional},
                                         {"o1", "BHV", Kind::wide, Need::optional},
                                         {"d_o", "BSHV"},
                                         {"d_o1", "BHV", Kind::wide, Need::optional},
                                         {"d_lse1", "BH", Kind::wide, Need::optional},
                                         {"d_s", "BSH"},
                                         {"d_v", "BSHV"},
                                         {"d_o0", "BHV", Kind::wide, Need::optional},
                                         {"d_lse0", "BH", Kind::wide, Need::optional}};
constexpr Signature kSignatures[] = {{kForwardTensors, 0}, {kBackwardTensors, 0}};

void check_call(int function, const Call& call) {
  check_together(kName, call, 4, 5, "o0 and lse0");
  if (function == 0) return check_together(kName, call, 6, 7, "o1 and lse1");
  check_together(kName, call, 12, 13, "d_o0 and d_lse0");
  check(call.tensor(4).present() || !call.tensor(12).present(), ErrorKind::value,
        "key_scan: a gradient of the initial state needs the initial state");
  check(call.tensor(6).present() || !call.tensor(8).present(), ErrorKind::value,
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
  p.o = a.output<4>(), a.with_rest(p.lse, p.rest);
  p.o0 = a.input<3>(), p.lse0 = a.input<2>();
  p.o1 = a.output<3>(), p.lse1 = a.output<2>();
  p.wide = a.output<4>();
  return p;
}

BackwardParams backward_params(const Call& call) {
  Arguments a(call);
  BackwardParams p;
  p.s = a.input<3>(), p.v = a.input<4>();
  p.wide = a.output<4>(), a.with_rest(p.lse, p.rest);
  p.o0 = a.input<3>(), p.lse0 = a.input<2>();
  p.o1 = a.output<3>();
  p.d_o = a.input<4>();
  p.d_o1 = a.input<3>(), p.d_lse1 = a.input<2>();
  p.d_s = a.output<3>(), p.d_v = a.output<4>();
  p.d_o0 = a.output<3>(), p.d_lse0 = a.output<2>();
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {kName,    kFunctions, kSignatures, &check_call,
                            &why_not, &any_dim,   &workspace};

}  // namespace hw::key_scan
