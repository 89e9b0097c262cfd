// SPDX-License-Identifier: Apache-2.0
// ContMix, host side: the lists of its functions, checks, and what each backend can take.
#include "ops/contmix/contmix.h"

#include "ops/contmix/contmix_simt_layout.h"

#include "core/host/registry.h"

namespace hw::contmix {
namespace {

constexpr const char* kName = "contmix";

template <class P>
consteval auto inputs() {
  return arguments(in("affinity", &P::affinity, "B Y X G A"), in("weight", &P::weight, "T A"),
                   in("bias", &P::bias, "T").optional(),
                   in("small_rpb", &P::small_rpb, "G P Q").optional(),
                   in("rpb", &P::rpb, "G R S").optional(), in("v", &P::v, "B Y X M D"));
}

template <class P>
consteval auto numbers() {
  return arguments(integer("small_y", &P::small_y), integer("small_x", &P::small_x),
                   integer("kernel_y", &P::kernel_y), integer("kernel_x", &P::kernel_x));
}

constexpr auto kForwardList = call_list<ForwardParams>(
    inputs<ForwardParams>(), out("o", &ForwardParams::o, "B Y X M D"), numbers<ForwardParams>());

constexpr auto kBackwardList = call_list<BackwardParams>(
    inputs<BackwardParams>(), in("d_o", &BackwardParams::d_o, "B Y X M D"),
    out("d_affinity", &BackwardParams::d_affinity, "B Y X G A").optional(),
    out("d_weight", &BackwardParams::d_weight, "T A").optional(),
    out("d_bias", &BackwardParams::d_bias, "T").optional(),
    out("d_small_rpb", &BackwardParams::d_small_rpb, "G P Q").optional(),
    out("d_rpb", &BackwardParams::d_rpb, "G R S").optional(),
    out("d_v", &BackwardParams::d_v, "B Y X M D").optional(), numbers<BackwardParams>());

template <class Table>
void check_table(const char* name, const Table& table, const neighborhood::Window& w) {
  check(!table || (table.size[1] == w.y.offsets() && table.size[2] == w.x.offsets()),
        ErrorKind::value, kName, ": ", name, " has ", table.size[1], " x ", table.size[2],
        " entries of a group, expected ", w.y.offsets(), " x ", w.x.offsets());
}

void check_forward(const ForwardParams& p, const Call&) {
  const neighborhood::Window small = p.window(0), large = p.window(1);
  for (const neighborhood::Window& w : {small, large})
    check(w.fits(), ErrorKind::value, kName, ": a window of ", w.y.kernel, " x ", w.x.kernel,
          " in an image of ", w.y.size, " x ", w.x.size,
          "; expected odd numbers, at most the image");
  check(small.taps() + large.taps() == p.weight.size[0], ErrorKind::value, kName, ": weight has ",
        p.weight.size[0], " rows, expected one for each of the ", small.taps(), " + ", large.taps(),
        " keys of both windows");
  check(p.v.size[3] == 2 * p.groups(), ErrorKind::value, kName, ": v has ", p.v.size[3],
        " heads, expected two for each of ", p.groups(), " groups");
  check_table("small_rpb", p.small_rpb, small);
  check_table("rpb", p.rpb, large);
  check_narrow(kName, "D", p.width());
  check_narrow(kName, "A", p.centres());
  check_narrow(kName, "the number of keys", p.weight.size[0]);
}

void check_backward(const BackwardParams& p, const Call& call) {
  check_forward(p, call);
  check_table("d_small_rpb", p.d_small_rpb, p.window(0));
  check_table("d_rpb", p.d_rpb, p.window(1));
}

template <class P>
std::string why_not(const P& p, const Call& call, Backend backend) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "contmix multiplies by its map alone, which is small beside the windows; simt is its "
           "CUDA backend";
  const int64_t taps = p.weight.size[0];
  if (backend == Backend::simt &&
      simt::tokens_of(taps, call.element == DType::f64 ? sizeof(double) : sizeof(float)) == 0)
    return concat("the ", taps, " weights of a token do not fit the shared memory of a block");
  return {};
}

int64_t backward_workspace(const BackwardParams& p, const Call& call, Backend) {
  return simt::workspace_bytes(p, call);
}

constexpr Questions<ForwardParams> kForward{.check = &check_forward,
                                            .why_not = &why_not<ForwardParams>};
constexpr Questions<BackwardParams> kBackward{.check = &check_backward,
                                              .why_not = &why_not<BackwardParams>,
                                              .workspace = &backward_workspace};

constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward"),
                                   function<kBackwardList, kBackward>("backward")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {kName, kFunctions};

}  // namespace hw::contmix
