// SPDX-License-Identifier: Apache-2.0
// Hands out the tensors and scalars of a call one after another, in the order that an operator's
// header documents.
#pragma once

#include "core/host/call.h"

namespace hw {

class Arguments {
 public:
  explicit Arguments(const Call& call) : call_(call) {}

  template <int N>
  Ref<void, N> output() {
    return call_.tensor(next_tensor_++).ref<N>();
  }
  template <int N>
  Ref<const void, N> input() {
    return output<N>().template as<const void>();
  }
  // A statistic and its rest, [2, ...], or the statistic alone.
  template <class T, int N>
  void with_rest(Ref<T, N>& value, Ref<T, N>& rest) {
    const Tensor& given = call_.tensor(next_tensor_);
    if (given.ndim != N + 1) {
      value = output<N>().template as<T>();
      return;
    }
    const Ref<void, N + 1> both = output<N + 1>();
    check(both.size[0] == 2, ErrorKind::value, "a statistic with its rest has size ", both.size[0],
          " at dimension 0, expected 2");
    value.data = both.data;
    for (int d = 0; d < N; ++d)
      value.size[d] = both.size[d + 1], value.stride[d] = both.stride[d + 1];
    rest = value;
    if (both.data)
      rest.data = static_cast<char*>(both.data) + both.stride[0] * dtype_size(given.dtype);
  }
  double scalar() { return call_.scalar(next_scalar_++); }
  bool flag() { return call_.flag(next_scalar_++); }
  int64_t integer() { return call_.integer(next_scalar_++); }
  int64_t bound() { return call_.bound(next_scalar_++); }

 private:
  const Call& call_;
  int next_tensor_ = 0, next_scalar_ = 0;
};

}  // namespace hw
