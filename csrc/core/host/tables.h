// SPDX-License-Identifier: Apache-2.0
// The tables that the build generates (instances.cpp), and what the dispatcher does with them.
//
// Functions have numbers: their position when those of all operators are counted in order, the same
// in every build of one version.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "core/host/registry.h"

namespace hw {

// Generated.
std::span<const Operator* const> operators();
std::span<const Instance> instances();  // in the order of operators()

struct FunctionId {
  const Operator* op = nullptr;
  int index = 0;  // in op->functions

  const Function& function() const { return op->functions[static_cast<size_t>(index)]; }
  std::string name() const;  // "linear_attention.forward"
};

int num_functions();
FunctionId function_by_number(int number);  // throws Error if there is none

// The reason in words why a backend cannot take a call; empty if it can.
std::string why_not(FunctionId, Backend, const Call&);

// The backend asked for (nullopt: the first that can), or an Error with the reasons.
Backend choose(FunctionId, std::optional<Backend>, const Call&);

// Where the memory that a call works in comes from; null for bytes that there are not.
struct Allocator {
  void* (*allocate)(void* self, int64_t bytes) = nullptr;
  void* self = nullptr;
};

// A call that has been read: what everybody looks at who has a say in it.
struct Reading {
  FunctionId id;
  Call call;
  alignas(16) std::byte params[kMaxParams];

  // Throws unless the call is as its function's list and checks say.
  Reading(FunctionId, const Call& given);

  int dim(Backend b) const { return id.function().dim(params, call, b); }
  const Tensor& first() const { return call.tensors[0]; }
};

// What runs the call, of the backend asked for (nullopt: the first that can), with its workspace
// from `allocator`. The call's tensors must have data.
const EntryPoint& prepare(Reading&, std::optional<Backend>, const Allocator& allocator);

// Bytes that prepare() would take from the allocator.
int64_t workspace(FunctionId, Backend, const Call&);
// The instance that prepare() would take of this backend, which can take the call: "float32, avx2",
// "bfloat16, dim 64".
std::string instance_name(FunctionId, Backend, const Call&);

// This library as JSON (see HwApi::info).
std::string describe_library();

}  // namespace hw
