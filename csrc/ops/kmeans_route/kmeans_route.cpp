// SPDX-License-Identifier: Apache-2.0
// Routing by k-means, host side: arguments of a call and checks.
#include "ops/kmeans_route/kmeans_route.h"

#include "core/arguments.h"
#include "core/registry.h"

namespace hw::kmeans_route {
namespace {

constexpr const char* kFunctions[] = {"similarity", "prefix"};
enum Function { kSimilarity, kPrefix };

template <int N>
void check_sizes(const char* name, const Tensor& tensor, const int64_t (&expected)[N]) {
  for (int n = 0; n < N; ++n)
    check(tensor.size[n] == expected[n], ErrorKind::value, "kmeans_route: ", name, " has size ",
          tensor.size[n], " at dimension ", n, ", expected ", expected[n]);
}

void check_similarity(const Call& call) {
  const SimilarityParams p = similarity_params(call);
  const Tensor &x = call.tensor(0), &centroids = call.tensor(1), &d = call.tensor(2);
  const DType wide = x.dtype == DType::f64 ? DType::f64 : DType::f32;
  check(centroids.dtype == wide && d.dtype == wide, ErrorKind::type, "kmeans_route: centroids are ",
        dtype_name(centroids.dtype), " and d is ", dtype_name(d.dtype), ", expected ",
        dtype_name(wide), " beside x of ", dtype_name(x.dtype));
  check_sizes("centroids", centroids, {x.size[2], p.clusters(), x.size[3]});
  check_sizes("d", d, {x.size[0], x.size[2], centroids.size[1], x.size[1]});
  check(p.tokens() <= 1 || d.stride[3] == 1, ErrorKind::value, "kmeans_route: d has stride ",
        d.stride[3], " along the tokens, expected 1");
}

void check_prefix(const Call& call) {
  const PrefixParams p = prefix_params(call);
  const Tensor &d = call.tensor(0), &index = call.tensor(1);
  check(index.dtype == DType::i64, ErrorKind::type, "kmeans_route: index is ",
        dtype_name(index.dtype), ", expected int64");
  check_sizes("index", index, {d.size[0], p.window()});
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
  p.length = static_cast<int64_t>(a.scalar());
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {"kmeans_route", kFunctions, &check_call,
                            &why_not,       &any_dim,   &no_workspace};

}  // namespace hw::kmeans_route
