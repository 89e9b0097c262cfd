// SPDX-License-Identifier: Apache-2.0
#include "native_test.h"

int main(int argc, char** argv) { return hw::test::run(argc, argv); }
