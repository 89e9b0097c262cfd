// SPDX-License-Identifier: Apache-2.0
// Neighbourhoods with given weights, host side: the lists of its functions, checks, and what each
// backend can take.
#include "ops/na2d_av/na2d_av.h"

#include "core/host/registry.h"

namespace hw::na2d_av {
namespace {

constexpr const char* kName = "na2d_av";

constexpr auto kForwardList = call_list<ForwardParams>(
    in("w", &ForwardParams::w, "B Y X H T"), in("v", &ForwardParams::v, "B Y X H D"),
    out("o", &ForwardParams::o, "B Y X H D"), integer("kernel_y", &ForwardParams::kernel_y),
    integer("kernel_x", &ForwardParams::kernel_x));

constexpr auto kBackwardList = call_list<BackwardParams>(
    in("w", &BackwardParams::w, "B Y X H T"), in("v", &BackwardParams::v, "B Y X H D"),
    in("d_o", &BackwardParams::d_o, "B Y X H D"),
    out("d_w", &BackwardParams::d_w, "B Y X H T").optional(),
    out("d_v", &BackwardParams::d_v, "B Y X H D").optional(),
    integer("kernel_y", &BackwardParams::kernel_y), integer("kernel_x", &BackwardParams::kernel_x));

template <class P>
void check_window(const P& p, const Call&) {
  check(p.window().fits(), ErrorKind::value, kName, ": a window of ", p.kernel_y, " x ", p.kernel_x,
        " in an image of ", p.v.size[1], " x ", p.v.size[2],
        "; expected odd numbers, at most the image");
  check(p.window().taps() == p.w.size[4], ErrorKind::value, kName, ": w has ", p.w.size[4],
        " weights of a token, expected ", p.kernel_y, " x ", p.kernel_x);
  check_narrow(kName, "D", p.v.size[4]);
  check_narrow(kName, "the number of weights", p.w.size[4]);
}

template <class P>
std::string why_not(const P&, const Call&, Backend backend) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "na2d_av has no matrix product: each token has weights of its own; simt is its CUDA "
           "backend";
  return {};
}

constexpr Questions<ForwardParams> kForward{.check = &check_window<ForwardParams>,
                                            .why_not = &why_not<ForwardParams>};
constexpr Questions<BackwardParams> kBackward{.check = &check_window<BackwardParams>,
                                              .why_not = &why_not<BackwardParams>};

constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward"),
                                   function<kBackwardList, kBackward>("backward")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {kName, kFunctions};

}  // namespace hw::na2d_av
