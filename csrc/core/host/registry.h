// SPDX-License-Identifier: Apache-2.0
// Which functions exist, on which backend, for which dtype: the tables behind every call.
//
// An operator is described by hand in ops/<op>/<op>.cpp (an `Operator`); what was built of it is
// listed by the build in a generated table of `Instance`s, from the operator's one CMake line.
//
// A function is described by its list of arguments and by what is asked about its parameters P:
//
//   inline constexpr auto kForwardList = call_list<ForwardParams>(...);
//   constexpr Questions<ForwardParams> kForward{.check = &check_forward};
//   constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward")};
//
// A call is read and checked once; from then on everybody gets `const P&`, the instance that runs
// it too:
//
//   template <class Element> void forward(const ForwardParams& p, const Call& call);
#pragma once

#include <span>
#include <string>

#include "core/host/call.h"
#include "core/host/call_list.h"

namespace hw {

inline constexpr int kMaxFunctions = 5;
inline constexpr size_t kMaxParams = 2048;  // bytes of the parameters of a function

// CPU instruction sets, weakest first. CUDA instances carry Isa::none.
enum class Isa : int32_t { none = -1, baseline, avx2, avx512, avx512bf16, neon };

// The address says which parameters a pointer without type points to.
template <class P>
inline char kParamsTag = 0;

// What may be asked about a call beyond what its list says; all from shapes, dtypes and the device.
// What an operator does not answer has these answers.
template <class P>
struct Questions {
  // Fills in what follows from other arguments, and may state the call in another way.
  void (*complete)(P&, const Call&) = [](P&, const Call&) {};
  // What the list cannot say, common to all backends; throws Error.
  void (*check)(const P&, const Call&) = [](const P&, const Call&) {};
  // Limits of a backend beyond dtype, dim and device; empty when it can.
  std::string (*why_not)(const P&, const Call&, Backend) = [](const P&, const Call&, Backend) {
    return std::string();
  };
  // The number compared with the DIMS of the CMake line (smallest DIM >= this is taken).
  int (*dim)(const P&, const Call&, Backend) = [](const P&, const Call&, Backend) { return 0; };
  // Bytes of workspace on a CUDA backend.
  int64_t (*workspace)(const P&, const Call&, Backend) = [](const P&, const Call&, Backend) {
    return int64_t{0};
  };
};

// A function without the type of its parameters.
struct Function {
  const char* name;  // "forward"
  std::span<const Argument> list;
  const char* tag;
  void (*read)(const Call&, const Sizes&, void* params);  // `params`: kMaxParams bytes
  void (*check)(const void* params, const Call&);
  std::string (*why_not)(const void* params, const Call&, Backend);
  int (*dim)(const void* params, const Call&, Backend);
  int64_t (*workspace)(const void* params, const Call&, Backend);
};

template <const auto& kList, const auto& kQuestions>
consteval Function function(const char* name) {
  using P = typename std::remove_cvref_t<decltype(kList)>::Params;
  static_assert(sizeof(P) <= kMaxParams && std::is_trivially_destructible_v<P>);
  Function f{};
  f.name = name, f.list = kList.arguments, f.tag = &kParamsTag<P>;
  f.read = [](const Call& call, const Sizes& sizes, void* params) {
    P& p = *new (params) P;
    kList.read(call, sizes, p);
    kQuestions.complete(p, call);
  };
  f.check = [](const void* p, const Call& call) {
    kQuestions.check(*static_cast<const P*>(p), call);
  };
  f.why_not = [](const void* p, const Call& call, Backend b) {
    return kQuestions.why_not(*static_cast<const P*>(p), call, b);
  };
  f.dim = [](const void* p, const Call& call, Backend b) {
    return kQuestions.dim(*static_cast<const P*>(p), call, b);
  };
  f.workspace = [](const void* p, const Call& call, Backend b) {
    return kQuestions.workspace(*static_cast<const P*>(p), call, b);
  };
  return f;
}

struct Operator {
  const char* name;  // "linear_attention"
  std::span<const Function> functions;
};

// The entry points of one instance, in the order of the operator's functions.
struct EntryPoint {
  void (*run)(const void* params, const Call&) = nullptr;
  const char* tag = nullptr;
};

template <class P, void (*kRun)(const P&, const Call&)>
constexpr EntryPoint entry_point() {
  return {[](const void* params, const Call& call) { kRun(*static_cast<const P*>(params), call); },
          &kParamsTag<P>};
}
template <auto kRun>
struct EntryOf;
template <class P, void (*kRun)(const P&, const Call&)>
struct EntryOf<kRun> {
  static constexpr EntryPoint value = entry_point<P, kRun>();
};
// Of a function void(const P&, const Call&).
template <auto kRun>
inline constexpr EntryPoint entry = EntryOf<kRun>::value;

struct FunctionTable {
  EntryPoint entries[kMaxFunctions];
};

// One built instance: generated, never written by hand.
struct Instance {
  const Operator* op;
  Backend backend;
  DType dtype;  // of the call's elements
  int dim;      // 0: any
  Isa isa;
  const FunctionTable* table;
};

}  // namespace hw
