// SPDX-License-Identifier: Apache-2.0
// Routing by k-means on the CPU.
//
//   similarity   a task is a block of tokens of a head of a batch entry:
//
//                  x, widened  [tokens, D]  --product with mu^T-->  [tokens, K]  --transpose-->  d
//
//                mu^T is packed once a call. Rows of the product come in whole register tiles, the
//                last block filled up by zeros: no token meets another kernel than its neighbours.
//   prefix       a task is a cluster. Tokens come one by one into two heaps: the best q of those
//                that came, q the quota of the latest, and the rest. A token that lands among the
//                best joins. O(S log S), and about O(S) where few tokens beat those before.
#include "ops/kmeans_route/kmeans_route.h"

#include <algorithm>
#include <type_traits>

#include "core/cpu/matmul.h"
#include "core/cpu/parallel.h"
#include "core/cpu/transpose.h"
#include "core/host/registry.h"
#include "core/sort_key.h"

namespace hw::kmeans_route {
namespace {

constexpr int kBlock = 96;  // tokens of a task: whole register tiles, and squares of a transpose
static_assert(kBlock % kTileRows == 0 && kBlock % (kVectorBytes / 4) == 0);

template <class T>
class Similarity {
 public:
  using A = Accum<T>;

  Similarity(const SimilarityParams& p, int threads)
      : p_(p),
        x_(p_.x.as<const T>()),
        centroids_(p_.centroids.as<const A>()),
        d_(p_.d.as<A>()),
        threads_(threads),
        channels_(static_cast<int>(p_.channels())),
        width_(round_up(static_cast<int>(p_.clusters()), kLanes<A>)) {}

  void run() {
    const int64_t blocks = ceil_div<int64_t>(p_.tokens(), kBlock);
    if (p_.clusters() == 0) return;
    packed_.reserve(p_.heads() * head_size() * static_cast<int64_t>(sizeof(A)));
    parallel_tasks(p_.heads(), threads_, [&](int64_t head) { pack(head); });
    parallel_tasks(p_.batch() * p_.heads() * blocks, threads_, [&](int64_t task) {
      const int64_t sequence = task / blocks;
      multiply_block(sequence / p_.heads(), sequence % p_.heads(), task % blocks * kBlock);
    });
  }

 private:
  int64_t head_size() const { return int64_t{channels_} * width_; }
  A* packed(int64_t head) const {
    return reinterpret_cast<A*>(packed_.data()) + head * head_size();
  }

  // mu^T of a head, [D, width]; columns beyond the clusters are zero.
  void pack(int64_t head) const {
    for (int j = 0; j < channels_; ++j) {
      A* row = packed(head) + int64_t{j} * width_;
      widen(row, centroids_.at(head, 0, j), p_.clusters(), centroids_.stride[1]);
      std::fill(row + p_.clusters(), row + width_, A{});
    }
  }

  // d of the tokens from `first` on, up to a block.
  void multiply_block(int64_t b, int64_t head, int64_t first) const {
    const int clusters = static_cast<int>(p_.clusters());
    const int count = static_cast<int>(std::min<int64_t>(kBlock, p_.tokens() - first));
    const int rows = round_up(count, kTileRows);
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Scratch::bytes_of<A>(int64_t{kBlock} * channels_) +
                  Scratch::bytes_of<A>(int64_t{kBlock} * width_));
    A* wide = scratch.take<A>(int64_t{kBlock} * channels_);
    A* product = scratch.take<A>(int64_t{kBlock} * width_);
    for (int i = 0; i < count; ++i)
      widen(wide + int64_t{i} * channels_, x_.at(b, first + i, head, 0), channels_, x_.stride[3]);
    std::fill(wide + int64_t{count} * channels_, wide + int64_t{rows} * channels_, A{});
    multiply<false>(rows, width_, channels_, row_major(wide, channels_), packed(head), width_,
                    product, width_);
    transpose(product, width_, count, clusters, d_.at(b, head, 0, first), d_.stride[2]);
  }

  const SimilarityParams p_;
  const Ref<const T, 4> x_;
  const Ref<const A, 3> centroids_;
  const Ref<A, 4> d_;
  const int threads_, channels_, width_;
  Buffer packed_;  // [H, D, width]
};

template <class T>
class Prefix {
 public:
  using Key = SortKey<T>;

  Prefix(const PrefixParams& p, int threads) : p_(p), d_(p_.d.as<const T>()), threads_(threads) {}

  void run() {
    if (p_.window() == 0) return;
    parallel_tasks(p_.rows(), threads_, [&](int64_t row) { route(row); });
  }

 private:
  struct Token {
    Key key;
    int64_t position;

    bool before(const Token& other) const {
      return key != other.key ? key > other.key : position < other.position;
    }
  };

  // A heap in the memory of a thread, on whose top is the token that kWorst or the best ranks.
  template <bool kWorst>
  class Heap {
   public:
    explicit Heap(Token* tokens) : begin_(tokens), end_(tokens) {}

    bool empty() const { return begin_ == end_; }
    const Token& top() const { return *begin_; }
    void push(const Token& token) {
      *end_++ = token;
      std::push_heap(begin_, end_, under);
    }
    Token pop() {
      std::pop_heap(begin_, end_, under);
      return *--end_;
    }

   private:
    static bool under(const Token& a, const Token& b) { return kWorst ? a.before(b) : b.before(a); }
    Token *begin_, *end_;
  };

  void route(int64_t row) const {
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(2 * Scratch::bytes_of<Token>(p_.tokens()));
    Heap<true> best(scratch.take<Token>(p_.tokens()));
    Heap<false> rest(scratch.take<Token>(p_.tokens()));
    int64_t* slot = p_.index.at(row, 0);
    int64_t* const end = slot + p_.window() * p_.index.stride[1];
    int64_t excess = 0;  // quota L - (t + 1) W, from 0 to L - 1
    for (int64_t t = 0; t < p_.tokens() && slot != end; ++t) {
      const Token token{sort_key(d_(row, t)), t};
      excess -= p_.window();
      const bool grows = excess < 0;
      if (grows) excess += p_.length;
      const bool joins =
          grows ? rest.empty() || token.before(rest.top()) : token.before(best.top());
      if (joins) {
        if (!grows) rest.push(best.pop());
        best.push(token);
        *slot = t;
        slot += p_.index.stride[1];
      } else {
        if (grows) best.push(rest.pop());
        rest.push(token);
      }
    }
    for (; slot != end; slot += p_.index.stride[1]) *slot = -1;
  }

  const PrefixParams p_;
  const Ref<const T, 2> d_;
  const int threads_;
};

template <class T>
void similarity(const SimilarityParams& p, const Call& call) {
  Similarity<T>(p, call.context.num_threads).run();
}

template <class T>
void prefix(const PrefixParams& p, const Call& call) {
  Prefix<T>(p, call.context.num_threads).run();
}

// d has the accumulation type: for 16-bit elements there is nothing to build.
template <class T>
constexpr EntryPoint prefix_of() {
  if constexpr (std::is_same_v<T, Accum<T>>)
    return entry<&prefix<T>>;
  else
    return {};
}

}  // namespace
}  // namespace hw::kmeans_route

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {
    {entry<&kmeans_route::similarity<T>>, kmeans_route::prefix_of<T>()}};

}  // namespace
}  // namespace hw
