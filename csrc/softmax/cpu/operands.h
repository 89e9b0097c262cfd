// SPDX-License-Identifier: Apache-2.0
// Operands of the products that cpu/tile.h lists, made from tensors and from tiles.
//
// An operand consists of E = Multiplied<T> (core/cpu/bf16_dot.h): numbers of the accumulation type
// A, or pairs of bf16 along the index that the product sums over. So its shape depends on that
// index:
//
//   over the width   k, v      [n, steps(width)]    q^T, d_w^T [steps(width), kRows]
//   over keys        k, v      [steps(n), padded]   p^T, dx^T  [steps(n), kRows]
//   over rows        p^T, dc^T [n, steps(rows)]     q, d_w, x  [steps(rows), padded]
//
// p and dx are rounded to bf16 when they are paired. q is paired as it is: the factor scale tau_i
// goes to x and dc then.
#pragma once

#include <algorithm>

#include "softmax/cpu/sorted_source.h"
#include "softmax/mask.h"
#include "softmax/params.h"

#include "core/cpu/matmul.h"
#include "core/cpu/parallel.h"
#include "core/cpu/transpose.h"

namespace hw::softmax {
namespace {

constexpr int kRows = 64;  // queries of a block: distance of two keys in a tile
constexpr int kKeys = 64;  // keys of a tile
constexpr int kTile = kKeys * kRows;
// Of gathered rows, those that are prefetched ahead of their use.
constexpr int kRowsAhead = 8;

// Whether products of elements T multiply pairs.
template <class T>
constexpr bool kPaired = kDepth<Multiplied<T>> == 2;

// Some lanes of a block, in whole vectors.
struct Lanes {
  int begin, end;
  bool empty() const { return end <= begin; }
  int count() const { return end - begin; }
};

// Rows of one work item of a source, a lane each: the slots `rows`. Ranges of keys are key slots.
template <SortedSource Source>
struct Block {
  const Source* source;
  typename Source::WorkItem item;
  Range rows;

  int count() const { return static_cast<int>(rows.count()); }
  int64_t batch() const { return item.at.batch; }
  int head() const { return item.head; }

  // Lane -> token, position; where numbers of the row are, where its results are.
  int64_t token(int64_t i) const {
    const int64_t slot = rows.begin + i;
    return source->row_token(item, slot, source->row_entry(item, slot));
  }
  int64_t position(int64_t i) const { return source->row_position(item, rows.begin + i, token(i)); }
  int64_t number(int64_t i) const { return item.at.q_begin + position(i); }
  int64_t result(int64_t i) const { return source->row_result(item, rows.begin + i, token(i)); }

  // Key slot -> token, position; where numbers of the key are. Negative: a zero key, without any.
  int64_t key_token(int64_t j) const {
    return source->key_token(item, j, source->key_entry(item, j));
  }
  int64_t key_position(int64_t j) const { return source->key_position(item, j, key_token(j)); }
  int64_t key_number(int64_t j) const {
    const int64_t position = key_position(j);
    if constexpr (Source::kGathers)
      if (position < 0) return kZeroKey;
    return item.at.k_begin + position;
  }
  int64_t key_result(int64_t j) const { return source->key_result(item, j, key_token(j)); }
  int64_t row_count() const { return source->rows(item); }
  int64_t key_batch() const { return source->key_batch(item); }
  int64_t key_count() const { return source->keys(item); }
  bool keys_adjacent() const {
    if constexpr (Source::kGathers)
      return source->keys_adjacent(item);
    else
      return true;
  }

  Range visible_keys(int64_t i) const {
    if constexpr (Source::kInOrder)
      return item.mask.visible_keys(rows.begin + i);
    else
      return source->visible_keys(item, rows.begin + i);
  }
  // Keys whose score with lane i is set.
  template <ScoreKind Score>
  Range set_keys(const Score& score, int64_t i) const {
    if constexpr (Source::kInOrder) {
      const int64_t key = score.set_key(item.mask, rows.begin + i);
      return {key, key + 1};
    } else {
      return source->set_keys(item, rows.begin + i);
    }
  }

