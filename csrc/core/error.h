// SPDX-License-Identifier: Apache-2.0
// Errors of the native library. Native code throws Error; the C boundary turns it into a status and
// a message, and the binding into the Python exception of the same kind.
//
//   check(condition, ErrorKind::value, "k has size ", got, " at dimension 3, expected ", want)
#pragma once

#include <charconv>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace hw {

enum class ErrorKind : int {
  none = 0,
  value = 1,            // ValueError: shapes, ranges
  type = 2,             // TypeError: dtypes
  not_implemented = 3,  // NotImplementedError: feature x backend
  runtime = 4,          // RuntimeError: devices, launches
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// Appends a text, a number or an address. Without streams and locales, which are those of the
// process, where several C++ libraries may have met.
template <class T>
void append(std::string& text, const T& part) {
  if constexpr (std::is_convertible_v<const T&, std::string_view>) {
    text += std::string_view(part);
  } else if constexpr (std::is_same_v<T, char>) {
    text += part;
  } else if constexpr (std::is_integral_v<T>) {
    text += std::to_string(part);
  } else {
    static_assert(std::is_floating_point_v<T> || std::is_pointer_v<T>);
    char buffer[32];
    char* end = buffer;
    if constexpr (std::is_pointer_v<T>) {
      text += "0x";
      end =
          std::to_chars(buffer, buffer + sizeof buffer, reinterpret_cast<uintptr_t>(part), 16).ptr;
    } else {
      constexpr int kDigits = 6;
      end = std::to_chars(buffer, buffer + sizeof buffer, static_cast<double>(part),
                          std::chars_format::general, kDigits)
                .ptr;
    }
    text.append(buffer, end);
  }
}

template <class... Part>
std::string concat(const Part&... part) {
  std::string text;
  (append(text, part), ...);
  return text;
}

template <class... Part>
void check(bool condition, ErrorKind kind, const Part&... part) {
  if (!condition) [[unlikely]]
    throw Error(kind, concat(part...));
}

}  // namespace hw
