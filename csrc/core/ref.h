// SPDX-License-Identifier: Apache-2.0
// Ref<T, N>: a non-owning reference to an N-dimensional strided array.
//
//   ref(i, j, ...)   element i, j, ...; strides are counted in elements, of any size, also zero
//   ref.slice(i)     the (N-1)-dimensional array at first index i
//   ref.as<U>()      the same array with elements of type U (from void)
//
// All arithmetic is int64. A default-constructed Ref is "absent" and tests false.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/macros.h"

namespace hw {

template <class T, int N>
struct Ref {
  T* data = nullptr;
  int64_t size[N] = {};
  int64_t stride[N] = {};

  HW_HOST_DEVICE explicit operator bool() const { return data != nullptr; }

  template <class... Index>
  HW_HOST_DEVICE int64_t offset(Index... index) const {
    static_assert(sizeof...(Index) <= N, "more indices than dimensions");
    const int64_t at[] = {static_cast<int64_t>(index)...};
    int64_t sum = 0;
    for (int d = 0; d < static_cast<int>(sizeof...(Index)); ++d) sum += at[d] * stride[d];
    return sum;
  }

  // The element at the given indices; with fewer indices than dimensions, the first of the rest.
  template <class... Index>
  HW_HOST_DEVICE std::add_lvalue_reference_t<T> operator()(Index... index) const {
    return data[offset(index...)];
  }

  template <class... Index>
  HW_HOST_DEVICE T* at(Index... index) const {
    return data + offset(index...);
  }

  HW_HOST_DEVICE Ref<T, N - 1> slice(int64_t i) const {
    Ref<T, N - 1> r;
    r.data = data + i * stride[0];
    for (int d = 1; d < N; ++d) {
      r.size[d - 1] = size[d];
      r.stride[d - 1] = stride[d];
    }
    return r;
  }

  template <class U>
  HW_HOST_DEVICE Ref<U, N> as() const {
    Ref<U, N> r;
    r.data = static_cast<U*>(data);
    for (int d = 0; d < N; ++d) {
      r.size[d] = size[d];
      r.stride[d] = stride[d];
    }
    return r;
  }
};

}  // namespace hw
