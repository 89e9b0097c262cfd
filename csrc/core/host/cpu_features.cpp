// SPDX-License-Identifier: Apache-2.0
#include "core/host/cpu_features.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <initializer_list>

#include "core/host/tables.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hw {
namespace {

// Weakest first.
constexpr Isa kIsas[] = {Isa::baseline, Isa::neon, Isa::avx2, Isa::avx512, Isa::avx512bf16};

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

// XCR0: the register states that the operating system saves on a task switch.
unsigned saved_states() {
  constexpr unsigned kOsxsave = 1u << 27;
  if (!(cpuid(1, 0).c & kOsxsave)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool all(unsigned value, std::initializer_list<int> bits) {
  return std::all_of(bits.begin(), bits.end(), [&](int bit) { return value >> bit & 1u; });
}

bool detect(Isa isa) {
  constexpr int kXmm = 1, kYmm = 2, kOpmask = 5, kZmmLow = 6, kZmmHigh = 7;  // bits of XCR0
  const unsigned states = saved_states();
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  const bool avx2 = all(states, {kXmm, kYmm}) && all(one.c, {12, 28, 29}) &&  // FMA AVX F16C
                    all(seven.b, {5});                                        // AVX2
  const bool avx512 = avx2 && all(states, {kOpmask, kZmmLow, kZmmHigh}) &&
                      all(seven.b, {16, 17, 30, 31});  // F DQ BW VL
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512bf16: return avx512 && all(cpuid(7, 1).a, {5});  // AVX512_BF16
    default: return false;
  }
}

#elif defined(__aarch64__)
bool detect(Isa isa) { return isa == Isa::baseline || isa == Isa::neon; }
#else
bool detect(Isa isa) { return isa == Isa::baseline; }
#endif

std::string joined(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

Isa strongest() {
  Isa best = Isa::baseline;
  for (Isa isa : built_isas())
    if (machine_has(isa)) best = isa;
  return best;
}

Isa parse(const std::string& name, const std::string& source) {
  const std::optional<Isa> isa = isa_by_name(name);
  const auto& built = built_isas();
  check(isa && std::find(built.begin(), built.end(), *isa) != built.end(), ErrorKind::value, source,
        " is '", name, "', but this build has the CPU instruction sets ", joined(built));
  check(machine_has(*isa), ErrorKind::runtime, source, " is '", name,
        "', but this machine does not support it; leave it unset to use ", isa_name(strongest()));
  return *isa;
}

// The choice, or Isa::none before the first use.
std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{Isa::none};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::none: return "none";
    case Isa::baseline: return "baseline";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::neon: return "neon";
  }
  return "unknown";
}

std::optional<Isa> isa_by_name(std::string_view name) {
  for (Isa isa : kIsas)
    if (name == isa_name(isa)) return isa;
  return std::nullopt;
}

bool machine_has(Isa isa) { return detect(isa); }

const std::vector<Isa>& built_isas() {
  static const std::vector<Isa> built = [] {
    std::vector<Isa> found;
    for (Isa isa : kIsas)
      for (const Instance& instance : instances())
        if (instance.isa == isa) {
          found.push_back(isa);
          break;
        }
    return found;
  }();
  return built;
}

Isa cpu_isa() {
  Isa isa = chosen().load(std::memory_order_relaxed);
  if (isa == Isa::none) [[unlikely]] {
    const char* name = std::getenv("HEADWORKS_CPU_ISA");
    set_cpu_isa(name ? name : "", "HEADWORKS_CPU_ISA");
    isa = chosen().load(std::memory_order_relaxed);
  }
  return isa;
}

void set_cpu_isa(const std::string& name, const std::string& source) {
  chosen().store(name.empty() ? strongest() : parse(name, source), std::memory_order_relaxed);
}

}  // namespace hw
