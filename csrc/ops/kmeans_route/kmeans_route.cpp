// SPDX-License-Identifier: Apache-2.0
// Routing by k-means, host side: the lists of its functions and checks.
#include "ops/kmeans_route/kmeans_route.h"

#include "core/host/registry.h"

namespace hw::kmeans_route {
namespace {

constexpr auto kSimilarityList =
    call_list<SimilarityParams>(in("x", &SimilarityParams::x, "B S H D"),
                                in("centroids", &SimilarityParams::centroids, "H K D").wide(),
                                out("d", &SimilarityParams::d, "B H K S").wide());
constexpr auto kPrefixList = call_list<PrefixParams>(
    in("d", &PrefixParams::d, "R S"), out("index", &PrefixParams::index, "R W").index(),
    integer("length", &PrefixParams::length));

void check_similarity(const SimilarityParams& p, const Call&) {
  check_narrow("kmeans_route", "the number of channels", p.channels());
  check_narrow("kmeans_route", "the number of clusters", p.clusters());
  check(p.tokens() <= 1 || p.d.stride[3] == 1, ErrorKind::value, "kmeans_route: d has stride ",
        p.d.stride[3], " along the tokens, expected 1");
}

void check_prefix(const PrefixParams& p, const Call&) {
  check(p.length >= p.tokens() && p.length >= p.window(), ErrorKind::value,
        "kmeans_route: length is ", p.length, ", expected at least ", p.tokens(), " tokens and ",
        p.window(), " members");
}

template <class P>
std::string why_not(const P&, const Call&, Backend backend) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "kmeans_route needs similarities as exact as fp32; simt is its CUDA backend";
  return {};
}

constexpr Questions<SimilarityParams> kSimilarity{.check = &check_similarity,
                                                  .why_not = &why_not<SimilarityParams>};
constexpr Questions<PrefixParams> kPrefix{.check = &check_prefix,
                                          .why_not = &why_not<PrefixParams>};

constexpr Function kFunctions[] = {function<kSimilarityList, kSimilarity>("similarity"),
                                   function<kPrefixList, kPrefix>("prefix")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {"kmeans_route", kFunctions};

}  // namespace hw::kmeans_route
