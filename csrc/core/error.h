// SPDX-License-Identifier: Apache-2.0
// Errors of the native library. Native code throws Error; the C boundary turns it into a status and
// a message, and the binding into the Python exception of the same kind.
//
//   check(condition, ErrorKind::value, "k has size ", got, " at dimension 3, expected ", want)
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

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

template <class... Part>
std::string concat(const Part&... part) {
  std::ostringstream out;
  (out << ... << part);
  return out.str();
}

template <class... Part>
void check(bool condition, ErrorKind kind, const Part&... part) {
  if (!condition) [[unlikely]]
    throw Error(kind, concat(part...));
}

}  // namespace hw
