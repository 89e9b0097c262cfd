// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores: the one loop under all kernels.
//
// A block owns a tile of rows and walks over the keys they see (kOwnRows: loops R and R2), or owns
// a tile of keys and walks over the rows that see them (loop C). What a kernel does at a tile is
// its own few lines; what a tile is, is here: terms of its rows and keys in shared memory, products
// of both sides, scores and back, weights times the other side.
//
// Order of a tile: the walk waits until all are done with the last one, and loads terms; `multiply`
// and `apply` load what they read between two barriers. Listed rows and keys may meet or not in any
// order: then a tile where none meet is left by a vote before anything but its tokens is loaded.
#pragma once

#include <limits>
#include <type_traits>

#include "softmax/score.h"
#include "softmax/simt/tile.cuh"

namespace hw::softmax::simt {

template <class A>
HW_DEVICE HW_INLINE A infinity() {
  return std::numeric_limits<A>::infinity();
}

// Shared memory of a block.
template <class A, class Source, int kOwn>
inline constexpr int kBytes = Source::kListed ? kListedBytes<A, kOwn> : kSharedBytes<A, kOwn>;

// What replaying row i, which is `token` in the tensors, needs of its statistic: softmaxes L, with
// +inf for rows without weight; others 1 / n.
template <class A, class Source>
HW_DEVICE HW_INLINE A replayed(const ScoreParams& p, const Source& source, int64_t i, int64_t token,
                               A row) {
  if (is_softmax(p.activation)) return row == -infinity<A>() ? infinity<A>() : row;
  if (p.normalizer == Normalizer::none) return A(1);
  const A n = p.normalizer == Normalizer::sum ? row : static_cast<A>(source.seen(i, token));
  return n != A(0) && n < infinity<A>() ? A(1) / n : A(0);
}

// The rest of its statistic, 0 where that is infinite.
template <class A>
HW_DEVICE HW_INLINE A replayed_rest(A row, A rest) {
  return row == infinity<A>() || row == -infinity<A>() ? A(0) : rest;
}

// p from s and what replayed() and replayed_rest() gave.
template <class A>
HW_DEVICE HW_INLINE A replay(const ScoreParams& p, A s, A row, A rest) {
  return is_softmax(p.activation) ? exp_of((s - row) - rest) : activation(p.activation, s) * row;
}

// A score and what its derivative needs.
template <class A>
struct Scored {
  A y, gain, s;  // gain: gamma_j, 0 for rows that it is not for
  bool met;      // row and key exist and meet
  bool fixed;    // s is a constant: no gradient
};

// The numbers of rows and keys that scores need, in shared memory.
enum class Term : int { factor, gain_row, statistic, rest, extra, key_gain, key_bias, mass, count };
static_assert(static_cast<int>(Term::count) == kTerms);

template <class Element, class Source, int kOwn, bool kOwnRows>
class ScoreTile {
 public:
  using A = Accum<Element>;
  static constexpr int kOther = kVector<A>, kOwnSide = kOwn * kLanes, kOtherSide = kSide<A>;
  static_assert(kOwn * kOther < 32, "a bit per pair");
  using Micro = A[kOwn][kOther];

  // `row`, `rest`, `extra`: row statistic and its rest, and one more number per row (D - dL, or a
  // weight); `key_extra`: one more per key (m of the read-out mass). Each may be absent.
  HW_DEVICE HW_INLINE ScoreTile(const ScoreParams& params, const Source& s, int64_t first,
                                const Ref<const void, 3>* row, const Ref<const void, 3>* rest,
                                const Ref<const void, 3>* extra,
                                const Ref<const void, 3>* key_extra)
      : p(params),
        row_(row),
        rest_(rest),
        extra_(extra),
        key_extra_(key_extra),
        shape(params.softcap),
        shaped_(p.softcap > 0 || p.bias || p.key_bias || p.key_gain) {
    const Range own{first, min_of(first + kOwnSide, kOwnRows ? s.rows() : s.keys())};
    idle_ = dev::warp() * (dev::kWarp / kLanes) >= own.count();
    dev::sync_block();
    if (dev::thread_index() == 0) work() = {s, own, {}, 0, 0};
    dev::sync_block();
  }

  // Goes to a query head: loads the terms of the own side.
  HW_DEVICE HW_INLINE void start(int query_head) {
    dev::sync_block();
    if (dev::thread_index() == 0) {
      work().head = query_head;
      work().key_head = query_head / p.group();
      work().source.enter(query_head);
    }
    dev::sync_block();
    some_ = false;
    if constexpr (kListed) started_ = false;
    if constexpr (kListed) list_own_tokens();
    load_terms<kOwnRows, kOwnSide>(own());
  }

