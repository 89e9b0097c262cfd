// SPDX-License-Identifier: Apache-2.0
// One list per native function: the only place where the order of its arguments is written.
//
//   inline constexpr auto kForwardList = call_list<ForwardParams>(
//       in("q", &ForwardParams::q, "B Sq Hq D"),
//       in("bias", &ForwardParams::bias, "B? Hq? Sq? Sk?").optional(),
//       out("row", &ForwardParams::row, "B Hq Sq").wide().optional().with(&ForwardParams::rest),
//       number("scale", &ForwardParams::scale), flag("causal", &ForwardParams::causal));
//
// Of it are made: the reader, which fills the parameters of a call; the checks of rank, dtype,
// device, size and presence, for every caller; and what the front end asks for, the names in order,
// of which it makes schemas and tuples. Tensors and scalars are counted apart; tensors that are
// read come before those that are only written.
//
//   sizes      one symbol per dimension; equal symbols are equal sizes throughout the call.
//              "Sk?" may be 1 too: such a dimension is read with the symbol's size and stride 0
//   dtype      that of the call's elements, a floating one, that of the first such tensor;
//              wide(): the accumulation type of it;  index(): int64
//   with(rest) a dimension of size 2 may stand in front: a statistic and its rest
//
// The place in the parameters is a pointer to a member, or a function of the parameters that
// returns a reference to it. Lists are put together from parts: arguments(...) is one.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "core/host/call.h"

namespace hw {

enum class Kind : int32_t { element = 0, wide, index, number, flag, integer, choice };
enum class Way : int32_t { in = 0, out, inout };

inline constexpr int kMaxSymbols = 32;  // sizes of a list

// An argument of a list. Plain data: front ends read it.
struct Argument {
  const char* name = nullptr;
  const char* sizes = nullptr;  // null: a scalar
  Kind kind = Kind::element;
  Way way = Way::in;
  int32_t is_optional = 0, has_rest = 0;
  int32_t choices = 0;            // of a choice: 0 .. choices - 1
  int32_t rank = 0;               // without the dimension of a rest
  int32_t symbol[kMaxDims] = {};  // of each dimension: number of its symbol in the list
  int32_t may_be_one[kMaxDims] = {};

  constexpr bool is_tensor() const { return sizes != nullptr; }
};

struct NoRest {};

// An argument and its place in the parameters.
template <class Accessor, class Rest = NoRest>
struct Entry {
  Argument argument;
  Accessor access;
  Rest rest_access{};

  consteval Entry optional() const {
    Entry e = *this;
    e.argument.is_optional = 1;
    return e;
  }
  consteval Entry wide() const { return of(Kind::wide); }
  consteval Entry index() const { return of(Kind::index); }
  template <class Other>
  consteval Entry<Accessor, Other> with(Other rest) const {
    Entry<Accessor, Other> e{argument, access, rest};
    e.argument.has_rest = 1;
    return e;
  }

 private:
  consteval Entry of(Kind kind) const {
    Entry e = *this;
    e.argument.kind = kind;
    return e;
  }
};

namespace list {

template <class Accessor>
consteval Entry<Accessor> tensor(const char* name, Accessor access, const char* sizes, Way way) {
  Argument a;
  a.name = name, a.sizes = sizes, a.way = way;
  return {a, access};
}
template <class Accessor>
consteval Entry<Accessor> scalar(const char* name, Accessor access, Kind kind, int choices = 0) {
  Argument a;
  a.name = name, a.kind = kind, a.choices = choices;
  return {a, access};
}

}  // namespace list

template <class Accessor>
consteval auto in(const char* name, Accessor access, const char* sizes) {
  return list::tensor(name, access, sizes, Way::in);
}
template <class Accessor>
consteval auto out(const char* name, Accessor access, const char* sizes) {
  return list::tensor(name, access, sizes, Way::out);
}
template <class Accessor>
consteval auto inout(const char* name, Accessor access, const char* sizes) {
  return list::tensor(name, access, sizes, Way::inout);
}
template <class Accessor>
consteval auto number(const char* name, Accessor access) {
  return list::scalar(name, access, Kind::number);
}
template <class Accessor>
consteval auto flag(const char* name, Accessor access) {
  return list::scalar(name, access, Kind::flag);
}
template <class Accessor>
consteval auto integer(const char* name, Accessor access) {
  return list::scalar(name, access, Kind::integer);
}
// An enum with the values 0 .. choices - 1.
template <class Accessor>
consteval auto choice(const char* name, Accessor access, int choices) {
  return list::scalar(name, access, Kind::choice, choices);
}

// A part of lists.
template <class... Entries>
consteval auto arguments(const Entries&... entries) {
  return std::tuple<Entries...>(entries...);
}

// The sizes of the symbols of a call; -1 before one is met.
struct Sizes {
  int64_t of[kMaxSymbols];

