// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores: which tiles a warp works on, and which of them it need not mask.
// Decided once per walk: per tile, it is a comparison of tile numbers.
#pragma once

#include <cstdint>

#include "softmax/mask.h"

#include "core/macros.h"
#include "core/math.h"

namespace hw::softmax::sm80 {

// Of tiles of kOther keys (kKeysAsRows: of queries), those that some of a warp's lines meets, and
// among them those that all of its lines meet entirely. Nobody looks at lines that are not there.
struct alignas(16) VisibleTiles {
  int begin = 0, end = 0, whole_begin = 0, whole_end = 0;

  HW_DEVICE HW_INLINE bool sees(int tile) const { return tile >= begin && tile < end; }
  HW_DEVICE HW_INLINE bool whole(int tile) const { return tile >= whole_begin && tile < whole_end; }
};

template <bool kKeysAsRows, int kOther>
HW_DEVICE HW_INLINE VisibleTiles visible_tiles(const Mask& m, int64_t first, int lines) {
  const Range own{first, min_of(first + lines, kKeysAsRows ? m.keys : m.rows)};
  if (own.empty()) return {};
  const auto met = [&](int64_t line) {
    return kKeysAsRows ? m.seeing_rows(line) : m.visible_keys(line);
  };
  const Range top = met(own.begin), bottom = met(own.end - 1);
  if (bottom.end <= top.begin) return {};
  return {static_cast<int>(top.begin / kOther),
          static_cast<int>(ceil_div<int64_t>(bottom.end, kOther)),
          static_cast<int>(ceil_div<int64_t>(bottom.begin, kOther)),
          static_cast<int>(top.end / kOther)};
}

}  // namespace hw::softmax::sm80
