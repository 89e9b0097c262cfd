// SPDX-License-Identifier: Apache-2.0
// What the processor can do at most, with all threads: arithmetic that never leaves the registers,
// and a copy of arrays that no cache holds. bench/peak.py compiles this for the machine it runs on.
//
// Vectors, pairs of bf16 and the exponential are those of the operators (csrc/core/cpu), so that
// the rates are in the operators' own instructions.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include <omp.h>

#include "core/cpu/bf16_dot.h"
#include "core/cpu/simd_math.h"

namespace {

using namespace hw;

// Independent sums: at least latency (4 to 6 cycles) times instructions a cycle (2), and no more
// than there are registers beside two operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif
// Independent exponentials; each needs more registers on its way.
constexpr int kExps = 4;

// Keeps a value from being known, or dropped, by the compiler.
template <class V>
HW_INLINE void opaque(V& x) {
#if defined(__aarch64__)
  asm volatile("" : "+w"(x));
#else
  asm volatile("" : "+x"(x));
#endif
}

// kSums fused multiply-adds a round on each thread; kSums * kLanes * 2 * depth operations.
template <class E, class A>
void multiply_add(int64_t rounds, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Vec<E> x = splat(E{}), y = splat(E{});
    Vec<A> sum[kSums] = {};
    opaque(x), opaque(y);
    for (int64_t i = 0; i < rounds; ++i) {
      HW_UNROLL for (int j = 0; j < kSums; ++j) sum[j] = fma(x, y, sum[j]);
      HW_UNROLL for (int j = 0; j < kSums; ++j) opaque(sum[j]);
    }
  }
}

// kExps vectors of exponentials a round on each thread.
template <class A>
void exponentials(int64_t rounds, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Vec<A> x[kExps];
    for (int64_t i = 0; i < rounds; ++i) {
      HW_UNROLL for (int j = 0; j < kExps; ++j) {
        x[j] = Vec<A>{};
        opaque(x[j]);
        x[j] = exp_of(x[j]);
        opaque(x[j]);
      }
    }
  }
}

// What a round is: operations of E and A, or exponentials.
template <class E, class A>
constexpr int64_t kOperations = int64_t{2} * kSums * kLanes<A> * kDepth<E>;
template <class A>
constexpr int64_t kResults = int64_t{kExps} * kLanes<A>;

}  // namespace

// `rounds` of a kind on each of `threads` threads. Each returns what one thread did of it,
// operations or exponentials; 0: this processor has no such instruction.
extern "C" int64_t hw_peak_f32(int64_t rounds, int threads) {
  multiply_add<float, float>(rounds, threads);
  return rounds * kOperations<float, float>;
}
extern "C" int64_t hw_peak_f64(int64_t rounds, int threads) {
  multiply_add<double, double>(rounds, threads);
  return rounds * kOperations<double, double>;
}
extern "C" int64_t hw_peak_bf16(int64_t rounds, int threads) {
#if defined(__AVX512BF16__)
  multiply_add<Bf16Pair, float>(rounds, threads);
  return rounds * kOperations<Bf16Pair, float>;
#else
  return 0 * rounds * threads;
#endif
}
extern "C" int64_t hw_peak_exp_f32(int64_t rounds, int threads) {
  exponentials<float>(rounds, threads);
  return rounds * kResults<float>;
}
extern "C" int64_t hw_peak_exp_f64(int64_t rounds, int threads) {
  exponentials<double>(rounds, threads);
  return rounds * kResults<double>;
}

// to[0, bytes) = from[0, bytes), a share of it on each thread.
extern "C" void hw_peak_copy(char* to, const char* from, int64_t bytes, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t begin = bytes / n * i, end = i + 1 == n ? bytes : bytes / n * (i + 1);
    std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
  }
}
