// SPDX-License-Identifier: Apache-2.0
// Selection of the k largest on the CPU: a row is a task.
//
//   1  keys of the row
//   2  the key t of the k-th largest, bit by bit from the top: a bit stays set if at least k keys
//      are not below; ends early where exactly k are
//   3  the row once more, in order
//
// Every pass is a loop without branches over keys in cache, sixteen at a time with AVX-512.
#include "ops/select_topk/select_topk.h"

#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/host/registry.h"
#include "core/sort_key.h"

namespace hw::select_topk {
namespace {

template <class T>
class Select {
 public:
  using Key = SortKey<T>;
  static constexpr int kBits = 8 * static_cast<int>(sizeof(Key));

  Select(const ForwardParams& p, int threads)
      : p_(p), score_(p_.score.as<const T>()), threads_(threads) {}

  void run() {
    if (p_.k() == 0) return;
    parallel_tasks(p_.rows(), threads_, [&](int64_t row) { select(row); });
  }

 private:
  void select(int64_t row) const {
    Scratch& scratch = Scratch::of_thread();
    const int64_t n = p_.count();
    scratch.reset(Scratch::bytes_of<Key>(n));
    Key* keys = scratch.take<Key>(n);
    const T* from = score_.at(row, 0);
    if (score_.stride[1] == 1)
      for (int64_t i = 0; i < n; ++i) keys[i] = sort_key(from[i]);
    else
      for (int64_t i = 0; i < n; ++i) keys[i] = sort_key(from[i * score_.stride[1]]);
    take(keys, threshold(keys), p_.index.at(row, 0));
    if (!p_.keep_order) rank(keys, p_.index.at(row, 0));
  }

  Threshold<Key> threshold(const Key* keys) const {
    Key t = 0;
    for (int bit = kBits - 1; bit >= 0; --bit) {
      const Key next = static_cast<Key>(t | Key{1} << bit);
      const int64_t reach = count(keys, [next](Key key) { return key >= next; });
      if (reach == p_.k()) return {static_cast<Key>(next - 1), 0};
      if (reach > p_.k()) t = next;
    }
    return {t, p_.k() - count(keys, [t](Key key) { return key > t; })};
  }

  // How many keys of the row `accepts`. Counters of the keys' own size fill vectors best; a piece
  // of the row cannot overflow them.
  template <class Accepts>
  int64_t count(const Key* keys, const Accepts& accepts) const {
    constexpr int64_t kPiece = 32768;
    int64_t total = 0;
    for (int64_t begin = 0; begin < p_.count(); begin += kPiece) {
      const int64_t end = std::min(begin + kPiece, p_.count());
      Key some = 0;
      for (int64_t i = begin; i < end; ++i) some = static_cast<Key>(some + accepts(keys[i]));
      total += some;
    }
    return total;
  }

  void take(const Key* keys, Threshold<Key> t, int64_t* index) const {
    const int64_t step = p_.index.stride[1], k = p_.k();
    int64_t taken = 0;
    for (int64_t i = 0; taken < k; ++i) {
      index[taken * step] = i;
      if (keys[i] == t.key) [[unlikely]]
        taken += t.ties-- > 0;
      else
        taken += keys[i] > t.key;
    }
  }

  // From the order of the row to (-key, index).
  void rank(const Key* keys, int64_t* index) const {
    Buffer buffer;
    buffer.reserve(p_.k() * static_cast<int64_t>(sizeof(int64_t)));
    int64_t* order = reinterpret_cast<int64_t*>(buffer.data());
    const int64_t step = p_.index.stride[1], k = p_.k();
    for (int64_t j = 0; j < k; ++j) order[j] = index[j * step];
    std::sort(order, order + k, [keys](int64_t a, int64_t b) {
      return keys[a] != keys[b] ? keys[a] > keys[b] : a < b;
    });
    for (int64_t j = 0; j < k; ++j) index[j * step] = order[j];
  }

  const ForwardParams p_;
  const Ref<const T, 2> score_;
  const int threads_;
};

template <class T>
void forward(const ForwardParams& p, const Call& call) {
  Select<T>(p, call.context.num_threads).run();
}

}  // namespace
}  // namespace hw::select_topk

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{entry<&select_topk::forward<T>>}};

}  // namespace
}  // namespace hw
