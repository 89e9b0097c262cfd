// SPDX-License-Identifier: Apache-2.0
// Attention inside the windows of an image on CUDA: the key source of the engine, for both backends
// (softmax/key_source.h says what it asks of one).
//
// Sequence n = b W + w is window w of batch entry b. Rows and keys are the N slots of the window,
// row by row; positions are slots; slots beyond the image have no token.
#pragma once

#include "ops/window_attention/window_attention.h"
#include "softmax/key_source.h"

namespace hw::window_attention {

using softmax::kNoToken;
using softmax::ScoreParams;

struct WindowSource {
  static constexpr bool kGathers = true, kInOrder = true;

  struct WorkItem : softmax::WorkItem {
    int top, left;  // of the window in the image
  };

  int windows, slots;          // W, N
  int columns, height, width;  // windows side by side; of a window
  int image_height, image_width;

  template <class Params>  // of a call
  static WindowSource of(const Params& p) {
    const RegionGrid& g = p.grid;
    const auto narrow = [](int64_t n) { return static_cast<int>(n); };
    return {narrow(g.count()), narrow(g.size()),        narrow(g.columns),         narrow(g.height),
            narrow(g.width),   narrow(g.rows_of_image), narrow(g.columns_of_image)};
  }

  HW_HOST_DEVICE HW_INLINE WorkItem work_item(const ScoreParams& p, int64_t n, int head) const {
    const softmax::Sequence at{n / windows, 0, slots, 0, slots};
    const int window = static_cast<int>(n % windows);
    return {{at, softmax::mask_of(p, at), head, head / p.group()},
            window / columns * height,
            window % columns * width};
  }
  HW_HOST_DEVICE HW_INLINE int rows(const WorkItem&) const { return slots; }
  HW_HOST_DEVICE HW_INLINE int keys(const WorkItem&) const { return slots; }
  HW_HOST_DEVICE HW_INLINE static int row_entry(const WorkItem&, int slot) { return slot; }
  HW_HOST_DEVICE HW_INLINE static int key_entry(const WorkItem&, int slot) { return slot; }
  HW_HOST_DEVICE HW_INLINE int row_token(const WorkItem& w, int slot, int64_t) const {
    return token(w, slot);
  }
  HW_HOST_DEVICE HW_INLINE int key_token(const WorkItem& w, int slot, int64_t) const {
    return token(w, slot);
  }
  HW_HOST_DEVICE HW_INLINE static int row_position(const WorkItem&, int slot, int) { return slot; }
  HW_HOST_DEVICE HW_INLINE static int key_position(const WorkItem&, int slot, int) { return slot; }
  HW_HOST_DEVICE HW_INLINE static int64_t row_result(const WorkItem&, int64_t, int64_t token) {
    return token;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_result(const WorkItem&, int64_t, int64_t token) {
    return token;
  }
  HW_HOST_DEVICE HW_INLINE static int64_t key_batch(const WorkItem& w) { return w.at.batch; }
  HW_HOST_DEVICE HW_INLINE static constexpr bool keys_in_order() { return true; }

 private:
  HW_HOST_DEVICE HW_INLINE int token(const WorkItem& w, int slot) const {
    const int y = w.top + slot / width, x = w.left + slot % width;
    return y < image_height && x < image_width ? y * image_width + x : kNoToken;
  }
};
static_assert(softmax::KeySource<WindowSource>);

}  // namespace hw::window_attention
