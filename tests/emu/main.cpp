// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "native_test.h"
#include "plant.h"

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--plant") == 0) return hw::test::plant(argv[2]);
  return hw::test::run(argc, argv);
}
