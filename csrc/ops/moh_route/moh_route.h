// SPDX-License-Identifier: Apache-2.0
// Which tokens chose a head: the rows that mixture-of-heads attention computes.
//
//   rows_bh = the t with g_bth != 0, increasing, then -1
//
//   B batch, S tokens, H heads. NaN is not 0: such a token is listed, and its result is NaN.
#pragma once

#include <cstdint>

#include "core/host/call.h"

namespace hw::moh_route {

// "moh_route.forward"
struct ForwardParams {
  Ref<const void, 3> gate;  // [B, S, H]     g, in the accumulation type
  Ref<int64_t, 3> rows;     // [B, H, S]     out

  HW_HOST_DEVICE int64_t batch() const { return rows.size[0]; }
  HW_HOST_DEVICE int64_t heads() const { return rows.size[1]; }
  HW_HOST_DEVICE int64_t tokens() const { return rows.size[2]; }
};

}  // namespace hw::moh_route