  HW_DEVICE HW_INLINE static const Source& source() { return work().source; }
  HW_DEVICE HW_INLINE static const Range& own() { return work().own; }
  // What the walk has come to.
  HW_DEVICE HW_INLINE Range others() const {
    const Range& all = work().others;
    const int64_t at = all.begin + static_cast<int64_t>(tile_) * kOtherSide;
    return {at, min_of(at + kOtherSide, all.end)};
  }
  HW_DEVICE HW_INLINE static int head() { return work().head; }
  HW_DEVICE HW_INLINE static int key_head() { return work().key_head; }

  // ---- Positions

  HW_DEVICE HW_INLINE Range rows() const { return kOwnRows ? own() : others(); }
  HW_DEVICE HW_INLINE Range keys() const { return kOwnRows ? others() : own(); }
  // Row and key of the thread's pair (r, u), counted from the start of their tiles.
  HW_DEVICE HW_INLINE static int row_in_tile(int r, int u) {
    return kOwnRows ? own_lane() + kLanes * r : other_lane() + kLanes * u;
  }
  HW_DEVICE HW_INLINE static int key_in_tile(int r, int u) {
    return kOwnRows ? other_lane() + kLanes * u : own_lane() + kLanes * r;
  }
  HW_DEVICE HW_INLINE int64_t row_at(int r, int u) const {
    return rows().begin + row_in_tile(r, u);
  }
  HW_DEVICE HW_INLINE int64_t key_at(int r, int u) const {
    return keys().begin + key_in_tile(r, u);
  }
  // Whether row and key of the pair exist and meet.
  HW_DEVICE HW_INLINE bool meets(int r, int u) const { return met_ >> (r * kOther + u) & 1; }
  // Own row or key of the thread, if it exists.
  HW_DEVICE HW_INLINE int64_t own_at(int r) const { return own().begin + own_lane() + kLanes * r; }
  HW_DEVICE HW_INLINE bool exists(int r) const {
    if constexpr (kListed) return tokens<true>()[own_lane() + kLanes * r] >= 0;
    return own_at(r) < own().end;
  }
  // The own row or key in the tensors, and where its results are.
  HW_DEVICE HW_INLINE int64_t own_token(int r) const {
    return token<kOwnRows>(own_lane() + kLanes * r);
  }
  HW_DEVICE HW_INLINE int64_t own_result(int r) const {
    return kOwnRows ? source().row_result(own_at(r), own_token(r))
                    : source().key_result(own_at(r), own_token(r));
  }
  // Whether the own row has a result: by slot those without token have, too.
  HW_DEVICE HW_INLINE bool has_result(int r) const {
    if constexpr (kListed)
      if (source().by_slot()) return own_at(r) < own().end;
    return exists(r);
  }
  // Row and key of the pair in the tensors.
  HW_DEVICE HW_INLINE int64_t row_token(int r, int u) const {
    return token<true>(row_in_tile(r, u));
  }
  HW_DEVICE HW_INLINE int64_t key_token(int r, int u) const {
    return token<false>(key_in_tile(r, u));
  }

  // ---- The walk

  // visit() at every tile of `range`. Tiles start at its begin, so that none is empty.
  template <class Visit>
  HW_DEVICE HW_INLINE void walk(const Range& range, const Visit& visit) {
    dev::sync_block();
    if (dev::thread_index() == 0) work().others = range;
    const int tiles = static_cast<int>(ceil_div<int64_t>(range.count(), kOtherSide));
    for (tile_ = 0; tile_ < tiles; ++tile_) {
      if constexpr (!kOwnRows) some_ = false;
      dev::sync_block();
      if constexpr (kListed) {
        if (!some_own_tokens()) return;
        list_tokens<false>(others());
        dev::sync_block();
      }
      find_pairs();
      if constexpr (kListed)
        if (!vote(met_ != 0)) continue;
      load_terms<!kOwnRows, kOtherSide>(others());
      visit();
      if constexpr (kListed) started_ = true;
    }
  }

  // ---- Products

