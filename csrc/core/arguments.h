// SPDX-License-Identifier: Apache-2.0
// Hands out the tensors and scalars of a call one after another, in the order that an operator's
// header documents.
#pragma once

#include "core/call.h"

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
  double scalar() { return call_.scalar(next_scalar_++); }
  bool flag() { return scalar() != 0; }
  int integer() { return static_cast<int>(scalar()); }

 private:
  const Call& call_;
  int next_tensor_ = 0, next_scalar_ = 0;
};

}  // namespace hw