  // Keys that any row of the block may see; every row sees all of `keys`.
  HW_NOINLINE Range keys() const { return {visible_keys(0).begin, visible_keys(count() - 1).end}; }
  HW_NOINLINE bool sees_whole(const Range& keys) const {
    return visible_keys(count() - 1).begin <= keys.begin && visible_keys(0).end >= keys.end;
  }
  // The rows that see any of `keys`, in vectors of `vector` lanes.
  HW_NOINLINE Lanes lanes(const Range& keys, int vector) const {
    int begin = 0, end = count();
    while (begin < end && visible_keys(begin).end <= keys.begin) ++begin;
    while (begin < end && visible_keys(end - 1).begin >= keys.end) --end;
    if (begin == end) return {0, 0};
    return {begin / vector * vector, round_up(end, vector)};
  }
};

// The scores of a block that its ScoreKind sets, in a tile of `keys`, become `value`.
template <class Source, ScoreKind Score, class A>
HW_NOINLINE void set_scores(const Block<Source>& block, const Score& score, const Range& keys,
                            A* tile, A value) {
  for (int i = 0; i < block.count(); ++i) {
    const Range some = block.set_keys(score, i);
    const int64_t end = std::min(some.end, keys.end);
    for (int64_t j = std::max(some.begin, keys.begin); j < end; ++j)
      tile[(j - keys.begin) * kRows + i] = value;
  }
}

// Block i of `rows` slots. Of listed rows the first is the one that is not full, for under a causal
// mask it sees the fewest keys.
template <class Source>
Range rows_of_block(int64_t i, int64_t rows) {
  if (Source::kInOrder) return {i * kRows, std::min<int64_t>((i + 1) * kRows, rows)};
  const int64_t end = rows - (ceil_div<int64_t>(rows, kRows) - 1 - i) * kRows;
  return {std::max<int64_t>(end - kRows, 0), end};
}

// [S, width] of one head.
template <class T>
Ref<T, 2> rows_of_head(const Ref<T, 4>& x, int64_t batch, int head) {
  return {x.at(batch, 0, head), {x.size[1], x.size[3]}, {x.stride[1], x.stride[3]}};
}

// n elements.
template <class T>
void copy_row(T* to, const T* from, int64_t n, int64_t stride) {
  if constexpr (std::is_same_v<T, Accum<T>>)
    widen(to, from, n, stride);
  else if (stride == 1)
    std::copy_n(from, n, to);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
}

#if defined(__AVX512BF16__)
// zip_rows where either row may be null, one of zeros.
inline void zip_any(Bf16Pair* to, const bf16* x, const bf16* y, int n, int64_t stride) {
  if (x != nullptr) return zip_rows(to, x, y, n, stride);
  const int padded = round_up(n, kLanes<Bf16Pair>);
  for (int d = 0; d < padded; ++d) to[d] = {bf16{}, d < n && y != nullptr ? y[d * stride] : bf16{}};
}
#endif

template <class E>
Operand<E> transposed(const Operand<E>& a) {
  return {a.data, a.col, a.row};
}

// The rows of one head of a tensor that an operand is made of, and memory for it if it is not
// read where it lies: operand_size<T>(n, width) elements.
template <class T>
struct Rows {
  const Ref<const T, 4>& x;
  int64_t batch, first;
  int n, head;
  Multiplied<T>* buffer;
  bool made = false;                   // the operand is in `buffer` already
  const T* const* gathered = nullptr;  // [n] rows that are no neighbours, null: a row of zeros

  int width() const { return static_cast<int>(x.size[3]); }
  const T* row(int64_t i) const {
    return gathered != nullptr ? gathered[i] : x.at(batch, first + i, head);
  }

