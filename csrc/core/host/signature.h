// SPDX-License-Identifier: Apache-2.0
// What a native function expects of its tensors and scalars: one table per function, beside the
// operator's host code, in the order of the call. Checked before anything else looks at a call.
//
//   sizes      one letter per dimension; equal letters are equal sizes throughout the call
//              "+..."   may have a dimension of size 2 in front: a statistic and its rest
//   kind       element     the dtype of the call, a floating one: that of its first such tensor
//              wide        the accumulation type of it
//              index       int64
//   need       required, or may be absent
//
// Behind the tensors of the table a call may have one more, its workspace.
#pragma once

#include <array>
#include <span>

#include "core/host/call.h"

namespace hw {

enum class Kind { element, wide, index };
enum class Need { required, optional };

struct Argument {
  const char* name;
  const char* sizes;
  Kind kind = Kind::element;
  Need need = Need::required;
};

struct Signature {
  std::span<const Argument> tensors;
  int scalars = 0;
};

// Tables that begin or end alike are put together from parts.
template <size_t kFirst, size_t kSecond>
constexpr std::array<Argument, kFirst + kSecond> joined(const std::array<Argument, kFirst>& a,
                                                        const std::array<Argument, kSecond>& b) {
  std::array<Argument, kFirst + kSecond> all{};
  for (size_t i = 0; i < kFirst; ++i) all[i] = a[i];
  for (size_t i = 0; i < kSecond; ++i) all[kFirst + i] = b[i];
  return all;
}

// Throws unless the call is as its signature says. `function` names it in messages.
void check_signature(const char* op, const char* function, const Signature& s, const Call& call);

// What signatures cannot say. Both throw; `op` names the operator.
void check_together(const char* op, const Call& call, int tensor, int other, const char* names);
// Bounds of packed sequences, [N + 1] in a call with `tokens` tokens, of one batch entry: they
// increase from 0 to at most `tokens`. Values are looked at where they lie on the CPU.
void check_bounds(const char* op, const char* name, const Tensor& bounds, int64_t batch,
                  int64_t tokens);
// Sizes that the code keeps in 32 bits: heads and columns.
void check_narrow(const char* op, const char* name, int64_t size);

}  // namespace hw
