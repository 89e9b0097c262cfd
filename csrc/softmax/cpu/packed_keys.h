// SPDX-License-Identifier: Apache-2.0
// Operands made of the keys of one head, kept by a thread while it works on blocks of that head.
//
// Where elements are not multiplied as they lie (see cpu/operands.h) each tile of k and v is
// copied, widened or paired before it is multiplied. All blocks of queries that see a tile want the
// same operands: the first makes them.
#pragma once

#include "softmax/cpu/operands.h"

namespace hw::softmax {
namespace {

template <class T>
class PackedKeys {
 public:
  using E = Multiplied<T>;

  static constexpr int64_t kMostBytes = 4 << 20;  // of a thread; beyond it tiles are made anew

  static int64_t bytes(int64_t keys, int dim, int value_dim) {
    return ceil_div<int64_t>(keys, kKeys) * (size_of(dim) + size_of(value_dim)) *
           static_cast<int64_t>(sizeof(E));
  }

  // Memory for `keys` keys of a head.
  HW_NOINLINE void reserve(int64_t keys, int dim, int value_dim) {
    k_size_ = size_of(dim), v_size_ = size_of(value_dim);
    tiles_ = ceil_div<int64_t>(keys, kKeys);
    operands_.reserve(bytes(keys, dim, value_dim));
    made_.reserve(2 * tiles_);
  }

  // From here on the keys are those of the work item, of its whole sequence.
  HW_NOINLINE void move_to(const WorkItem& w) {
    if (batch_ == w.at.batch && first_ == w.at.k_begin && head_ == w.key_head) return;
    batch_ = w.at.batch, first_ = w.at.k_begin, head_ = w.key_head;
    std::fill_n(made_.data(), 2 * tiles_, char{0});
  }

  // Gives `rows`, the tile `keys` of k or v, its buffer, and says whether the operand is there. Of
  // another number of keys it is not: the last pair of an odd number has a zero.
  HW_NOINLINE void find_k(const Range& keys, Rows<T>& rows) { find(keys, false, rows); }
  HW_NOINLINE void find_v(const Range& keys, Rows<T>& rows) { find(keys, true, rows); }

 private:
  // Elements of the operand of a tile, in whole cache lines.
  static int64_t size_of(int width) {
    return round_up<int64_t>(operand_size<T>(kKeys, width), 64 / sizeof(E));
  }

  void find(const Range& keys, bool value, Rows<T>& rows) {
    const int64_t tile = keys.begin / kKeys;
    char& made = made_.data()[2 * tile + (value ? 1 : 0)];
    rows.buffer =
        reinterpret_cast<E*>(operands_.data()) + tile * (k_size_ + v_size_) + (value ? k_size_ : 0);
    rows.made = made == rows.n;
    made = static_cast<char>(rows.n);
  }

  int64_t tiles_ = 0, k_size_ = 0, v_size_ = 0;
  int64_t batch_ = -1, first_ = -1;
  int head_ = -1;
  Buffer operands_, made_;  // made_: keys in each operand, k and v in turn
};

}  // namespace
}  // namespace hw::softmax
