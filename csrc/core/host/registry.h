// SPDX-License-Identifier: Apache-2.0
// Which functions exist, on which backend, for which dtype: the tables behind every call.
//
// An operator is described by hand in ops/<op>/<op>.cpp (an `Operator`); what was built of it is
// listed by the build in a generated table of `Instance`s, from the operator's one CMake line.
//
//   why_not(...)   the reason in words why a backend cannot take a call; empty if it can
//   run(...)       checks, picks the backend (Request::automatic: the first that can) and runs it
#pragma once

#include <optional>
#include <span>
#include <string>

#include "core/host/call.h"
#include "core/host/signature.h"

namespace hw {

inline constexpr int kMaxFunctions = 4;

// CPU instruction sets, weakest first. CUDA instances carry Isa::none.
enum class Isa : int32_t { none = -1, baseline, avx2, avx512, avx512bf16, neon };

// The entry points of one instance, in the order of the operator's functions.
struct FunctionTable {
  void (*run[kMaxFunctions])(const Call&) = {};
};

struct Operator {
  const char* name;                        // "linear_attention"
  std::span<const char* const> functions;  // {"forward", "backward", "step"}
  std::span<const Signature> signatures;   // of these
  // What the signatures cannot say, common to all backends; throws Error.
  void (*check)(int function, const Call&);
  // Limits of a backend beyond dtype, dim and device; empty when it can.
  std::string (*why_not)(int function, Backend, const Call&);
  // The number compared with the DIMS of the CMake line (smallest DIM >= this is taken).
  int (*dim)(int function, Backend, const Call&);
  // Bytes of device workspace the call needs, from shapes only; 0 on the CPU.
  int64_t (*workspace)(int function, Backend, const Call&);
};

// One built instance: generated, never written by hand.
struct Instance {
  const Operator* op;
  Backend backend;
  DType dtype;  // of the first tensor of elements
  int dim;      // 0: any
  Isa isa;
  const FunctionTable* table;
};

}  // namespace hw
