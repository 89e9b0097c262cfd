// SPDX-License-Identifier: Apache-2.0
// Routing between regions, host side: the lists of its functions and checks.
#include "ops/bilevel_route/bilevel_route.h"

#include "core/host/registry.h"

namespace hw::bilevel_route {
namespace {

constexpr auto kMeansList = call_list<MeansParams>(
    in("x", &MeansParams::x, "B Y X H D"), out("m", &MeansParams::m, "B R H D").wide(),
    integer("columns", [](MeansParams& p) -> auto& { return p.grid.columns; }),
    integer("height", [](MeansParams& p) -> auto& { return p.grid.height; }),
    integer("width", [](MeansParams& p) -> auto& { return p.grid.width; }),
    integer("image_height", [](MeansParams& p) -> auto& { return p.grid.rows_of_image; }),
    integer("image_width", [](MeansParams& p) -> auto& { return p.grid.columns_of_image; }));
constexpr auto kScoresList = call_list<ScoresParams>(in("q", &ScoresParams::q, "B R Hq D"),
                                                     in("k", &ScoresParams::k, "B Rk H D"),
                                                     out("a", &ScoresParams::a, "B graphs R Rk"));

template <class T>
bool contiguous(const Ref<T, 4>& x) {
  int64_t step = 1;
  for (int d = 3; d >= 0; --d) {
    if (x.size[d] != 1 && x.stride[d] != step) return false;
    step *= x.size[d];
  }
  return true;
}

void check_means(const MeansParams& p, const Call&) {
  const RegionGrid& g = p.grid;
  check(g.rows_of_image == p.x.size[1] && g.columns_of_image == p.x.size[2] &&
            g.within(p.x.size[1] * p.x.size[2]) && p.m.size[1] == g.count(),
        ErrorKind::value, "bilevel_route: regions of ", g.height, " x ", g.width,
        " do not give an image of ", p.x.size[1], " x ", p.x.size[2], " tokens ", p.m.size[1],
        " regions");
  check(contiguous(p.m), ErrorKind::value, "bilevel_route: m is not contiguous");
}

void check_scores(const ScoresParams& p, const Call&) {
  const int64_t heads = p.q.size[2], own = p.k.size[2], graphs = p.a.size[1];
  check(own > 0 ? heads % own == 0 : heads == 0, ErrorKind::value, "bilevel_route: q has ", heads,
        " heads, not a multiple of the ", own, " heads of k");
  check(graphs == 1 || graphs == heads, ErrorKind::value, "bilevel_route: ", graphs, " graphs for ",
        heads, " heads");
  check(contiguous(p.q) && contiguous(p.k), ErrorKind::value,
        "bilevel_route: means are not contiguous");
  check_narrow("bilevel_route", "the number of regions", max_of(p.a.size[2], p.a.size[3]));
  check_narrow("bilevel_route", "the number of channels", p.q.size[3]);
}

template <class P>
std::string why_not(const P&, const Call&, Backend backend) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "bilevel_route needs scores as exact as fp32; simt is its CUDA backend";
  return {};
}

constexpr Questions<MeansParams> kMeans{.check = &check_means, .why_not = &why_not<MeansParams>};
constexpr Questions<ScoresParams> kScores{.check = &check_scores,
                                          .why_not = &why_not<ScoresParams>};

constexpr Function kFunctions[] = {function<kMeansList, kMeans>("means"),
                                   function<kScoresList, kScores>("scores")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {"bilevel_route", kFunctions};

}  // namespace hw::bilevel_route
