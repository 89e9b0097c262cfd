// SPDX-License-Identifier: Apache-2.0
// A test program in one header.
//
//   TEST(name) { EXPECT(condition, "what ", value); }
//   int main(int argc, char** argv) { return hw::test::run(argc, argv); }
//
// Prints a line per test and closes with "N passed, N failed"; arguments name the tests to run.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "core/error.h"

namespace hw::test {

struct Test {
  const char* name;
  std::function<void()> body;
};

inline std::vector<Test>& all() {
  static std::vector<Test> tests;
  return tests;
}

struct Registration {
  Registration(const char* name, std::function<void()> body) { all().push_back({name, body}); }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Part>
void expect(bool condition, const char* text, const char* file, int line, const Part&... part) {
  if (!condition) throw Failure(concat(file, ":", line, ": ", text, " does not hold ", part...));
}

inline bool selected(const char* name, int argc, char** argv) {
  if (argc <= 1) return true;
  for (int i = 1; i < argc; ++i)
    if (std::strcmp(argv[i], name) == 0) return true;
  return false;
}

inline int run(int argc, char** argv) {
  int passed = 0, failed = 0;
  for (const Test& test : all()) {
    if (!selected(test.name, argc, argv)) continue;
    try {
      test.body();
      ++passed;
      std::printf("ok      %s\n", test.name);
    } catch (const std::exception& e) {
      ++failed;
      std::printf("FAILED  %s\n        %s\n", test.name, e.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace hw::test

#define TEST(name)                                                             \
  static void test_##name();                                                   \
  static const hw::test::Registration registration_##name(#name, test_##name); \
  static void test_##name()

#define EXPECT(condition, ...) \
  hw::test::expect((condition), #condition, __FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__)