  // f(i, row) for all of them, zero(i) for rows of zeros. Of gathered rows the next are
  // prefetched.
  template <class F, class Zero>
  HW_INLINE void each(F f, Zero zero) const {
    if (gathered == nullptr) {
      const T* row = this->row(0);
      for (int i = 0; i < n; ++i) f(i, row + i * x.stride[1]);
      return;
    }
    for (int i = 0; i < n; ++i) {
      if (i + kRowsAhead < n && gathered[i + kRowsAhead] != nullptr && x.stride[3] == 1)
        prefetch(gathered[i + kRowsAhead], width() * static_cast<int64_t>(sizeof(T)));
      if (gathered[i] == nullptr)
        zero(i);
      else
        f(i, gathered[i]);
    }
  }
};

// The rows of x that the lanes of a block name.
template <class T, class Source>
HW_NOINLINE void point_at_rows(const Ref<const T, 4>& x, const Block<Source>& block,
                               const T** rows) {
  for (int i = 0; i < block.count(); ++i)
    rows[i] = x.at(block.batch(), block.token(i), block.head());
}

// Where rows of x of some keys of a block are that do not lie side by side. `absent`: a row of
// zeros, or null.
template <class T, class Source>
HW_INLINE void point_at_keys(const Ref<const T, 4>& x, const Block<Source>& block, int64_t batch,
                             Range keys, const T* absent, const T** rows) {
  const typename Source::WorkItem item = block.item;  // which no pointer that is written changes
  const Source& source = *block.source;
  const T* first = x.at(batch, 0, item.key_head);
  const int64_t step = x.stride[1];
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const int64_t token = source.key_token(item, j, source.key_entry(item, j));
    *rows++ = token < 0 ? absent : first + token * step;
  }
}

// The rows of k or v of some keys of a block; `gathered`: memory for where they are, [kKeys].
template <class T, class Source>
HW_NOINLINE Rows<T> rows_of_keys(const Ref<const T, 4>& x, const Block<Source>& block,
                                 int64_t batch, Range keys, Multiplied<T>* buffer,
                                 const T** gathered, const T* absent = nullptr) {
  const int n = static_cast<int>(keys.count()), head = block.item.key_head;
  if (block.keys_adjacent()) return {x, batch, block.key_token(keys.begin), n, head, buffer};
  point_at_keys(x, block, batch, keys, absent, gathered);
  return {x, batch, 0, n, head, buffer, false, gathered};
}

template <class T>
constexpr int64_t operand_size(int n, int width) {
  return steps<Multiplied<T>>(n) * round_up(std::max(width, 1), kLanes<Accum<T>>);
}

// Prefetches the rows of the next tile. Rows without gaps come by themselves.
template <class T>
HW_NOINLINE void prefetch_next(const Rows<T>& rows) {
  if (rows.gathered != nullptr || rows.x.stride[1] == rows.width()) return;
  const Ref<const T, 2> head = rows_of_head(rows.x, rows.batch, rows.head);
  const int64_t begin = rows.first + kKeys, end = std::min(begin + rows.n, rows.x.size[1]);
  for (int64_t i = begin; i < end; ++i) prefetch_row(head, i);
}

// Rows as the broadcast operand of a product over their width: [n, steps(width)]. Pairs are copied
// even where they lie well: a row at a time comes faster from memory than a few of each row.
template <class T>
HW_NOINLINE Operand<Multiplied<T>> over_width(const Rows<T>& rows) {
  using E = Multiplied<T>;
  const Ref<const T, 4>& x = rows.x;
  const int width = rows.width();
  if (!rows.made) prefetch_next(rows);
  if constexpr (kPaired<T>) {
    T* buffer = reinterpret_cast<T*>(rows.buffer);
    const int padded = round_up(width, 2);
    if (rows.made) return {rows.buffer, padded / 2, 1};
    rows.each([&](int i, const T* row) { copy_row(buffer + i * padded, row, width, x.stride[3]); },
              [&](int i) { std::fill_n(buffer + i * padded, width, T{}); });
    clear_columns(buffer, padded, rows.n, width, padded);
    return {rows.buffer, padded / 2, 1};
  } else {
    if constexpr (std::is_same_v<T, E>)
      if (rows.gathered == nullptr) return {rows.row(0), x.stride[1], x.stride[3]};
    if (!rows.made)
      rows.each(
          [&](int i, const T* row) { widen(rows.buffer + i * width, row, width, x.stride[3]); },
          [&](int i) { std::fill_n(rows.buffer + i * width, width, E(0)); });
    return {rows.buffer, width, 1};
  }
}

// Rows in vectors and in the accumulation type, padded with zeros to whole ones: [n, padded].
template <class T>
HW_NOINLINE Panel<Accum<T>> vector_rows(const Rows<T>& rows, Accum<T>* buffer) {
  using A = Accum<T>;
  const int width = rows.width(), padded = round_up(width, kLanes<A>);
  const int64_t stride = rows.x.stride[3];
  if constexpr (std::is_same_v<T, A>)
    if (rows.gathered == nullptr && stride == 1 && width == padded)
      return {rows.row(0), rows.x.stride[1]};
  rows.each([&](int i, const T* row) { widen(buffer + i * padded, row, width, stride); },
            [&](int i) { std::fill_n(buffer + i * padded, width, A(0)); });
  clear_columns(buffer, padded, rows.n, width, padded);
  return {buffer, padded};
}

// Rows in vectors, as the operand of a product over them: [steps(n), padded].
template <class T>
Panel<Multiplied<T>> over_rows(const Rows<T>& r) {
  if constexpr (kPaired<T>) {
    const int width = r.width(), padded = round_up(width, kLanes<Multiplied<T>>);
    for (int i = 0; i < r.n && !r.made; i += 2) {
      zip_any(r.buffer + i / 2 * padded, r.row(i), i + 1 < r.n ? r.row(i + 1) : nullptr, width,
              r.x.stride[3]);
    }
    return {r.buffer, padded};
  } else {
    return vector_rows(r, r.buffer);
  }
}

// The transpose of the same, broadcast: [width, steps(n)].
template <class T>
Operand<Multiplied<T>> over_rows_transposed(const Rows<T>& rows) {
  if constexpr (kPaired<T>) {
    if (!rows.made) prefetch_next(rows);
    const auto [data, ld] = over_rows(rows);
    return {data, 1, ld};
  } else {
    return transposed(over_width(rows));
  }
}

// A tile [n, kRows] from its lane on, p or dx, as the operand of a product over keys:
// [steps(n), kRows].
template <class E, class A>
HW_NOINLINE const E* pairs_over_keys(const A* tile, int n, int width, E* buffer) {
  if constexpr (std::is_same_v<E, A>) {
    return tile;
  } else {
    for (int j = 0; j < n; j += 2)
      for (int l = 0; l < width; l += kLanes<A>) {
        const A* at = tile + j * kRows + l;
        store(buffer + j / 2 * kRows + l, zip(load(at), j + 1 < n ? load(at + kRows) : Vec<A>{}));
      }
    return buffer;
  }
}

// The same times factors of the rows, as the operand of a product over rows: [n, steps(rows)].
template <class E, class A, class Factors>
HW_NOINLINE Operand<E> pairs_over_rows(const A* tile, int n, int rows, Factors factors, E* buffer) {
  if constexpr (std::is_same_v<E, A>) {
    static_assert(std::is_same_v<Factors, NoFactors>);
    return row_major(tile, kRows);
  } else {
    constexpr int kLane = kLanes<A>;
    for (int j = 0; j < n; ++j) {
      E* to = buffer + j * (kRows / 2);
      for (int l = 0; l < rows; l += 2 * kLane) {
        const A* at = tile + j * kRows + l;
        const Vec<A> low = factors(load(at), l);
        const Vec<A> high = l + kLane < rows ? factors(load(at + kLane), l + kLane) : Vec<A>{};
        store(to + l / 2, neighbours(low, high));
      }
      if (rows % 2 != 0) to[rows / 2].second = {};
    }
    return row_major(static_cast<const E*>(buffer), kRows / 2);
  }
}

// Rows of a block, q or d_w, as both kinds of products read them.
template <class T>
class BlockRows {
 public:
  using A = Accum<T>;
  using E = Multiplied<T>;

