// SPDX-License-Identifier: Apache-2.0
// Cascaded group attention, host side: the list of its function and its checks.
#include "ops/cascaded_group_attention/cascaded_group_attention.h"

#include "ops/cascaded_group_attention/cascaded_group_attention_simt_layout.h"
#include "ops/cascaded_group_attention/cascaded_group_attention_sm80_layout.h"

#include "core/host/registry.h"

namespace hw::cascaded_group_attention {
namespace {

constexpr const char* kName = "cascaded_group_attention";

using P = ForwardParams;
constexpr auto kForwardList =
    call_list<P>(in("x", &P::x, "B Y X C"), in("qkv_weight", &P::qkv_weight, "H d F"),
                 in("qkv_bias", &P::qkv_bias, "H F"), in("conv_weight", &P::conv_weight, "H S S K"),
                 in("conv_bias", &P::conv_bias, "H K"), in("bias_table", &P::bias_table, "H RR"),
                 in("out_weight", &P::out_weight, "C C"), in("out_bias", &P::out_bias, "C"),
                 out("y", &P::y, "B Y X C"), integer("window_height", &P::height),
                 integer("window_width", &P::width));

void check_forward(const P& p, const Call&) {
  check(p.heads() > 0 && p.group() > 0 && p.channels() == p.heads() * p.group(), ErrorKind::value,
        kName, ": x has ", p.channels(), " channels, expected the ", p.heads(), " heads times ",
        p.group(), " of qkv_weight");
  check(p.key_dim() > 0 && p.projected() == 2 * p.key_dim() + p.group(), ErrorKind::value, kName,
        ": qkv_weight has ", p.projected(), " columns, expected 2 x ", p.key_dim(), " + ",
        p.group());
  check(p.kernel() % 2 == 1, ErrorKind::value, kName, ": kernels are ", p.kernel(), " x ",
        p.kernel(), ", expected an odd size");
  check(p.side() * p.side() == p.bias_table.size[1], ErrorKind::value, kName, ": bias_table has ",
        p.bias_table.size[1], " entries a head, expected a square number");
  check(p.height >= 1 && p.width >= 1 && p.height <= p.side() && p.width <= p.side(),
        ErrorKind::value, kName, ": windows are ", p.height, " x ", p.width,
        ", expected sides from 1 to ", p.side(), ", as bias_table has them");
  check_narrow(kName, "the number of channels", p.channels());
  check_narrow(kName, "the number of columns of qkv_weight", p.projected());
  check_narrow(kName, "the number of tokens of a window", p.tokens());
  check_narrow(kName, "the number of elements of a window",
               p.tokens() * (p.channels() + p.projected()));
}

std::string why_not(const P& p, const Call& call, Backend backend) {
  return backend == Backend::sm80 ? sm80::why_not(p, call) : std::string();
}

int forward_dim(const P& p, const Call&, Backend backend) {
  return backend == Backend::sm80 ? static_cast<int>(p.group()) : 0;
}

int64_t forward_workspace(const P& p, const Call& call, Backend backend) {
  return backend == Backend::simt ? simt::workspace_bytes(p, call) : 0;
}

constexpr Questions<P> kForward{.check = &check_forward,
                                .why_not = &why_not,
                                .dim = &forward_dim,
                                .workspace = &forward_workspace};

constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {kName, kFunctions};

}  // namespace hw::cascaded_group_attention
