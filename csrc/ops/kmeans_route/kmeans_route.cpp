// SPDX-License-Identifier: Apache-2.0
// Routing by k-means, host side: arguments of a call and checks.
#include "ops/kmeans_route/kmeans_route.h"

#include "core/host/arguments.h"
#include "core/host/registry.h"

namespace hw::kmeans_route {
namespace {

constexpr const char* kFunctions[] = {"similarity", "prefix"};
enum Function { kSimilarity, kPrefix };

constexpr Argument kSimilarityTensors[] = {
    {"x", "BSHD"}, {"centroids", "HKD", Kind::wide}, {"d", "BHKS", Kind::wide}};
constexpr Argument kPrefixTensors[] = {{"d", "RS"}, {"index", "RW", Kind::index}};
constexpr Signature kSignatures[] = {{kSimilarityTensors, 0}, {kPrefixTensors, 1}};

void check_similarity(const Call& call) {
  const SimilarityParams p = similarity_params(call);
  const Tensor& d = call.tensor(2);
  check_narrow("kmeans_route", "the number of channels", p.channels());
  check_narrow("kmeans_route", "the number of clusters", p.clusters());
  check(p.tokens() <= 1 || d.stride[3] == 1, ErrorKind::value, "kmeans_route: d has stride ",
        d.stride[3], " along the tokens, expected 1");
}

void check_prefix(const Call& call) {
  const PrefixParams p = prefix_params(call);
  check(p.length >= p.tokens() && p.length >= p.window(), ErrorKind::value,
        "kmeans_route: length is ", p.length, ", expected at least ", p.tokens(), " tokens and ",
        p.window(), " members");
}

void check_call(int function, const Call& call) {
  function == kSimilarity ? check_similarity(call) : check_prefix(call);
}

std::string why_not(int, Backend backend, const Call&) {
  if (backend == Backend::sm80 || backend == Backend::sm90)
    return "kmeans_route needs similarities as exact as fp32; simt is its CUDA backend";
  return {};
}

int any_dim(int, Backend, const Call&) { return 0; }
int64_t no_workspace(int, Backend, const Call&) { return 0; }

}  // namespace

SimilarityParams similarity_params(const Call& call) {
  Arguments a(call);
  SimilarityParams p;
  p.x = a.input<4>();
  p.centroids = a.input<3>();
  p.d = a.output<4>();
  return p;
}

PrefixParams prefix_params(const Call& call) {
  Arguments a(call);
  PrefixParams p;
  p.d = a.input<2>();
  p.index = a.output<2>().as<int64_t>();
  p.length = a.integer();
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {"kmeans_route", kFunctions, kSignatures,  &check_call,
                            &why_not,       &any_dim,   &no_workspace};

}  // namespace hw::kmeans_route