  HW_NOINLINE explicit BlockRows(int width) : width_(width), padded_(round_up(width, kLanes<E>)) {
    Scratch& scratch = Scratch::of_thread();
    rows_ = scratch.take<Row>(kRows * padded_);
    columns_ = scratch.take<E>(std::max(steps<E>(width), 1) * kRows);
    if (kPaired<T>) zipped_ = scratch.take<E>(operand_size<T>(kRows, width));
  }

  static int64_t bytes(int width) {
    return Scratch::bytes_of<Row>(kRows * round_up(width, kLanes<E>)) +
           Scratch::bytes_of<E>(std::max(steps<E>(width), 1) * kRows) +
           (kPaired<T> ? Scratch::bytes_of<E>(operand_size<T>(kRows, width)) : 0);
  }

  int padded() const { return padded_; }            // the width in whole vectors
  const E* over_width() const { return columns_; }  // [steps(width), kRows]

  // [steps(count), padded()]
  HW_NOINLINE const E* over_rows() {
    if constexpr (kPaired<T>) {
      for (int i = 0; i < count_; i += 2) {
        const T* row = rows_ + i * padded_;
        zip_rows(zipped_ + i / 2 * padded_, row, i + 1 < count_ ? row + padded_ : nullptr, width_,
                 1);
      }
      return zipped_;
    } else {
      return rows_;
    }
  }

