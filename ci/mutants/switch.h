// SPDX-License-Identifier: Apache-2.0
// The switches of ci/mutants.py: what a copy of the sources is rewritten to. Never part of a build
// of headworks.
//
// An operator stands for itself and, while the mutant with number n is on, for another one. Only
// its token is replaced, by infix notation that keeps the precedence of everything around it:
//
//   i < end       i < hwm::Less{n} < end      = (i < Less{n}) < end, i <= end while n is on
//   x += y        x += hwm::Plus{n} += y      = x += (Plus{n} += y)
//
// Constant expressions always mean what was written. Where the other operator does not compile for
// the types at hand, the switch counts as one that does not apply. Everything has internal linkage,
// as in core/cpu/simd.h.
#pragma once

#include <type_traits>

#define HWM_INLINE inline __attribute__((always_inline))

extern "C" int hw_mutant_state;  // 0: none is on; n: mutant n is; -1: note which are reached
extern "C" unsigned char hw_mutant_hits[];  // kReached | kDoesNotApply by number

namespace hwm {
namespace {

constexpr unsigned char kReached = 1, kDoesNotApply = 2;

HWM_INLINE constexpr bool on(int n) {
  if (std::is_constant_evaluated()) return false;
  const int state = hw_mutant_state;
  if (state < 0) hw_mutant_hits[n] |= kReached;
  return state == n;
}
HWM_INLINE constexpr void does_not_apply(int n) {
  if (std::is_constant_evaluated()) return;
  if (hw_mutant_state < 0) hw_mutant_hits[n] |= kDoesNotApply;
}

#define HWM_INFIX(Name, op, other)                                   \
  struct Name {                                                      \
    int n;                                                           \
  };                                                                 \
  template <class A>                                                 \
  struct Name##Left {                                                \
    A&& a;                                                           \
    int n;                                                           \
  };                                                                 \
  template <class A>                                                 \
  HWM_INLINE constexpr Name##Left<A> operator op(A&& a, Name m) {    \
    return {static_cast<A&&>(a), m.n};                               \
  }                                                                  \
  template <class A, class B>                                        \
  HWM_INLINE constexpr auto operator op(Name##Left<A> left, B&& b) { \
    using R = std::remove_cvref_t<decltype(left.a op b)>;            \
    if constexpr (requires { static_cast<R>(left.a other b); }) {    \
      if (on(left.n)) return static_cast<R>(left.a other b);         \
    } else {                                                         \
      does_not_apply(left.n);                                        \
    }                                                                \
    return static_cast<R>(left.a op b);                              \
  }

HWM_INFIX(Less, <, <=)
HWM_INFIX(AtMost, <=, <)
HWM_INFIX(More, >, >=)
HWM_INFIX(AtLeast, >=, >)
HWM_INFIX(Equal, ==, !=)
HWM_INFIX(Unequal, !=, ==)
HWM_INFIX(Add, +, -)
HWM_INFIX(Subtract, -, +)
HWM_INFIX(Multiply, *, +)
HWM_INFIX(Divide, /, *)
HWM_INFIX(Remainder, %, /)

// x += Plus{n} += y: y, or -y.
struct Plus {
  int n;
};
struct Minus {
  int n;
};
template <class B>
HWM_INLINE constexpr auto signed_by(int n, const B& b) {
  if constexpr (requires { -b; }) {
    using R = std::remove_cvref_t<decltype(-b)>;
    return on(n) ? static_cast<R>(-b) : static_cast<R>(b);
  } else {
    does_not_apply(n);
    return b;
  }
}
template <class B>
HWM_INLINE constexpr auto operator+=(Plus m, const B& b) {
  return signed_by(m.n, b);
}
template <class B>
HWM_INLINE constexpr auto operator-=(Minus m, const B& b) {
  return signed_by(m.n, b);
}

// Negative{n} * x: -x, or x. Not{n} * x: !x, or x.
struct Negative {
  int n;
};
struct Not {
  int n;
};
template <class A>
HWM_INLINE constexpr auto operator*(Negative m, const A& a) {
  using R = std::remove_cvref_t<decltype(-a)>;
  return on(m.n) ? static_cast<R>(a) : static_cast<R>(-a);
}
template <class A>
HWM_INLINE constexpr bool operator*(Not m, const A& a) {
  return static_cast<bool>(a) == on(m.n);
}

// A literal, or another number.
template <class T>
HWM_INLINE constexpr T number(int n, T right, T wrong) {
  return on(n) ? wrong : right;
}

// An index, or the next.
template <class T>
HWM_INLINE constexpr auto index(int n, const T& i) {
  if constexpr (std::is_integral_v<T>) {
    return on(n) ? static_cast<T>(i + 1) : i;
  } else {
    does_not_apply(n);
    return i;
  }
}

// A condition, or its opposite.
template <class T>
HWM_INLINE constexpr bool condition(int n, const T& c) {
  return static_cast<bool>(c) != on(n);
}

// a, or b where that can take its place.
template <class A, class B>
HWM_INLINE constexpr A&& either(int n, A&& a, B&& b) {
  if constexpr (std::is_same_v<std::remove_cvref_t<A>, std::remove_cvref_t<B>> &&
                std::is_convertible_v<B&&, A&&>) {
    if (on(n)) return static_cast<A&&>(b);
  } else {
    does_not_apply(n);
  }
  return static_cast<A&&>(a);
}

}  // namespace
}  // namespace hwm
