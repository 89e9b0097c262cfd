// SPDX-License-Identifier: Apache-2.0
// Softmax-type attention, host side: the lists of its functions, checks, and what each backend can
// take. The mathematics is in softmax/params.h.
#include "softmax/arguments.h"
#include "softmax/simt/layout.h"
#include "softmax/sm80/layout.h"

#include "core/host/registry.h"

namespace hw::attention {
namespace {

using namespace softmax;

constexpr const char* kName = "attention";

constexpr auto kForwardList =
    call_list<ForwardParams>(kScoreArguments, forward_arguments("B Sq Hq Dv", "B Hq Sq"));

constexpr auto kBackwardList =
    call_list<BackwardParams>(kScoreArguments, backward_inputs("B Hq Sq"), kGradients);

constexpr auto kColumnsList = call_list<ColumnsParams>(
    kScoreArguments, in("x", &ColumnsParams::x, "B Sq Hq Dx").optional(),
    in("row", &ColumnsParams::row, "B Hq Sq").wide().optional().with(&ColumnsParams::rest),
    in("row_weight", &ColumnsParams::row_weight, "B Hq Sq").wide().optional(),
    out("y", &ColumnsParams::y, "B Sk Hq Dx").optional(),
    out("sum", &ColumnsParams::sum, "B Hq Sk").wide().optional(),
    out("max", &ColumnsParams::max, "B Hq Sk").wide().optional());

constexpr auto kProbsList = call_list<ProbsParams>(
    kScoreArguments,
    in("row", &ProbsParams::row, "B Hq Sq").wide().optional().with(&ProbsParams::rest),
    in("keys", &ProbsParams::keys, "B n").index().optional(),
    in("rows", &ProbsParams::rows, "B n").index().optional(),
    in("offsets", &ProbsParams::offsets, "n").index().optional(),
    out("p", &ProbsParams::p, "B Hq rows_of_p columns_of_p").wide());

constexpr auto kRowDotList = call_list<RowDotParams>(
    arguments(in("x", &RowDotParams::x, "B S H D"), in("y", &RowDotParams::y, "B S H D"),
              out("dot", &RowDotParams::dot, "B H S").wide()));

// ---- Checks -------------------------------------------------------------------------------------

template <class P>
void complete(P& p, const Call&) {
  complete_scores(p);
}
void complete_forward(ForwardParams& p, const Call& call) {
  complete_scores(p);
  pack_query_heads(p, call.element);
}

void check_forward_call(const ForwardParams& p, const Call& call) {
  check_scores(kName, p, call);
  check_forward(kName, p);
}

void check_backward_call(const BackwardParams& p, const Call& call) {
  check_scores(kName, p, call);
  check_narrow(kName, "the number of columns of v", p.v.size[3]);
  check_statistic(kName, p, p.row);
  check(bool(p.delta), ErrorKind::value, "attention: delta is missing");
}

void check_row_dot_call(const RowDotParams& p, const Call&) {
  check_narrow(kName, "the number of columns of x", p.x.size[3]);
}

void check_columns_call(const ColumnsParams& p, const Call& call) {
  check_scores(kName, p, call);
  check_statistic(kName, p, p.row);
  check_together(kName, "x and y", bool(p.x), bool(p.y));
}

void check_probs_call(const ProbsParams& p, const Call& call) {
  check_scores(kName, p, call);
  check_statistic(kName, p, p.row);
  check(bool(p.keys) + bool(p.rows) + bool(p.offsets) == 1, ErrorKind::value,
        "attention: exactly one of keys, rows and offsets says which weights");
  const int64_t n = p.offsets ? p.offsets.size[0] : p.keys ? p.keys.size[1] : p.rows.size[1];
  const int64_t rows = p.rows ? n : p.q.size[1], columns = p.rows ? p.k.size[1] : n;
  check(p.p.size[2] == rows && p.p.size[3] == columns, ErrorKind::value, "attention: p is [.., ",
        p.p.size[2], ", ", p.p.size[3], "], expected [.., ", rows, ", ", columns, "]");
}

// ---- Backends -----------------------------------------------------------------------------------

// Compared with the widths of the tensor-core instances; the other backends take any. `values`: v,
// or x of columns.
template <class P, Ref<const void, 4> P::* values>
int width(const P& p, const Call&, Backend b) {
  return b == Backend::sm80 ? static_cast<int>(max_of(p.q.size[3], (p.*values).size[3])) : 0;
}

int width_of_rows(const RowDotParams& p, const Call&, Backend b) {
  return b == Backend::sm80 ? static_cast<int>(p.x.size[3]) : 0;
}

int64_t forward_workspace(const ForwardParams& p, const Call& call, Backend b) {
  if (b == Backend::sm80) return sm80::workspace_bytes(p, call.context.multiprocessors);
  return simt::workspace_bytes(p, call);
}

constexpr Questions<ForwardParams> kForward{.complete = &complete_forward,
                                            .check = &check_forward_call,
                                            .dim = &width<ForwardParams, &ForwardParams::v>,
                                            .workspace = &forward_workspace};
constexpr Questions<BackwardParams> kBackward{.complete = &complete<BackwardParams>,
                                              .check = &check_backward_call,
                                              .dim = &width<BackwardParams, &BackwardParams::v>};
constexpr Questions<ColumnsParams> kColumns{.complete = &complete<ColumnsParams>,
                                            .check = &check_columns_call,
                                            .dim = &width<ColumnsParams, &ColumnsParams::x>};
constexpr Questions<ProbsParams> kProbs{.complete = &complete<ProbsParams>,
                                        .check = &check_probs_call};
constexpr Questions<RowDotParams> kRowDot{.check = &check_row_dot_call, .dim = &width_of_rows};

constexpr Function kFunctions[] = {
    function<kForwardList, kForward>("forward"), function<kBackwardList, kBackward>("backward"),
    function<kColumnsList, kColumns>("columns"), function<kProbsList, kProbs>("probs"),
    function<kRowDotList, kRowDot>("row_dot")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {kName, kFunctions};

}  // namespace hw::attention