  // `count` rows, whose columns are `stride` apart, into the lanes [0, lanes). `factor`: of each
  // row, or null; not for pairs.
  HW_NOINLINE void load(const T* const* rows, int count, int64_t stride, int lanes,
                        const A* factor = nullptr) {
    count_ = count;
    if constexpr (std::is_same_v<T, A>)
      if (stride == 1 && width_ == padded_) return load_squares(rows, factor);
    const int64_t bytes = stride == 1 ? width_ * static_cast<int64_t>(sizeof(T)) : 0;
    for (int i = 0; i < count_; ++i) {
      if (i + kRowsAhead < count_) prefetch(rows[i + kRowsAhead], bytes);
      Row* to = rows_ + i * padded_;
      if constexpr (kPaired<T>) {
        copy_row(to, rows[i], width_, stride);
      } else {
        widen(to, rows[i], width_, stride);
        for (int d = 0; factor && d < width_; ++d) to[d] *= factor[i];
      }
    }
    clear_columns(rows_, padded_, count_, width_, padded_);
    hw::transpose(reinterpret_cast<const E*>(rows_), padded_ / kDepth<E>, count_, steps<E>(width_),
                  columns_, kRows);
    clear_columns(columns_, kRows, steps<E>(width_), count_, lanes);
  }

  // The rows of a block.
  template <class Source>
  void load(const Ref<const T, 4>& x, const Block<Source>& block, int lanes,
            const A* factor = nullptr) {
    const T* rows[kRows];
    point_at_rows(x, block, rows);
    load(rows, block.count(), x.stride[3], lanes, factor);
  }

  // Whether any of the rows' elements is not 0.
  HW_NOINLINE bool any() const {
    for (int i = 0; i < count_ * padded_; ++i)
      if (static_cast<A>(rows_[i]) != 0) return true;
    return false;
  }

 private:
  using Row = std::conditional_t<kPaired<T>, T, A>;

  // load() where rows are whole vectors: transposed as they come.
  HW_NOINLINE void load_squares(const A* const* rows, const A* factor) {
    constexpr int kSide = kLanes<A>;
    const int64_t bytes = width_ * static_cast<int64_t>(sizeof(A));
    for (int l = 0; l < count_; l += kSide) {
      const A* from[kSide];
      Vec<A> factors[kSide];
      for (int r = 0; r < kSide; ++r) {
        const int i = l + r;
        from[r] = i < count_ ? rows[i] : nullptr;
        factors[r] = splat(factor != nullptr && i < count_ ? factor[i] : A(1));
        if (i + kSide < count_) prefetch(rows[i + kSide], bytes);
      }
      for (int d = 0; d < width_; d += kSide) {
        Vec<A> square[kSide];
        HW_UNROLL for (int r = 0; r < kSide; ++r) {
          square[r] = from[r] != nullptr ? hw::load(from[r] + d) * factors[r] : Vec<A>{};
        }
        for (int r = 0; r < kSide; ++r) store(rows_ + (l + r) * padded_ + d, square[r]);
        transpose_square<A>(square);
        HW_UNROLL for (int r = 0; r < kSide; ++r) {
          store(columns_ + (d + r) * kRows + l, square[r]);
        }
      }
    }
  }

  const int width_, padded_;
  int count_ = 0;
  Row* rows_;            // [count, padded]
  E* columns_;           // [steps(width), kRows]
  E* zipped_ = nullptr;  // [steps(count), padded]
};

}  // namespace
}  // namespace hw::softmax
