// SPDX-License-Identifier: Apache-2.0
// Attention inside the windows of an image, host side: the lists of its functions, checks, and what
// each backend can take.
#include "ops/window_attention/window_attention.h"

#include "ops/window_attention/window_attention_simt_layout.h"
#include "ops/window_attention/window_attention_sm80_layout.h"
#include "softmax/arguments.h"

#include "core/host/registry.h"

namespace hw::window_attention {
namespace {

constexpr const char* kName = "window_attention";

constexpr auto kInputs = arguments(in("q", &softmax::ScoreParams::q, "B S Hq D"),
                                   in("k", &softmax::ScoreParams::k, "B S H D"),
                                   in("bias_table", &Windows::bias_table, "Hq M").optional());
constexpr auto kNumbers =
    arguments(number("scale", &softmax::ScoreParams::scale),
              integer("columns", [](Windows& w) -> auto& { return w.grid.columns; }),
              integer("height", [](Windows& w) -> auto& { return w.grid.height; }),
              integer("width", [](Windows& w) -> auto& { return w.grid.width; }),
              integer("image_height", [](Windows& w) -> auto& { return w.grid.rows_of_image; }),
              integer("image_width", [](Windows& w) -> auto& { return w.grid.columns_of_image; }));

constexpr auto kForwardList = call_list<ForwardParams>(
    kInputs, arguments(in("v", &ForwardParams::v, "B S H Dv")),
    arguments(
        out("o", &ForwardParams::o, "B S Hq Dv"),
        out("row", &ForwardParams::row, "B Hq S").wide().optional().with(&ForwardParams::rest)),
    kNumbers);

constexpr auto kBackwardList = call_list<BackwardParams>(
    kInputs,
    arguments(in("v", &BackwardParams::v, "B S H Dv"), in("d_o", &BackwardParams::d_w, "B S Hq Dv"),
              in("row", &BackwardParams::row, "B Hq S").wide().with(&BackwardParams::rest),
              in("delta", &BackwardParams::delta, "B Hq S").wide(),
              out("d_q", &BackwardParams::d_q, "B S Hq D"),
              out("d_k", &BackwardParams::d_k, "B S H D"),
              out("d_v", &BackwardParams::d_v, "B S H Dv"),
              out("d_bias_table", &BackwardParams::d_bias_table, "Hq M").wide().optional()),
    kNumbers);

// The engine's sequences are windows, whose masks hide nothing. Windows that do not fit the call
// are left to the checks.
template <class P>
void complete(P& p, const Call&) {
  RegionGrid& g = p.grid;
  const bool fits = g.within(p.q.size[1]);
  p.bins = fits ? g.size() : 0, p.table_width = g.width;
  if (fits) {
    g.height = min_of(g.height, max_of<int64_t>(g.rows_of_image, 1));
    g.width = min_of(g.width, max_of<int64_t>(g.columns_of_image, 1));
  }
  p.softcap = 0;
  p.causal = false, p.left = p.right = -1;
  p.activation = softmax::Activation::softmax, p.normalizer = softmax::Normalizer::none;
  p.gain_begin = p.gain_end = 0;
  p.max_q = p.max_k = fits ? g.size() : 0;
  if constexpr (requires { p.skip_dead; }) p.skip_dead = false;
}

template <class P>
void check_windows(const P& p, const Call& call) {
  softmax::check_scores(kName, p, call);
  check_narrow(kName, "the number of columns of v", p.v.size[3]);
  const RegionGrid& g = p.grid;
  check(g.within(p.q.size[1]), ErrorKind::value, "window_attention: an image of ", g.rows_of_image,
        " x ", g.columns_of_image, " tokens in windows of ", g.height, " x ", g.width,
        " does not fit the ", p.q.size[1], " tokens of q");
  check(g.columns == ceil_div(max_of<int64_t>(g.columns_of_image, 1), g.width), ErrorKind::value,
        "window_attention: ", g.columns, " windows side by side, expected ",
        ceil_div(max_of<int64_t>(g.columns_of_image, 1), g.width));
  check(!p.bias_table || p.bias_table.size[1] == p.bins, ErrorKind::value,
        "window_attention: bias_table has ", p.bias_table.size[1], " columns, expected the ",
        p.bins, " distances in a window");
}

void check_backward(const BackwardParams& p, const Call& call) {
  check_windows(p, call);
  check(p.bias_table || !p.d_bias_table, ErrorKind::value,
        "window_attention: a gradient of the bias table needs the table");
}

// Numbers of tokens and slots have 32 bits on CUDA.
template <class P>
std::string why_not(const P& p, const Call&, Backend b) {
  const int64_t slots = p.grid.count() * p.grid.size();
  if (b == Backend::cpu || slots < INT32_MAX) return {};
  return concat("there are ", slots, " slots of windows, and their numbers have 32 bits");
}

// Compared with the widths of the tensor-core instances; the other backends take any.
template <class P>
int width(const P& p, const Call&, Backend b) {
  return b == Backend::sm80 ? static_cast<int>(max_of(p.q.size[3], p.v.size[3])) : 0;
}

int64_t forward_bytes(const ForwardParams& p, const Call& call, Backend b) {
  if (b == Backend::sm80) return sm80::workspace_bytes(p, call);
  return b == Backend::cpu ? 0 : simt::workspace_bytes(p, call);
}
int64_t backward_bytes(const BackwardParams& p, const Call& call, Backend b) {
  return b == Backend::cpu ? 0 : workspace_bytes(p, call.element);
}

constexpr Questions<ForwardParams> kForward{.complete = &complete<ForwardParams>,
                                            .check = &check_windows<ForwardParams>,
                                            .why_not = &why_not<ForwardParams>,
                                            .dim = &width<ForwardParams>,
                                            .workspace = &forward_bytes};
constexpr Questions<BackwardParams> kBackward{.complete = &complete<BackwardParams>,
                                              .check = &check_backward,
                                              .why_not = &why_not<BackwardParams>,
                                              .dim = &width<BackwardParams>,
                                              .workspace = &backward_bytes};

constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward"),
                                   function<kBackwardList, kBackward>("backward")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {kName, kFunctions};

}  // namespace hw::window_attention