  Sizes() {
    for (int64_t& size : of) size = -1;
  }
};

// What the arguments of a call are checked against: throws unless they fit. `op`.`function` are
// named in messages.
void check_arguments(const char* op, const char* function, std::span<const Argument> list,
                     const Call& call, Sizes& sizes);

// The dtype of the elements of a call: of the first tensor of that kind.
DType element_of(std::span<const Argument> list, const Call& call);

// In place of the data of a tensor that a call only describes: there, but not to be read.
inline void* undescribed_data() { return reinterpret_cast<void*>(uintptr_t{64}); }

namespace list {

template <class T, int N>
void read(Ref<T, N>& to, const Argument& a, const Tensor& from, int first, const Sizes& sizes) {
  to = {};
  if (!from.present()) return;
  void* const data = from.data || from.numel() == 0 ? from.data : undescribed_data();
  to.data = static_cast<T*>(data);
  for (int d = 0; d < N; ++d) {
    const int64_t size = from.size[first + d], wanted = sizes.of[a.symbol[d]];
    to.size[d] = wanted;
    to.stride[d] = size == wanted ? from.stride[first + d] : 0;
  }
}

template <class Params, class Accessor, class Rest>
void read_tensor(const Entry<Accessor, Rest>& e, const Argument& a, const Tensor& from,
                 const Sizes& sizes, Params& p) {
  auto& to = std::invoke(e.access, p);
  const int first = from.ndim == a.rank + 1 ? 1 : 0;
  read(to, a, from, first, sizes);
  if constexpr (!std::is_same_v<Rest, NoRest>) {
    auto& rest = std::invoke(e.rest_access, p);
    rest = {};
    if (first == 0) return;
    rest = to;
    if (from.data)
      rest.data = static_cast<char*>(from.data) + from.stride[0] * dtype_size(from.dtype);
  }
}

// Which sizes have which symbols, and whether the list can be meant; a mistake does not compile.
template <size_t kCount>
consteval std::array<Argument, kCount> resolved(std::array<Argument, kCount> all) {
  std::array<std::string_view, kMaxSymbols> symbols{};
  int known = 0;
  for (Argument& a : all) {
    if (!a.is_tensor()) continue;
    std::string_view rest = a.sizes;
    while (!rest.empty()) {
      const size_t end = rest.find(' ') == rest.npos ? rest.size() : rest.find(' ');
      std::string_view symbol = rest.substr(0, end);
      rest.remove_prefix(end == rest.size() ? end : end + 1);
      if (symbol.ends_with('?')) {
        symbol.remove_suffix(1);
        a.may_be_one[a.rank] = 1;
      }
      int s = 0;
      while (s < known && symbols[static_cast<size_t>(s)] != symbol) ++s;
      if (s == known) symbols[static_cast<size_t>(known++)] = symbol;
      a.symbol[a.rank++] = s;
    }
  }
  return all;
}

template <class T>
struct IsRef : std::false_type {};
template <class T, int N>
struct IsRef<Ref<T, N>> : std::true_type {
  static constexpr int kRank = N;
  static constexpr bool kConst = std::is_const_v<T>;
  static constexpr bool kIndex = std::is_same_v<std::remove_const_t<T>, int64_t>;
};

}  // namespace list

// The arguments of a function whose parameters are P.
template <class P, class... Entries>
struct CallList {
  using Params = P;
  std::tuple<Entries...> entries;
  std::array<Argument, sizeof...(Entries)> arguments;

  consteval explicit CallList(std::tuple<Entries...> all)
      : entries(all), arguments(list::resolved(make_arguments(all))) {
    check(std::make_index_sequence<sizeof...(Entries)>{});
  }

