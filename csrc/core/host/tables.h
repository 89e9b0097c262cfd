// SPDX-License-Identifier: Apache-2.0
// The tables that the build generates (instances.cpp), and what the dispatcher does with them.
//
// Functions have numbers: their position when those of all operators are counted in order, the same
// in every build of one version.
#pragma once

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

// Chooses, takes the workspace from `allocator` and runs. The call's tensors must have data.
void run(FunctionId, std::optional<Backend>, Call, const Allocator& allocator);

// Bytes that run() would take from the allocator.
int64_t workspace(FunctionId, Backend, const Call&);
// The instance that run() would take of this backend, which can take the call: "bfloat16, dim 64",
// "float32, avx2".
std::string instance_name(FunctionId, Backend, const Call&);

// This library as JSON (see HwApi::info).
std::string describe_library();

}  // namespace hw
