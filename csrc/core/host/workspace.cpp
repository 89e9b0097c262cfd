// SPDX-License-Identifier: Apache-2.0
#include "core/host/workspace.h"

#include "core/error.h"

namespace hw {

void refuse_workspace(const char* operation, int64_t bytes, int64_t expected) {
  throw Error(ErrorKind::value,
              concat(operation, ": workspace has ", bytes, " bytes, expected at least ", expected));
}

}  // namespace hw