  // Of a call that check_arguments has passed.
  void read(const Call& call, const Sizes& sizes, P& p) const {
    size_t tensor = 0, scalar = 0, at = 0;
    std::apply(
        [&](const Entries&... e) {
          (read_entry(e, arguments[at++], call, sizes, tensor, scalar, p), ...);
        },
        entries);
  }

 private:
  template <class Accessor, class Rest>
  static void read_entry(const Entry<Accessor, Rest>& e, const Argument& a, const Call& call,
                         const Sizes& sizes, size_t& tensor, size_t& scalar, P& p) {
    using Member = std::remove_reference_t<std::invoke_result_t<Accessor, P&>>;
    if constexpr (list::IsRef<Member>::value) {
      list::read_tensor(e, a, call.tensors[tensor++], sizes, p);
    } else if constexpr (std::is_floating_point_v<Member>) {
      std::invoke(e.access, p) = call.scalars[scalar++].number;
    } else {
      std::invoke(e.access, p) = static_cast<Member>(call.scalars[scalar++].integer);
    }
  }

  static consteval std::array<Argument, sizeof...(Entries)> make_arguments(
      const std::tuple<Entries...>& all) {
    return std::apply(
        [](const auto&... e) { return std::array<Argument, sizeof...(Entries)>{e.argument...}; },
        all);
  }

  template <size_t... kAt>
  consteval void check(std::index_sequence<kAt...>) const {
    (check_one<kAt>(), ...);
    bool outputs = false;
    for (const Argument& a : arguments) {
      if (!a.is_tensor()) continue;
      if (outputs && a.way != Way::out) throw "inputs come before outputs";
      outputs = a.way == Way::out;
    }
  }
  template <size_t kAt>
  consteval void check_one() const {
    using E = std::tuple_element_t<kAt, std::tuple<Entries...>>;
    using Member = std::remove_reference_t<std::invoke_result_t<decltype(E::access), P&>>;
    const Argument& a = arguments[kAt];
    if constexpr (list::IsRef<Member>::value) {
      if (!a.is_tensor() || a.rank != list::IsRef<Member>::kRank) throw "the rank is another one";
      if ((a.kind == Kind::index) != list::IsRef<Member>::kIndex) throw "index() is for int64";
      if (list::IsRef<Member>::kConst && a.way != Way::in) throw "only inputs are const";
    } else {
      static_assert(std::is_same_v<Member, double> || std::is_same_v<Member, bool> ||
                        std::is_same_v<Member, int64_t> || std::is_enum_v<Member>,
                    "a scalar is a double, a bool, an int64_t or an enum");
      const Kind kind = std::is_same_v<Member, double>    ? Kind::number
                        : std::is_same_v<Member, bool>    ? Kind::flag
                        : std::is_same_v<Member, int64_t> ? Kind::integer
                                                          : Kind::choice;
      if (a.is_tensor() || a.kind != kind) throw "the kind of scalar is another one";
    }
  }
};

namespace list {

template <class Accessor, class Rest>
consteval auto as_part(const Entry<Accessor, Rest>& e) {
  return std::tuple<Entry<Accessor, Rest>>(e);
}
template <class... Entries>
consteval auto as_part(const std::tuple<Entries...>& part) {
  return part;
}
template <class Params, class... Entries>
consteval auto as_list(const std::tuple<Entries...>& all) {
  return CallList<Params, Entries...>(all);
}

}  // namespace list

// From entries and parts, in order.
template <class Params, class... Part>
consteval auto call_list(const Part&... parts) {
  return list::as_list<Params>(std::tuple_cat(list::as_part(parts)...));
}

// ---- What lists cannot say ----------------------------------------------------------------------

// Two arguments that are there together or not at all.
inline void check_together(const char* op, const char* names, bool first, bool second) {
  check(first == second, ErrorKind::value, op, ": ", names, " go together");
}
// Bounds of packed sequences, [N + 1] in a call with `tokens` tokens, of one batch entry: they
// increase from 0 to at most `tokens`. Values are looked at where they lie on the CPU.
void check_bounds(const char* op, const char* name, const Ref<const int64_t, 1>& bounds,
                  const Call& call, int64_t batch, int64_t tokens);
// Sizes that the code keeps in 32 bits: heads and columns.
void check_narrow(const char* op, const char* name, int64_t size);

}  // namespace hw