  // c = own rows times other rows. kKeep: no other product of the walk has this own side, so that a
  // single slice of it stays in its buffer. With kVote the answer is whether the rows' side of this
  // product, or one of the rows' extra numbers, has anything but zeros; the same in all threads.
  template <bool kKeep, bool kVote>
  HW_DEVICE HW_INLINE bool multiply(Micro& c, const OperandRows<Element>& own_side,
                                    const OperandRows<Element>& other_side) {
    clear(c);
    const int width = own_side.width();
    const bool kept = kKeep && (kListed ? started_ : tile_ > 0) && width <= kSide<A>;
    int column = 0;
    do {
      dev::sync_block();
      if (!kept)
        load_rows<kOwnRows, kOwnSide, kVote && kOwnRows>(own_room(), own_side, own(), column);
      load_rows<!kOwnRows, kOtherSide, kVote && !kOwnRows>(other_room(), other_side, others(),
                                                           column);
      if constexpr (kVote) put_vote(some_);
      dev::sync_block();
      if (!idle_) add_dot(c, own_room(), other_room(), min_of(width - column, kSide<A>));
      column += kSide<A>;
    } while (column < width);
    if constexpr (kVote) return count_votes();
    return true;
  }

  // weights[own][other] = w, for the lanes of the thread's half warp.
  HW_DEVICE HW_INLINE void put_weights(const Micro& w) {
    dev::sync_warp();
    HW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      HW_UNROLL
      for (int u = 0; u < kOther; ++u) {
        weights()[(own_lane() + kLanes * r) * kStride<A> + other_lane() + kLanes * u] = w[r][u];
      }
    }
  }

  // acc[n] += weights times slice first + n of the other side. kHeld: it is the other side of the
  // last product, whose last slice is in its buffer.
  template <bool kHeld, int kCount>
  HW_DEVICE HW_INLINE void apply(A (&acc)[kCount][kOwn][kOther], const OperandRows<Element>& side,
                                 int first) {
    const bool held = kHeld && side.slices() == 1;
    if (held) dev::sync_warp();
    HW_UNROLL
    for (int n = 0; n < kCount; ++n) {
      if (first + n >= side.slices()) continue;
      if (!held) {
        dev::sync_block();
        load_rows<!kOwnRows, kOtherSide, false>(other_room(), side, others(),
                                                (first + n) * kSide<A>);
        dev::sync_block();
      }
      if (!idle_) add_weighted(acc[n], weights(), other_room(), static_cast<int>(others().count()));
    }
  }

  // Whether any thread of the block says yes. All threads have passed what they did before.
  HW_DEVICE HW_INLINE bool vote(bool yes) {
    put_vote(yes);
    dev::sync_block();
    return count_votes();
  }

  // ---- Scores

  // s from c = <q, k>; -inf where row and key do not meet.
  HW_DEVICE HW_INLINE Scored<A> score(int r, int u, A c) const {
    const A x = factor(r, u) * c;
    const bool met = meets(r, u);
    if constexpr (kListed)
      if (is_fixed(r, u)) return {x, A(0), static_cast<A>(Source::kFixedScore), true, true};
    if (!shaped_) return {x, A(0), met ? x : -infinity<A>(), met, false};
    const A y = shape.capped(x);
    A added = 0, gain = 0;
    if (p.bias && met) {
      const int64_t i = row_token(r, u), j = key_token(r, u);
      added = static_cast<A>(p.bias.template as<const Element>()(source().batch(), head(), i, j));
    }
    if (p.key_bias) added += terms(Term::key_bias)[key_in_tile(r, u)];
    if (p.key_gain && gain_row(r, u) != A(0)) gain = terms(Term::key_gain)[key_in_tile(r, u)];
    const A s = p.key_gain ? shape.score(y, gain, added) : y + added;
    return {y, gain, met ? s : -infinity<A>(), met, false};
  }

  // p from s and the row statistic.
  HW_DEVICE HW_INLINE A weight(int r, int u, A s) const {
    const int row = row_in_tile(r, u);
    return replay(p, s, terms(Term::statistic)[row], terms(Term::rest)[row]);
  }

  // dp / ds apart from the normalisation of softmaxes: p itself, or a'(s) / n.
  HW_DEVICE HW_INLINE A weight_slope(int r, int u, A s, A weight) const {
    if (is_softmax(p.activation)) return weight;
    return activation_slope(p.activation, s) * terms(Term::statistic)[row_in_tile(r, u)];
  }

  // dx / ds
  HW_DEVICE HW_INLINE A slope(A y, A gain) const { return shape.slope(y, gain); }

  HW_DEVICE HW_INLINE A factor(int r, int u) const {
    return terms(Term::factor)[row_in_tile(r, u)];
  }
  HW_DEVICE HW_INLINE A extra(int r, int u) const { return terms(Term::extra)[row_in_tile(r, u)]; }
  HW_DEVICE HW_INLINE A gain_row(int r, int u) const {
    return terms(Term::gain_row)[row_in_tile(r, u)];
  }
  HW_DEVICE HW_INLINE A mass(int r, int u) const { return terms(Term::mass)[key_in_tile(r, u)]; }

