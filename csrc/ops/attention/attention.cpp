// SPDX-License-Identifier: Apache-2.0
// Softmax-type attention, host side: arguments of a call, checks, and what each backend can take.
#include "softmax/params.h"
#include "softmax/simt/layout.h"
#include "softmax/sm80/layout.h"

#include "core/host/arguments.h"
#include "core/host/registry.h"

namespace hw::softmax {
namespace {

enum Function { kForward = 0, kBackward = 1, kColumns = 2, kProbs = 3 };
constexpr const char* kFunctions[] = {"forward", "backward", "columns", "probs"};

constexpr auto kForwardTensors = joined(kScoreTensors, forward_tensors("BSQV", "+BQS"));
constexpr auto kBackwardTensors = joined(kScoreTensors, backward_tensors("+BQS", Need::required));
constexpr auto kColumnsTensors = joined(
    kScoreTensors, std::array<Argument, 6>{{{"x", "BSQX", Kind::element, Need::optional},
                                            {"row", "+BQS", Kind::wide, Need::optional},
                                            {"row_weight", "BQS", Kind::wide, Need::optional},
                                            {"y", "BKQX", Kind::element, Need::optional},
                                            {"sum", "BQK", Kind::wide, Need::optional},
                                            {"max", "BQK", Kind::wide, Need::optional}}});
constexpr auto kProbsTensors =
    joined(kScoreTensors, std::array<Argument, 5>{{{"row", "+BQS", Kind::wide, Need::optional},
                                                   {"keys", "Bm", Kind::index, Need::optional},
                                                   {"rows", "Bm", Kind::index, Need::optional},
                                                   {"offsets", "m", Kind::index, Need::optional},
                                                   {"p", "BQij", Kind::wide}}});
constexpr Signature kSignatures[] = {{kForwardTensors, kScoreScalars + 1},
                                     {kBackwardTensors, kScoreScalars},
                                     {kColumnsTensors, kScoreScalars},
                                     {kProbsTensors, kScoreScalars}};

void read_scores(Arguments& a, ScoreParams& p) {
  p.q = a.input<4>(), p.k = a.input<4>(), p.bias = a.input<4>();
  p.key_bias = a.input<3>(), p.key_gain = a.input<3>(), p.row_temperature = a.input<3>();
  p.cu_seqlens_q = a.output<1>().as<const int64_t>();
  p.cu_seqlens_k = a.output<1>().as<const int64_t>();
}

void read_scalars(Arguments& a, ScoreParams& p) {
  p.scale = a.scalar(), p.softcap = a.scalar();
  p.causal = a.flag();
  p.left = a.bound(), p.right = a.bound();
  const int64_t activation = a.integer(), normalizer = a.integer();
  check(activation >= 0 && activation <= 4 && normalizer >= 0 && normalizer <= 2, ErrorKind::value,
        "attention: there is no activation ", activation, " with normalizer ", normalizer);
  p.activation = static_cast<Activation>(activation);
  p.normalizer = static_cast<Normalizer>(normalizer);
  p.gain_begin = a.bound(), p.gain_end = a.bound();
  // A bound of packed lengths may be anything; the work is cut by what there can be.
  p.max_q = min_of(a.bound(), p.q.size[1]), p.max_k = min_of(a.bound(), p.k.size[1]);
}

// Behind the tensors of the scores.
void check_columns(const Call& call) {
  check_statistic(columns_params(call), call.tensor(9));
  check_together("attention", call, 8, 11, "x and y");
}

void check_probs(const Call& call) {
  const ProbsParams p = probs_params(call);
  check_statistic(p, call.tensor(8));
  const Tensor &keys = call.tensor(9), &rows = call.tensor(10), &offsets = call.tensor(11);
  check(keys.present() + rows.present() + offsets.present() == 1, ErrorKind::value,
        "attention: exactly one of keys, rows and offsets says which weights");
  const int64_t n = offsets.present() ? offsets.size[0]
                    : keys.present()  ? keys.size[1]
                                      : rows.size[1];
  const int64_t queries = rows.present() ? n : p.q.size[1];
  const int64_t columns = rows.present() ? p.k.size[1] : n;
  check(p.p.size[2] == queries && p.p.size[3] == columns, ErrorKind::value, "attention: p is [.., ",
        p.p.size[2], ", ", p.p.size[3], "], expected [.., ", queries, ", ", columns, "]");
}

// The longest sequences of a call whose last scalars, but for `behind`, are those of the scores.
void check_lengths(const Call& call, int behind) {
  const int last = static_cast<int>(call.scalars.size()) - 1 - behind;
  const int64_t q = call.bound(last - 1), k = call.bound(last);
  const int64_t rows = call.tensor(0).size[1], keys = call.tensor(1).size[1];
  const bool packed = call.tensor(6).present();
  check(packed ? q >= 0 && k >= 0 : q == rows && k == keys, ErrorKind::value,
        "attention: the longest sequences have ", q, " and ", k, " tokens, q and k have ", rows,
        " and ", keys);
}

void check_call(int function, const Call& call) {
  check_scores(call, 0);
  check_lengths(call, function == kForward ? 1 : 0);
  switch (function) {
    case kForward: return check_forward(call, 0);
    case kBackward: return check_backward(call, 0, backward_params(call));
    case kColumns: return check_columns(call);
    default: return check_probs(call);
  }
}

std::string why_not(int, Backend, const Call&) { return {}; }

// Compared with the widths of the tensor-core instances; the other backends take any.
int width(int, Backend backend, const Call& call) {
  return backend == Backend::sm80 ? sm80::dim(call) : 0;
}

int64_t workspace(int function, Backend backend, const Call& call) {
  if (backend == Backend::simt && function == kForward) return simt::workspace_bytes(call);
  if (backend == Backend::sm80 && function == kForward) return sm80::workspace_bytes(call);
  return 0;
}

}  // namespace

void check_scores(const Call& call, int first) {
  const Tensor &q = call.tensor(first), &k = call.tensor(first + 1), &bias = call.tensor(first + 2);
  const Tensor &of_q = call.tensor(first + 6), &of_k = call.tensor(first + 7);
  check_narrow("attention", "the number of heads", q.size[2]);
  check_narrow("attention", "the number of heads of k", k.size[2]);
  check_narrow("attention", "the head dim", q.size[3]);
  check(k.size[2] > 0 ? q.size[2] % k.size[2] == 0 : q.size[2] == 0, ErrorKind::value,
        "attention: q has ", q.size[2], " heads, not a multiple of the ", k.size[2], " heads of k");
  check_together("attention", call, first + 6, first + 7, "cu_seqlens_q and cu_seqlens_k");
  if (!of_q.present()) return;
  check(!bias.present(), ErrorKind::value,
        "attention: bias [B, H, Sq, Sk] has no meaning for packed sequences");
  check_bounds("attention", "cu_seqlens_q", of_q, q.size[0], q.size[1]);
  check_bounds("attention", "cu_seqlens_k", of_k, k.size[0], k.size[1]);
}

void check_forward(const Call& call, int first) {
  const int rest = first + kScoreTensors.size();
  const Tensor &q = call.tensor(first), &k = call.tensor(first + 1), &v = call.tensor(rest);
  const bool mixes = call.tensor(rest + 2).present(), w = call.tensor(rest + 5).present();
  check_narrow("attention", "the number of columns of v", v.present() ? v.size[3] : 0);
  check_together("attention", call, rest, rest + 4, "v and o");
  check(v.present() || !(mixes || w), ErrorKind::value, "attention: v is missing");
  check_together("attention", call, rest + 3, rest + 10, "mass_keys and mass");
  check(!mixes || q.size[1] == k.size[1], ErrorKind::value,
        "attention: identity_mix takes as many queries as keys, got ", q.size[1], " and ",
        k.size[1]);
}

void check_statistic(const ScoreParams& p, const Tensor& row) {
  check(!p.has_row_statistic() || row.present(), ErrorKind::value, "attention: row is missing");
}

void check_backward(const Call& call, int first, const ScoreParams& p) {
  const int rest = first + kScoreTensors.size();
  check_narrow("attention", "the number of columns of v", call.tensor(rest).size[3]);
  check_statistic(p, call.tensor(rest + 2));
}

void read_forward(Arguments& a, ForwardParams& p) {
  read_scores(a, p);
  p.v = a.input<4>(), p.head_gate = a.input<3>(), p.identity_mix = a.input<2>();
  p.mass_keys = a.input<3>();
  p.o = a.output<4>(), p.w = a.output<4>();
  a.with_rest(p.row, p.rest);
  p.entropy = a.output<3>(), p.p_max = a.output<3>();
  p.sq_norm = a.output<3>(), p.mass = a.output<3>();
  read_scalars(a, p);
  p.skip_dead = a.flag();
}

ForwardParams forward_params(const Call& call) {
  Arguments a(call);
  ForwardParams p;
  read_forward(a, p);
  return p;
}

void read_backward(Arguments& a, BackwardParams& p) {
  read_scores(a, p);
  p.v = a.input<4>(), p.d_w = a.input<4>();
  a.with_rest(p.row, p.rest);
  p.delta = a.input<3>();
  p.d_q = a.output<4>(), p.d_k = a.output<4>(), p.d_v = a.output<4>(), p.d_bias = a.output<4>();
  p.d_key_bias = a.output<3>(), p.d_key_gain = a.output<3>();
  p.d_row_temperature = a.output<3>();
  read_scalars(a, p);
}

BackwardParams backward_params(const Call& call) {
  Arguments a(call);
  BackwardParams p;
  read_backward(a, p);
  return p;
}

ColumnsParams columns_params(const Call& call) {
  Arguments a(call);
  ColumnsParams p;
  read_scores(a, p);
  p.x = a.input<4>();
  a.with_rest(p.row, p.rest);
  p.row_weight = a.input<3>();
  p.y = a.output<4>(), p.sum = a.output<3>(), p.max = a.output<3>();
  read_scalars(a, p);
  return p;
}

ProbsParams probs_params(const Call& call) {
  Arguments a(call);
  ProbsParams p;
  read_scores(a, p);
  a.with_rest(p.row, p.rest);
  p.keys = a.output<2>().as<const int64_t>();
  p.rows = a.output<2>().as<const int64_t>();
  p.offsets = a.output<1>().as<const int64_t>();
  p.p = a.output<4>();
  read_scalars(a, p);
  return p;
}

}  // namespace hw::softmax

namespace hw::attention {

extern const Operator kOperator;
const Operator kOperator = {"attention",          softmax::kFunctions, softmax::kSignatures,
                            &softmax::check_call, &softmax::why_not,   &softmax::width,
                            &softmax::workspace};

}  // namespace hw::attention
