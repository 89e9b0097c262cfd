// SPDX-License-Identifier: Apache-2.0
// Cascaded group attention on the CPU.
//
// A task: a strip, neighbouring windows of a row of windows, from x to y. Their tokens are read
// where they lie if channels lie together, otherwise transposed as one matrix; the cascade of each
// window is made in the caches (cascaded_group_attention_cpu_window.h); the output projection is
// one product for the strip. Strips are cut by the number of threads: a token's results do not
// depend on its neighbours in a product, so that any cut gives the same bits.
#include "ops/cascaded_group_attention/cascaded_group_attention.h"

#include "ops/cascaded_group_attention/cascaded_group_attention_cpu_weights.h"
#include "ops/cascaded_group_attention/cascaded_group_attention_cpu_window.h"

#include "core/host/registry.h"

namespace hw::cascaded_group_attention {
namespace {

template <class T>
class Forward {
 public:
  using A = Accum<T>;

  Forward(const ForwardParams& p, int threads)
      : p_(p),
        n_(p),
        threads_(threads),
        weights_(p, n_, threads),
        zeros_(static_cast<size_t>(n_.channels), A(0)) {
    const int64_t rows = p_.x.size[0] * p_.rows();
    cuts_ =
        std::clamp<int64_t>(ceil_div<int64_t>(threads, max_of<int64_t>(rows, 1)), 1, p_.columns());
    in_place_ = std::is_same_v<T, A> && p_.x.stride[3] == 1;
  }

  void run() const {
    parallel_tasks(p_.x.size[0] * p_.rows() * cuts_, threads_, [&](int64_t task) { work(task); });
  }

 private:
  // Tokens of the image: rows [y, y + height), columns [x, x + width).
  struct Strip {
    int64_t batch, y, x;
    int height, width;
    int first, last;  // windows of it, along the row

    int tokens() const { return height * width; }
  };

  Strip strip(int64_t task) const {
    const int64_t cut = task % cuts_, row = task / cuts_, count = p_.columns();
    Strip s;
    s.batch = row / p_.rows(), s.y = row % p_.rows() * p_.height;
    s.first = static_cast<int>(count * cut / cuts_);
    s.last = static_cast<int>(count * (cut + 1) / cuts_);
    s.x = s.first * p_.width;
    s.height = static_cast<int>(min_of(p_.height, p_.x.size[1] - s.y));
    s.width = static_cast<int>(min_of(s.last * p_.width, p_.x.size[2]) - s.x);
    return s;
  }

  HW_NOINLINE void work(int64_t task) const {
    const Strip s = strip(task);
    const int64_t tokens = s.tokens();
    Scratch& scratch = Scratch::of_thread();
    scratch.reset(Window<T>::bytes(n_) + Scratch::bytes_of<A>(tokens * n_.channels) +
                  2 * Scratch::bytes_of<A>(tokens * n_.padded_channels) +
                  Scratch::bytes_of<A*>(n_.tokens) * 2);
    A* relu = scratch.take<A>(tokens * n_.channels);           // [tokens, C]
    A* result = scratch.take<A>(tokens * n_.padded_channels);  // [tokens, Cp]
    A* copy = scratch.take<A>(tokens * n_.padded_channels);    // [tokens, C], or [C, tokens]
    const A** x_rows = scratch.take<const A*>(n_.tokens);
    A** out_rows = scratch.take<A*>(n_.tokens);
    if (!in_place_) load_tokens(s, copy, result);
    Window<T> window(n_, weights_, scratch);
    for (int i = s.first; i < s.last; ++i) {
      const int left = (i - s.first) * n_.width;
      for (int t = 0; t < n_.tokens; ++t) {
        const int y = t / n_.width, x = left + t % n_.width;
        const bool inside = y < s.height && x < s.width;
        const int64_t at = int64_t{y} * s.width + x;
        x_rows[t] = inside ? token(s, y, x, copy) : zeros_.data();
        out_rows[t] = inside ? relu + at * n_.channels : nullptr;
      }
      window.run(x_rows, out_rows);
    }
    project(s, relu, result, copy);
  }

