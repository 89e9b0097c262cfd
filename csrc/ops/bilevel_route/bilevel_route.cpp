// SPDX-License-Identifier: Apache-2.0
// Routing between regions, host side: arguments of a call and checks.
#include "ops/bilevel_route/bilevel_route.h"

#include "core/host/arguments.h"
#include "core/host/registry.h"

namespace hw::bilevel_route {
namespace {

constexpr const char* kFunctions[] = {"means", "scores"};
enum Function { kMeans, kScores };

constexpr Argument kMeansTensors[] = {{"x", "BYXHD"}, {"m", "BRHD", Kind::wide}};
constexpr Argument kScoresTensors[] = {{"q", "BRQD"}, {"k", "BKHD"}, {"a", "BGRK"}};
constexpr Signature kSignatures[] = {{kMeansTensors, 5}, {kScoresTensors, 0}};

bool contiguous(const Tensor& t) {
  int64_t step = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.size[d] != 1 && t.stride[d] != step) return false;
    step *= t.size[d];
  }
  return true;
}

void check_means(const Call& call) {
  const MeansParams p = means_params(call);
  const Cells& c = p.cells;
  check(c.rows_of_image == p.x.size[1] && c.columns_of_image == p.x.size[2] &&
            c.within(p.x.size[1] * p.x.size[2]) && p.m.size[1] == c.count(),
        ErrorKind::value, "bilevel_route: cells of ", c.height, " x ", c.width,
        " do not give an image of ", p.x.size[1], " x ", p.x.size[2], " tokens ", p.m.size[1],
        " regions");
  check(contiguous(call.tensor(1)), ErrorKind::value, "bilevel_route: m is not contiguous");
}

void check_scores(const Call& call) {
  const ScoresParams p = scores_params(call);
  const int64_t heads = p.q.size[2], own = p.k.size[2], graphs = p.a.size[1];
  check(own > 0 ? heads % own == 0 : heads == 0, ErrorKind::value, "bilevel_route: q has ", heads,
        " heads, not a multiple of the ", own, " heads of k");
  check(graphs == 1 || graphs == heads, ErrorKind::value, "bilevel_route: ", graphs, " graphs for ",
        heads, " heads");
  check(contiguous(call.tensor(0)) && contiguous(call.tensor(1)), ErrorKind::value,
        "bilevel_route: means are not contiguous");
  check_narrow("bilevel_route", "the number of regions", max_of(p.a.size[2], p.a.size[3]));
  check_narrow("bilevel_route", "the number of channels", p.q.size[3]);
}

void check_call(int function, const Call& call) {
  function == kMeans ? check_means(call) : check_scores(call);
}

std::string why_not(int, Backend backend, const Call&) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "bilevel_route needs scores as exact as fp32; simt is its CUDA backend";
  return {};
}

int any_dim(int, Backend, const Call&) { return 0; }
int64_t no_workspace(int, Backend, const Call&) { return 0; }

}  // namespace

MeansParams means_params(const Call& call) {
  Arguments a(call);
  MeansParams p;
  p.x = a.input<5>();
  p.m = a.output<4>();
  p.cells = read_cells(a);
  return p;
}

ScoresParams scores_params(const Call& call) {
  Arguments a(call);
  ScoresParams p;
  p.q = a.input<4>();
  p.k = a.input<4>();
  p.a = a.output<4>();
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {"bilevel_route", kFunctions, kSignatures,  &check_call,
                            &why_not,        &any_dim,   &no_workspace};

}  // namespace hw::bilevel_route
