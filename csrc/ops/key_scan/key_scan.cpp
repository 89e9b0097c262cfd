// SPDX-License-Identifier: Apache-2.0
// Key scan, host side: the lists of its functions, checks, and what each backend can take.
#include "ops/key_scan/key_scan.h"

#include "ops/key_scan/key_scan_simt_layout.h"

#include "core/host/registry.h"

namespace hw::key_scan {
namespace {

constexpr const char* kName = "key_scan";

constexpr auto kForwardList = call_list<ForwardParams>(
    in("s", &ForwardParams::s, "B S H"), in("v", &ForwardParams::v, "B S H Dv"),
    in("o0", &ForwardParams::o0, "B H Dv").wide().optional(),
    in("lse0", &ForwardParams::lse0, "B H").wide().optional(),
    out("o", &ForwardParams::o, "B S H Dv"),
    out("lse", &ForwardParams::lse, "B S H").wide().with(&ForwardParams::rest),
    out("o1", &ForwardParams::o1, "B H Dv").wide().optional(),
    out("lse1", &ForwardParams::lse1, "B H").wide().optional(),
    out("o_wide", &ForwardParams::wide, "B S H Dv").wide().optional());

constexpr auto kBackwardList = call_list<BackwardParams>(
    in("s", &BackwardParams::s, "B S H"), in("v", &BackwardParams::v, "B S H Dv"),
    in("o", &BackwardParams::wide, "B S H Dv").wide(),
    in("lse", &BackwardParams::lse, "B S H").wide().with(&BackwardParams::rest),
    in("o0", &BackwardParams::o0, "B H Dv").wide().optional(),
    in("lse0", &BackwardParams::lse0, "B H").wide().optional(),
    in("o1", &BackwardParams::o1, "B H Dv").wide().optional(),
    in("d_o", &BackwardParams::d_o, "B S H Dv"),
    in("d_o1", &BackwardParams::d_o1, "B H Dv").wide().optional(),
    in("d_lse1", &BackwardParams::d_lse1, "B H").wide().optional(),
    out("d_s", &BackwardParams::d_s, "B S H"), out("d_v", &BackwardParams::d_v, "B S H Dv"),
    out("d_o0", &BackwardParams::d_o0, "B H Dv").wide().optional(),
    out("d_lse0", &BackwardParams::d_lse0, "B H").wide().optional());

void check_forward(const ForwardParams& p, const Call&) {
  check_together(kName, "o0 and lse0", bool(p.o0), bool(p.lse0));
  check_together(kName, "o1 and lse1", bool(p.o1), bool(p.lse1));
}

void check_backward(const BackwardParams& p, const Call&) {
  check_together(kName, "o0 and lse0", bool(p.o0), bool(p.lse0));
  check_together(kName, "d_o0 and d_lse0", bool(p.d_o0), bool(p.d_lse0));
  check_together(kName, "d_o1 and d_lse1", bool(p.d_o1), bool(p.d_lse1));
  check(p.o0 || !p.d_o0, ErrorKind::value,
        "key_scan: a gradient of the initial state needs the initial state");
  check(p.o1 || !p.d_o1, ErrorKind::value,
        "key_scan: a gradient of the final state needs o1, the final state itself");
}

template <class P>
std::string why_not(const P&, const Call&, Backend backend) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "key_scan has no matrix product; simt is its CUDA backend";
  return {};
}

int64_t forward_workspace(const ForwardParams& p, const Call& call, Backend) {
  return simt::workspace_bytes(p, call, false);
}
int64_t backward_workspace(const BackwardParams& p, const Call& call, Backend) {
  return simt::workspace_bytes(p, call, true);
}

constexpr Questions<ForwardParams> kForward{
    .check = &check_forward, .why_not = &why_not<ForwardParams>, .workspace = &forward_workspace};
constexpr Questions<BackwardParams> kBackward{.check = &check_backward,
                                              .why_not = &why_not<BackwardParams>,
                                              .workspace = &backward_workspace};

constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward"),
                                   function<kBackwardList, kBackward>("backward")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {kName, kFunctions};

}  // namespace hw::key_scan
