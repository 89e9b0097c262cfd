// SPDX-License-Identifier: Apache-2.0
// Routing between regions, host side: arguments of a call and checks.
#include "ops/bilevel_route/bilevel_route.h"

#include "core/arguments.h"
#include "core/registry.h"

namespace hw::bilevel_route {
namespace {

constexpr const char* kFunctions[] = {"means", "scores"};
enum Function { kMeans, kScores };

void check_means(const MeansParams& p) {
  const Cells& c = p.cells;
  check(c.columns > 0 && c.height > 0 && c.width > 0 && c.rows_of_image == p.x.size[1] &&
            c.columns_of_image == p.x.size[2] && p.m.size[1] == c.count(),
        ErrorKind::value, "bilevel_route: cells of ", c.height, " x ", c.width,
        " do not give an image of ", p.x.size[1], " x ", p.x.size[2], " tokens ", p.m.size[1],
        " regions");
}

void check_scores(const ScoresParams& p) {
  check(p.q.size[3] == p.k.size[3] && p.a.size[2] == p.q.size[1] && p.a.size[3] == p.k.size[1],
        ErrorKind::value, "bilevel_route: means of ", p.q.size[1], " and ", p.k.size[1],
        " regions, scores of ", p.a.size[2], " x ", p.a.size[3]);
  check(p.a.size[1] == 1 || p.a.size[1] == p.q.size[2], ErrorKind::value,
        "bilevel_route: ", p.a.size[1], " graphs for ", p.q.size[2], " heads");
}

void check_call(int function, const Call& call) {
  function == kMeans ? check_means(means_params(call)) : check_scores(scores_params(call));
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
const Operator kOperator = {"bilevel_route", kFunctions, &check_call,
                            &why_not,        &any_dim,   &no_workspace};

}  // namespace hw::bilevel_route
