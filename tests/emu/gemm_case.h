// SPDX-License-Identifier: Apache-2.0
// Inputs of the matrix product and its plain loop.
#pragma once

#include <vector>

#include "buffer.h"
#include "check.h"
#include "gemm.cuh"

namespace hw::test {

// Small integers: every format holds them, and every sum is exact in fp32.
template <Format kFormat>
struct GemmCase {
  using Element = typename GemmTypes<kFormat>::Element;
  int m, n, k;
  std::vector<Element> a, b;
  std::vector<float> want;

  GemmCase(int m, int n, int k, uint64_t seed = 1) : m(m), n(n), k(k) {
    Numbers numbers(seed);
    a.resize(static_cast<size_t>(m) * k);
    b.resize(static_cast<size_t>(k) * n);
    for (Element& x : a) x = Element(numbers.integer());
    for (Element& x : b) x = Element(numbers.integer());
    want.assign(static_cast<size_t>(m) * n, 0.0f);
    for (int i = 0; i < m; ++i) {
      for (int l = 0; l < k; ++l) {
        for (int j = 0; j < n; ++j) want[i * n + j] += float(a[i * k + l]) * float(b_at(l, j));
      }
    }
  }

  Element b_at(int l, int j) const { return kFormat == Format::tf32 ? b[j * k + l] : b[l * n + j]; }

  template <Plant kPlant = Plant::none>
  std::vector<float> run(int num_threads = 1) const {
    using Kernel = Gemm<kFormat, kPlant>;
    const Buffer<Element> da(a), db(b);
    const Buffer<float> dc(want.size(), 0.0f);
    launch<Kernel>(Kernel::grid(m, n), Kernel::kSharedBytes, context(num_threads),
                   {da.data(), db.data(), dc.data(), m, n, k});
    return dc.read();
  }

  // How many elements of `got` are wrong, and how many of these are NaN.
  struct Wrong {
    int count = 0, nan = 0;
  };
  Wrong wrong(const std::vector<float>& got) const {
    Wrong w;
    for (size_t i = 0; i < want.size(); ++i) {
      if (got[i] == want[i]) continue;
      ++w.count;
      if (std::isnan(got[i])) ++w.nan;
    }
    return w;
  }
};

}  // namespace hw::test