 private:
  static constexpr bool kListed = Source::kListed;

  // What is the same for all threads and seldom used, in shared memory: registers are scarce.
  struct Work {
    Source source;
    Range own, others;  // others: all that the walk visits
    int head, key_head;
  };
  static_assert(sizeof(Work) <= kWorkBytes && std::is_trivially_copyable_v<Source>);

  // Shared memory: work, votes, buffers, weights, terms; if listed tokens, and votes about the own
  // ones.
  HW_DEVICE HW_INLINE static Work& work() { return *dev::shared<Work>(); }
  HW_DEVICE HW_INLINE static int* flags() {
    return reinterpret_cast<int*>(dev::shared<char>() + kWorkBytes);
  }
  HW_DEVICE HW_INLINE static A* own_room() {
    return reinterpret_cast<A*>(dev::shared<char>() + kRoomsAt);
  }
  HW_DEVICE HW_INLINE static A* other_room() { return own_room() + kOwnSide * kStride<A>; }
  HW_DEVICE HW_INLINE static A* weights() { return other_room() + kOtherSide * kStride<A>; }
  HW_DEVICE HW_INLINE static A* terms(Term t) {
    return weights() + kOwnSide * kStride<A> + static_cast<int>(t) * kSide<A>;
  }

  template <bool kOfOwn>
  HW_DEVICE HW_INLINE static int32_t* tokens() {
    return reinterpret_cast<int32_t*>(terms(Term::count)) + (kOfOwn ? 0 : kOwnSide);
  }
  HW_DEVICE HW_INLINE static int32_t* token_votes() { return tokens<false>() + kOtherSide; }

  HW_DEVICE HW_INLINE static bool given(const Ref<const void, 3>* x) { return x && *x; }

  // ---- Tokens of listed rows and keys: -1 where a slot has none, -2 beyond the list

  // Row (kRows) or key i of the tile in the tensors.
  template <bool kRows>
  HW_DEVICE HW_INLINE int64_t token(int i) const {
    if constexpr (kListed) return tokens<kRows == kOwnRows>()[i];
    return kRows ? source().row(rows().begin + i) : source().key(keys().begin + i);
  }

  // Thread i writes what it reads in load_terms. Returns whether it found a token.
  template <bool kOfOwn>
  HW_DEVICE HW_INLINE bool list_tokens(const Range& range) {
    bool some = false;
    for (int i = dev::thread_index(); i < (kOfOwn ? kOwnSide : kOtherSide); i += kThreads) {
      const int64_t place = range.begin + i;
      int64_t at = -2;
      if (place < range.end) at = kOfOwn == kOwnRows ? source().row(place) : source().key(place);
      tokens<kOfOwn>()[i] = static_cast<int32_t>(at);
      some |= at >= 0;
    }
    return some;
  }
  HW_DEVICE HW_INLINE void list_own_tokens() {
    const bool any = dev::any(list_tokens<true>(own()));
    if (dev::lane() == 0) token_votes()[dev::warp()] = any;
  }
  // Behind a barrier after list_own_tokens.
  HW_DEVICE HW_INLINE static bool some_own_tokens() {
    int some = 0;
    HW_UNROLL
    for (int i = 0; i < kWarps; ++i) some |= token_votes()[i];
    return some != 0;
  }
  HW_DEVICE HW_INLINE bool is_fixed(int r, int u) const { return fixed_ >> (r * kOther + u) & 1; }

  // Which of the thread's pairs exist and meet.
  HW_DEVICE HW_INLINE void find_pairs() {
    if constexpr (kListed)
      find_listed_pairs();
    else
      find_masked_pairs();
  }
  HW_DEVICE HW_INLINE void find_listed_pairs() {
    met_ = fixed_ = 0;
    HW_UNROLL_BY(1)
    for (int n = 0; n < kOwn * kOther; ++n) {
      const int64_t i = row_token(n / kOther, n % kOther), j = key_token(n / kOther, n % kOther);
      if (!source().tokens_meet(i, j)) continue;
      met_ |= 1u << n;
      if (source().is_fixed(i, j)) fixed_ |= 1u << n;
    }
  }

  HW_DEVICE HW_INLINE void find_masked_pairs() {
    met_ = (1u << (kOwn * kOther)) - 1;
    if (own().count() == kOwnSide && others().count() == kOtherSide &&
        source().whole(rows(), keys()))
      return;
    HW_UNROLL_BY(1)
    for (int n = 0; n < kOwn * kOther; ++n) {
      const int64_t i = row_at(n / kOther, n % kOther), j = key_at(n / kOther, n % kOther);
      const bool met = i < rows().end && j < keys().end && source().sees(i, j);
      if (!met) met_ &= ~(1u << n);
    }
  }