  // Channels of a token of the strip.
  const A* token(const Strip& s, int y, int x, const A* copy) const {
    if constexpr (std::is_same_v<T, A>)
      if (in_place_) return p_.x.as<const A>().at(s.batch, s.y + y, s.x + x);
    return copy + (int64_t{y} * s.width + x) * n_.channels;
  }

  // Whether the tokens of a strip lie one after another in each channel.
  template <class U>
  bool by_channels(const Ref<U, 4>& x, const Strip& s) const {
    return x.stride[2] == 1 && (s.height == 1 || x.stride[1] == s.width);
  }

  // x of a strip as [tokens, C]; `space` has room for as much.
  HW_NOINLINE void load_tokens(const Strip& s, A* to, A* space) const {
    const Ref<const T, 4> x = p_.x.template as<const T>();
    const int tokens = s.tokens();
    if (x.stride[3] != 1 && by_channels(x, s)) {
      const T* from = x.at(s.batch, s.y, s.x);
      if constexpr (std::is_same_v<T, A>) {
        hw::transpose(from, x.stride[3], n_.channels, tokens, to, n_.channels);
      } else {
        for (int c = 0; c < n_.channels; ++c)
          widen(space + int64_t{c} * tokens, from + c * x.stride[3], tokens);
        hw::transpose(static_cast<const A*>(space), tokens, n_.channels, tokens, to, n_.channels);
      }
      return;
    }
    for (int t = 0; t < tokens; ++t)
      widen(to + int64_t{t} * n_.channels, x.at(s.batch, s.y + t / s.width, s.x + t % s.width),
            n_.channels, x.stride[3]);
  }

  // y = relu(o) W + b of the tokens of a strip.
  HW_NOINLINE void project(const Strip& s, const A* relu, A* result, A* space) const {
    const Ref<T, 4> y = p_.y.template as<T>();
    const Matrix<A> weight = weights_.out();
    const int tokens = s.tokens();
    const auto product = [&](A* to, int64_t ld) {
      multiply<false>(tokens, n_.padded_channels, n_.channels, row_major(relu, n_.channels),
                      weight.data, weight.ld, to, ld, LaneTerms<A>{weights_.out_bias()});
    };
    if constexpr (std::is_same_v<T, A>)
      if (y.stride[3] == 1 && n_.padded_channels == n_.channels &&
          (s.height == 1 || y.stride[1] == s.width * y.stride[2]))
        return product(y.at(s.batch, s.y, s.x), y.stride[2]);
    product(result, n_.padded_channels);
    if (y.stride[3] != 1 && by_channels(y, s)) {
      T* to = y.at(s.batch, s.y, s.x);
      if constexpr (std::is_same_v<T, A>) {
        hw::transpose(static_cast<const A*>(result), n_.padded_channels, tokens, n_.channels, to,
                      y.stride[3]);
      } else {
        hw::transpose(static_cast<const A*>(result), n_.padded_channels, tokens, n_.channels, space,
                      tokens);
        for (int c = 0; c < n_.channels; ++c)
          narrow(to + c * y.stride[3], space + int64_t{c} * tokens, tokens);
      }
      return;
    }
    for (int t = 0; t < tokens; ++t)
      narrow(y.at(s.batch, s.y + t / s.width, s.x + t % s.width),
             static_cast<const A*>(result) + int64_t{t} * n_.padded_channels, n_.channels,
             y.stride[3]);
  }

  const ForwardParams p_;
  const Shape<A> n_;
  const int threads_;
  const Weights<T> weights_;
  const std::vector<A> zeros_;  // a token beyond the image
  int64_t cuts_;                // strips of a row of windows
  bool in_place_;               // tokens are read where they lie
};

template <class T>
void forward(const ForwardParams& p, const Call& call) {
  if (p.windows() > 0) Forward<T>(p, call.context.num_threads).run();
}

}  // namespace
}  // namespace hw::cascaded_group_attention

namespace hw {
namespace {

template <class T>
constexpr FunctionTable kTable = {{entry<&cascaded_group_attention::forward<T>>}};

}  // namespace
}  // namespace hw
