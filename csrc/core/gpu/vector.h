// SPDX-License-Identifier: Apache-2.0
// Several neighbouring elements moved at once, for kernels.
//
//   Vec<T, N>            N elements, aligned as a whole
//   load_vector<N>(p)    p[0 .. N-1] in one load (p aligned to N elements)
//   store_vector(p, x)
//   store_columns        neighbouring columns of a row, those that exist
//   aligned<n>(p)        p, which must be a multiple of n bytes
//   has_vectors(ref)     host: every row of `ref` can be moved 16 bytes at a time
#pragma once

#include <bit>
#include <cstdint>

#include "core/macros.h"
#include "core/ref.h"
#if defined(HW_EMULATE)
#include "core/error.h"
#endif

namespace hw {

#if defined(HW_EMULATE)
[[noreturn, gnu::noinline]] inline void misaligned(const void* p, int bytes) {
  throw Error(ErrorKind::runtime, concat("emulator: the address ", p, " of an access to ", bytes,
                                         " bytes is no multiple of that"));
}
#endif

// Where the hardware stops the kernel, so does the emulator.
template <int kBytes, class T>
HW_HOST_DEVICE HW_INLINE T* aligned(T* p) {
#if defined(HW_EMULATE)
  if (reinterpret_cast<uintptr_t>(p) % kBytes != 0) [[unlikely]]
    misaligned(p, kBytes);
#endif
  return p;
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

// Elements of 16 bits are moved as words: as structs of their own they would be moved one by one.
template <class T, int N>
inline constexpr bool kMovesAsWords = sizeof(T) == 2 && N % 2 == 0;

template <int N, class T>
HW_HOST_DEVICE HW_INLINE Vec<T, N> load_vector(const T* from) {
  if constexpr (kMovesAsWords<T, N>) {
    const auto words = *reinterpret_cast<const Vec<uint32_t, N / 2>*>(aligned<2 * N>(from));
    return std::bit_cast<Vec<T, N>>(words);
  } else {
    return *reinterpret_cast<const Vec<T, N>*>(aligned<sizeof(T) * N>(from));
  }
}

template <class T, int N>
HW_HOST_DEVICE HW_INLINE void store_vector(T* to, const Vec<T, N>& x) {
  if constexpr (kMovesAsWords<T, N>) {
    *reinterpret_cast<Vec<uint32_t, N / 2>*>(aligned<2 * N>(to)) =
        std::bit_cast<Vec<uint32_t, N / 2>>(x);
  } else {
    *reinterpret_cast<Vec<T, N>*>(aligned<sizeof(T) * N>(to)) = x;
  }
}

template <class T, int N>
bool has_vectors(const Ref<T, N>& r) {
  constexpr int64_t kVector = 16 / static_cast<int64_t>(sizeof(T));
  bool yes = reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.stride[N - 1] == 1 &&
             r.size[N - 1] % kVector == 0;
  for (int d = 0; d < N - 1; ++d) yes = yes && r.stride[d] % kVector == 0;
  return yes;
}

// Stores kCount neighbouring columns, those below `available`.
template <int kCount, class Element, class A>
HW_DEVICE HW_INLINE void store_columns(Element* to, int64_t stride, bool vectors, int available,
                                       const A (&x)[kCount]) {
  if (vectors && available >= kCount) {
    Vec<Element, kCount> packed;
    HW_UNROLL
    for (int i = 0; i < kCount; ++i) packed.v[i] = Element(x[i]);
    store_vector(to, packed);
    return;
  }
  HW_UNROLL
  for (int i = 0; i < kCount; ++i)
    if (i < available) to[i * stride] = Element(x[i]);
}

}  // namespace hw