  // Rows or keys of `range` to scratch memory.
  template <bool kRows, int kCount, bool kVote>
  HW_DEVICE HW_INLINE void load_rows(A* buffer, const OperandRows<Element>& side,
                                     const Range& range, int column) {
    const bool some = load_slice<kCount, kVote, kListed>(
        buffer, side, source().batch(), kRows ? head() : key_head(), column,
        static_cast<int>(range.count()), [&range](int i) -> int64_t {
          if constexpr (kListed) return tokens<kRows == kOwnRows>()[i];
          return kRows ? source().row(range.begin + i) : source().key(range.begin + i);
        });
    if constexpr (kVote) some_ |= some;
  }

  template <bool kRows, int kCount>
  HW_DEVICE HW_INLINE void load_terms(const Range& range) {
    for (int i = dev::thread_index(); i < kCount; i += kThreads) {
      const int64_t place = range.begin + i;
      bool exists = place < range.end;
      if constexpr (kListed) exists = token<kRows>(i) >= 0;
      if constexpr (kRows)
        load_row_terms(i, place, exists);
      else
        load_key_terms(i, place, exists);
    }
  }

  HW_DEVICE HW_INLINE int64_t term_row(int i, int64_t place) const {
    return kListed ? token<true>(i) : source().row(place);
  }
  HW_DEVICE HW_INLINE void load_row_terms(int i, int64_t place, bool exists) {
    const int64_t b = source().batch(), row = exists ? term_row(i, place) : 0;
    const int64_t result = exists ? source().row_result(place, row) : 0;
    const int64_t position = kListed ? row : place;  // in the sequence
    const A scale = static_cast<A>(p.scale);
    A factor = exists ? scale : A(0);
    if (exists && p.row_temperature)
      factor = scale * p.row_temperature.template as<const A>()(b, row, head());
    terms(Term::factor)[i] = factor;
    terms(Term::gain_row)[i] = position >= p.gain_begin && position < p.gain_end ? A(1) : A(0);
    const auto number = [&](const Ref<const void, 3>* of, A otherwise) {
      return given(of) ? of->template as<const A>()(b, head(), result) : otherwise;
    };
    const A row_statistic = exists ? number(row_, A(1)) : A(0);
    terms(Term::statistic)[i] = exists ? replayed(p, source(), place, row, row_statistic) : A(0);
    terms(Term::rest)[i] = exists ? replayed_rest(row_statistic, number(rest_, A(0))) : A(0);
    const A extra = exists ? number(extra_, A(0)) : A(0);
    terms(Term::extra)[i] = extra;
    some_ |= extra != A(0);
  }

  HW_DEVICE HW_INLINE void load_key_terms(int i, int64_t place, bool exists) {
    const int64_t b = source().batch();
    const int64_t key = !exists ? 0 : kListed ? token<false>(i) : source().key(place);
    const auto term = [&](const Ref<const A, 3>& of) {
      return exists && of ? of(b, head(), key) : A(0);
    };
    terms(Term::key_gain)[i] = term(p.key_gain.template as<const A>());
    terms(Term::key_bias)[i] = term(p.key_bias.template as<const A>());
    terms(Term::mass)[i] = key_extra_ ? term(key_extra_->template as<const A>()) : A(0);
  }

  HW_DEVICE HW_INLINE void put_vote(bool yes) {
    const bool any = dev::any(yes);
    if (dev::lane() == 0) flags()[dev::warp()] = any;
  }
  HW_DEVICE HW_INLINE bool count_votes() const {
    int yes = 0;
    HW_UNROLL
    for (int i = 0; i < kWarps; ++i) yes |= flags()[i];
    return yes != 0;
  }

  const ScoreParams& p;
  const Ref<const void, 3>*row_, *rest_, *extra_, *key_extra_;  // or null
  const ScoreShape<A> shape;
  const bool shaped_;     // s is not x
  bool idle_;             // the warp owns nothing that exists
  int tile_ = 0;          // of the walk
  uint32_t met_ = 0;      // a bit per pair of the thread
  uint32_t fixed_ = 0;    // the same: scores that are constants; listed only
  bool started_ = false;  // a tile was visited; listed only
  bool some_ = false;     // the thread saw a row that is not all zeros
};

}  // namespace hw::softmax::simt
