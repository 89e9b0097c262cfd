// SPDX-License-Identifier: Apache-2.0
// The key source of the engine on the CPU (softmax/cpu/sorted_source.h): windows of an image.
//
// A window that the image ends in is a smaller window: its slots are the tokens that there are, row
// by row, in their order. Windows have up to four shapes, whole, cut below, at the right, or both;
// what a slot is follows from lists of each shape, without a division, and each shape has a bias of
// its own, [Hq, n, n] of the n slots of a shape.
#pragma once

#include <cstdlib>

#include "ops/window_attention/window_attention.h"
#include "softmax/cpu/sorted_source.h"

#include "core/cpu/parallel.h"
#include "core/dtype.h"

namespace hw::window_attention {
namespace {

using softmax::Range;
using softmax::ScoreParams;

// Windows of a shape: height x width tokens.
struct Shape {
  int64_t height = 0, width = 0;
  const int64_t* offset = nullptr;  // [slots] of a slot's token from that of slot 0

  int64_t slots() const { return height * width; }
};

struct WindowSource {
  static constexpr bool kGathers = true, kInOrder = true;

  struct WorkItem : softmax::WorkItem {
    int64_t first;          // the token of slot 0
    const int64_t* offset;  // [slots]
    bool adjacent;          // tokens follow each other
  };

  RegionGrid grid;
  int64_t windows = 1;            // of an image
  const Shape* shapes = nullptr;  // [2 cut below + cut at the right]

  // Of a window of the image.
  HW_INLINE int shape_of(int64_t window) const {
    const int64_t y = window / grid.columns, x = window % grid.columns;
    const bool below = (y + 1) * grid.height > grid.rows_of_image;
    const bool right = (x + 1) * grid.width > grid.columns_of_image;
    return 2 * int{below} + int{right};
  }

  HW_INLINE WorkItem work_item(const ScoreParams& p, int64_t n, int head) const {
    const int64_t window = n % windows, y = window / grid.columns, x = window % grid.columns;
    const Shape& shape = shapes[shape_of(window)];
    const softmax::Sequence at{n / windows, 0, shape.slots(), 0, shape.slots()};
    return {{at, softmax::mask_of(p, at), head, head / p.group()},
            y * grid.height * grid.columns_of_image + x * grid.width,
            shape.offset,
            shape.width == grid.columns_of_image || shape.height == 1};
  }

  HW_INLINE static int64_t rows(const WorkItem& w) { return w.at.q_count; }
  HW_INLINE static int64_t keys(const WorkItem& w) { return w.at.k_count; }
  HW_INLINE static int64_t row_entry(const WorkItem& w, int64_t slot) { return w.offset[slot]; }
  HW_INLINE static int64_t key_entry(const WorkItem& w, int64_t slot) { return w.offset[slot]; }
  HW_INLINE static int64_t row_token(const WorkItem& w, int64_t, int64_t offset) {
    return w.first + offset;
  }
  HW_INLINE static int64_t key_token(const WorkItem& w, int64_t, int64_t offset) {
    return w.first + offset;
  }
  HW_INLINE static int64_t row_position(const WorkItem&, int64_t slot, int64_t) { return slot; }
  HW_INLINE static int64_t key_position(const WorkItem&, int64_t slot, int64_t) { return slot; }
  HW_INLINE static int64_t row_result(const WorkItem&, int64_t, int64_t token) { return token; }
  HW_INLINE static int64_t key_result(const WorkItem&, int64_t, int64_t token) { return token; }
  HW_INLINE static int64_t key_batch(const WorkItem& w) { return w.at.batch; }
  HW_INLINE static constexpr bool keys_in_order() { return true; }
  HW_INLINE static bool keys_adjacent(const WorkItem& w) { return w.adjacent; }
};
static_assert(softmax::SortedSource<WindowSource>);

// The shapes of the windows of a call, and their biases.
template <class T>
class Shapes {
 public:
  static constexpr int kMost = 4;

  template <class Params>
  HW_NOINLINE explicit Shapes(const Params& p)
      : grid_(p.grid),
        table_width_(p.table_width),
        windows_(p.grid.count()),
        batch_(p.batch()),
        heads_(p.query_heads()) {
    int64_t slots = 0, pairs = 0;
    for (int s = 0; s < kMost; ++s) {
      shapes_[s].height = s / 2 == 0 ? grid_.height : grid_.rows_of_image % grid_.height;
      shapes_[s].width = s % 2 == 0 ? grid_.width : grid_.columns_of_image % grid_.width;
      slots += this->slots(s), pairs += this->slots(s) * this->slots(s);
    }
    offsets_.reserve(slots * static_cast<int64_t>(sizeof(int64_t)));
    if (p.bias_table) biases_.reserve(heads_ * pairs * static_cast<int64_t>(sizeof(T)));
    int64_t* offset = reinterpret_cast<int64_t*>(offsets_.data());
    T* bias = reinterpret_cast<T*>(biases_.data());
    for (int s = 0; s < kMost; ++s) {
      shapes_[s].offset = offset;
      offset = find_offsets(s, offset);
      bias_[s] = bias;
      if (p.bias_table) bias = expand(p.bias_table.template as<const T>(), s, bias);
    }
  }

  WindowSource source() const { return {grid_, windows_, shapes_}; }
  int64_t windows() const { return windows_; }  // of an image
  int64_t slots(int shape) const { return shapes_[shape].slots(); }
  int shape_of(int64_t n) const { return source().shape_of(n % windows_); }
  // The first window from `n` on, of all batch entries, that has the shape.
  int64_t next(int64_t n, int shape) const {
    while (n < batch_ * windows_ && shape_of(n) != shape) ++n;
    return n;
  }

  // [B, Hq, n, n], or absent
  Ref<const void, 4> bias(int shape) const {
    const int64_t n = slots(shape);
    if (bias_[shape] == nullptr) return {};
    return {bias_[shape], {batch_, heads_, n, n}, {0, n * n, n, 1}};
  }

  // f(element of the table) for all pairs of slots of a shape, in the order [n, n].
  template <class F>
  HW_INLINE void each_pair(int shape, F&& f) const {
    const int64_t height = shapes_[shape].height, width = shapes_[shape].width;
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        for (int64_t of_y = 0; of_y < height; ++of_y)
          for (int64_t of_x = 0; of_x < width; ++of_x)
            f(std::abs(of_y - y) * table_width_ + std::abs(of_x - x));
  }

 private:
  // Both return what follows in memory.
  HW_NOINLINE int64_t* find_offsets(int s, int64_t* to) const {
    for (int64_t y = 0; y < shapes_[s].height; ++y)
      for (int64_t x = 0; x < shapes_[s].width; ++x) *to++ = y * grid_.columns_of_image + x;
    return to;
  }
  HW_NOINLINE T* expand(const Ref<const T, 2>& table, int s, T* to) const {
    for (int64_t head = 0; head < heads_; ++head)
      each_pair(s, [&](int64_t bin) { *to++ = table(head, bin); });
    return to;
  }

  const RegionGrid grid_;
  const int64_t table_width_, windows_, batch_, heads_;
  Shape shapes_[kMost];
  const T* bias_[kMost];
  Buffer offsets_, biases_;
};

}  // namespace
}  // namespace hw::window_attention
