// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores: the one loop under all kernels.
//
// A block owns a tile of rows and walks over the keys they see (kOwnRows: loops R and R2), or owns
// a tile of keys and walks over the rows that see them (loop C). What a kernel does at a tile is
// its own few lines; what a tile is, is here: terms of its rows and keys in shared memory, products
// of both sides, scores and back, weights times the other side.
//
// Order of a tile: the walk waits until all are done with the last one, and loads terms; `multiply`
// and `apply` load what they read between two barriers.
//
// Of sources that gather the tokens of both tiles are in shared memory. Where slots are in order
// the mask says which tiles to visit, and which meet entirely; otherwise positions are compared one
// by one, and a tile where none meet is left by a vote before anything but its tokens is loaded.
#pragma once

#include <type_traits>

#include "softmax/simt/replay.h"
#include "softmax/simt/tile.cuh"

namespace hw::softmax::simt {

// Shared memory of a block.
template <class A, KeySource Source, int kOwn>
inline constexpr int kBytes = Source::kGathers ? kGatherBytes<A, kOwn> : kSharedBytes<A, kOwn>;

// The numbers of rows and keys that scores need, in shared memory.
enum class Term : int { factor, gain_row, statistic, rest, extra, key_gain, key_bias, mass, count };
static_assert(static_cast<int>(Term::count) == kTerms);

template <class Element, ScoreKind Score, KeySource Source, int kOwn, bool kOwnRows>
class ScoreTile {
 public:
  using A = Accum<Element>;
  using WorkItem = typename Source::WorkItem;
  static constexpr int kOther = kVector<A>, kOwnSide = kOwn * kLanes, kOtherSide = kSide<A>;
  static_assert(kOwn * kOther < 32, "a bit per pair");
  using Micro = A[kOwn][kOther];

  // The tile of a sequence whose first slot is `first`. `row`, `rest`, `extra`: row statistic and
  // its rest, and one more number per row (D - dL, or a weight); `key_extra`: one more per key (m
  // of the read-out mass). Each may be absent.
  HW_DEVICE HW_INLINE ScoreTile(const ScoreParams& params, const Source& source, const Score& kind,
                                int64_t sequence, int64_t first, const Ref<const void, 3>* row,
                                const Ref<const void, 3>* rest, const Ref<const void, 3>* extra,
                                const Ref<const void, 3>* key_extra)
      : p(params),
        source_(source),
        kind_(kind),
        row_(row),
        rest_(rest),
        extra_(extra),
        key_extra_(key_extra),
        shape(params.softcap),
        shaped_(p.softcap > 0 || p.bias || p.key_bias || p.key_gain) {
    if (dev::thread_index() == 0) work().sequence = sequence, work().first = first;
  }

  // Goes to a query head: loads the terms of the own side. Returns whether that has any slot; the
  // same in all threads.
  HW_DEVICE HW_INLINE bool start(int query_head) {
    dev::sync_block();
    if (dev::thread_index() == 0) {
      Work& w = work();
      w.item = source_.work_item(p, w.sequence, query_head);
      const int64_t slots = kOwnRows ? source_.rows(w.item) : source_.keys(w.item);
      w.own = {w.first, min_of(w.first + kOwnSide, slots)};
    }
    dev::sync_block();
    if (own().empty()) return false;
    idle_ = dev::warp() * (dev::kWarp / kLanes) >= own().count();
    some_ = false;
    if constexpr (!kInOrder) started_ = false;
    if constexpr (kGathers) list_own_tokens();
    load_terms<kOwnRows, kOwnSide>();
    return true;
  }

  HW_DEVICE HW_INLINE static const WorkItem& item() { return work().item; }
  HW_DEVICE HW_INLINE static const Range& own() { return work().own; }
  // All that the own side may meet.
  HW_DEVICE HW_INLINE Range reach() const {
    if constexpr (!kInOrder)
      return {0, kOwnRows ? source_.keys(item()) : source_.rows(item())};
    else
      return kOwnRows ? item().mask.keys_of(own()) : item().mask.rows_of(own());
  }
  // What the walk has come to.
  HW_DEVICE HW_INLINE Range others() const {
    const Range& all = work().others;
    const int64_t at = all.begin + static_cast<int64_t>(tile_) * kOtherSide;
    return {at, min_of(at + kOtherSide, all.end)};
  }
  HW_DEVICE HW_INLINE static int64_t batch() { return item().at.batch; }
  HW_DEVICE HW_INLINE static int head() { return item().head; }

  // ---- Slots

  HW_DEVICE HW_INLINE Range rows() const { return kOwnRows ? own() : others(); }
  HW_DEVICE HW_INLINE Range keys() const { return kOwnRows ? others() : own(); }
  // Row and key of the thread's pair (r, u), counted from the start of their tiles.
  HW_DEVICE HW_INLINE static int row_in_tile(int r, int u) {
    return kOwnRows ? own_lane() + kLanes * r : other_lane() + kLanes * u;
  }
  HW_DEVICE HW_INLINE static int key_in_tile(int r, int u) {
    return kOwnRows ? other_lane() + kLanes * u : own_lane() + kLanes * r;
  }
  // Whether row and key of the pair exist and meet; whether there are numbers of it in a bias.
  HW_DEVICE HW_INLINE bool meets(int r, int u) const { return met_ >> (r * kOther + u) & 1; }
  HW_DEVICE HW_INLINE bool has_bias(int r, int u) const {
    return meets(r, u) && (!kGathers || has_token<false>(key_in_tile(r, u)));
  }
  // Where numbers of the pair's row and key are.
  HW_DEVICE HW_INLINE int64_t row_number(int r, int u) const {
    return number<true>(row_in_tile(r, u));
  }
  HW_DEVICE HW_INLINE int64_t key_number(int r, int u) const {
    return number<false>(key_in_tile(r, u));
  }
  // Own row or key of the thread; whether it exists.
  HW_DEVICE HW_INLINE static int own_in_tile(int r) { return own_lane() + kLanes * r; }
  HW_DEVICE HW_INLINE static int64_t own_slot(int r) { return own().begin + own_in_tile(r); }
  HW_DEVICE HW_INLINE bool exists(int r) const { return has_token<kOwnRows>(own_in_tile(r)); }
  HW_DEVICE HW_INLINE int64_t own_token(int r) const { return token<kOwnRows>(own_in_tile(r)); }
  // Where numbers of own row or key i of the tile are; negative where it does not exist.
  HW_DEVICE HW_INLINE int64_t number_of_own(int i) const {
    return has_token<kOwnRows>(i) ? number<kOwnRows>(i) : kNoToken;
  }
  // Where results of the thread's own row or key are.
  HW_DEVICE HW_INLINE int64_t own_result(int r) const {
    return kOwnRows ? source_.row_result(item(), own_slot(r), own_token(r))
                    : source_.key_result(item(), own_slot(r), own_token(r));
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
      if constexpr (kGathers) {
        if (!some_own_tokens()) return;
        list_tokens<false>(others());
        dev::sync_block();
      }
      find_pairs();
      if constexpr (!kInOrder)
        if (!vote(met_ != 0)) continue;
      load_terms<!kOwnRows, kOtherSide>();
      visit();
      if constexpr (!kInOrder) started_ = true;
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
    const bool kept = kKeep && (kInOrder ? tile_ > 0 : started_) && width <= kSide<A>;
    int column = 0;
    do {
      dev::sync_block();
      if (!kept) load_rows<kOwnRows, kOwnSide, kVote && kOwnRows>(own_buffer(), own_side, column);
      load_rows<!kOwnRows, kOtherSide, kVote && !kOwnRows>(other_buffer(), other_side, column);
      if constexpr (kVote) put_vote(some_);
      dev::sync_block();
      if (!idle_) add_dot(c, own_buffer(), other_buffer(), min_of(width - column, kSide<A>));
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
        load_rows<!kOwnRows, kOtherSide, false>(other_buffer(), side, (first + n) * kSide<A>);
        dev::sync_block();
      }
      if (!idle_)
        add_weighted(acc[n], weights(), other_buffer(), static_cast<int>(others().count()));
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
    if constexpr (Score::kSets)
      if (is_set(r, u)) return {x, A(0), static_cast<A>(Score::kSetScore), true, true};
    if (!shaped_) return {x, A(0), met ? x : -infinity<A>(), met, false};
    const A y = shape.capped(x);
    A added = 0, gain = 0;
    if (p.bias && has_bias(r, u)) {
      const int64_t i = row_number(r, u), j = key_number(r, u);
      added = static_cast<A>(p.bias.template as<const Element>()(batch(), head(), i, j));
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
  static constexpr bool kGathers = Source::kGathers, kInOrder = Source::kInOrder;

  // What is the same for all threads and seldom used, in shared memory: registers are scarce.
  struct Work {
    WorkItem item;
    Range own, others;        // slots; others: all that the walk visits
    int64_t sequence, first;  // which tile it is; the first thread's alone
  };
  static_assert(sizeof(Work) <= kWorkBytes && std::is_trivially_copyable_v<WorkItem>);

  // Shared memory: work, votes, buffers, weights, terms; if it gathers tokens, and votes about the
  // own ones.
  HW_DEVICE HW_INLINE static Work& work() { return *dev::shared<Work>(); }
  HW_DEVICE HW_INLINE static int* flags() {
    return reinterpret_cast<int*>(dev::shared<char>() + kWorkBytes);
  }
  HW_DEVICE HW_INLINE static A* own_buffer() {
    return reinterpret_cast<A*>(dev::shared<char>() + kBuffersAt);
  }
  HW_DEVICE HW_INLINE static A* other_buffer() { return own_buffer() + kOwnSide * kStride<A>; }
  HW_DEVICE HW_INLINE static A* weights() { return other_buffer() + kOtherSide * kStride<A>; }
  HW_DEVICE HW_INLINE static A* terms(Term t) {
    return weights() + kOwnSide * kStride<A> + static_cast<int>(t) * kSide<A>;
  }

  template <bool kOfOwn>
  HW_DEVICE HW_INLINE static int32_t* tokens() {
    return reinterpret_cast<int32_t*>(terms(Term::count)) + (kOfOwn ? 0 : kOwnSide);
  }
  HW_DEVICE HW_INLINE static int32_t* token_votes() { return tokens<false>() + kOtherSide; }

  HW_DEVICE HW_INLINE static bool given(const Ref<const void, 3>* x) { return x && *x; }

  // ---- Row (kRows) or key i of its tile: slot, token, position, and where its numbers are

  template <bool kRows>
  HW_DEVICE HW_INLINE static int64_t begin() {
    return kRows ? item().at.q_begin : item().at.k_begin;
  }
  template <bool kRows>
  HW_DEVICE HW_INLINE Range side() const {
    return kRows ? rows() : keys();
  }
  template <bool kRows>
  HW_DEVICE HW_INLINE int64_t token(int i) const {
    if constexpr (kGathers)
      return tokens<kRows == kOwnRows>()[i];
    else
      return begin<kRows>() + side<kRows>().begin + i;
  }
  template <bool kRows>
  HW_DEVICE HW_INLINE bool has_token(int i) const {
    if constexpr (kGathers)
      return token<kRows>(i) >= 0;
    else
      return side<kRows>().begin + i < side<kRows>().end;
  }
  template <bool kRows>
  HW_DEVICE HW_INLINE int64_t position(int i) const {
    const int64_t slot = side<kRows>().begin + i;
    if constexpr (kInOrder)
      return slot;
    else
      return kRows ? source_.row_position(item(), slot, token<true>(i))
                   : source_.key_position(item(), slot, token<false>(i));
  }
  template <bool kRows>
  HW_DEVICE HW_INLINE int64_t number(int i) const {
    return begin<kRows>() + position<kRows>(i);
  }

  // Thread i writes what it reads in load_terms. Returns whether it found a token.
  template <bool kOfOwn>
  HW_DEVICE HW_INLINE bool list_tokens(const Range& range) {
    const WorkItem& w = item();
    bool some = false;
    for (int i = dev::thread_index(); i < (kOfOwn ? kOwnSide : kOtherSide); i += kThreads) {
      const int64_t slot = range.begin + i;
      int64_t at = kNoToken;
      if (slot < range.end)
        at = kOfOwn == kOwnRows ? source_.row_token(w, slot, source_.row_entry(w, slot))
                                : source_.key_token(w, slot, source_.key_entry(w, slot));
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

  // ---- Pairs

  HW_DEVICE HW_INLINE bool is_set(int r, int u) const { return set_ >> (r * kOther + u) & 1; }

  // Which of the thread's pairs exist and meet, and whose scores are set.
  HW_DEVICE HW_INLINE void find_pairs() {
    met_ = (1u << (kOwn * kOther)) - 1;
    bool whole = false;
    if constexpr (kInOrder) {
      whole = own().count() == kOwnSide && others().count() == kOtherSide &&
              item().mask.whole(rows(), keys());
      if (whole && !looks_at_pairs()) return;
    }
    if constexpr (Score::kSets) set_ = 0;
    HW_UNROLL_BY(1)
    for (int n = 0; n < kOwn * kOther; ++n) {
      const int row = row_in_tile(n / kOther, n % kOther),
                key = key_in_tile(n / kOther, n % kOther);
      if (!pair_meets(row, key, whole))
        met_ &= ~(1u << n);
      else if (pair_is_set(row, key))
        set_ |= 1u << n;
    }
  }
  // Even where the mask hides none.
  HW_DEVICE HW_INLINE bool looks_at_pairs() const {
    if constexpr (Score::kSets) return kGathers || kind_.sets();
    return kGathers;
  }
  HW_DEVICE HW_INLINE bool pair_meets(int row, int key, bool whole) const {
    if (!has_token<true>(row)) return false;
    if (!has_token<false>(key)) return kGathers && token<false>(key) == kZeroKey;
    return whole || sees(item().mask, position<true>(row), position<false>(key));
  }
  HW_DEVICE HW_INLINE bool pair_is_set(int row, int key) const {
    if constexpr (Score::kSets)
      return has_token<false>(key) &&
             kind_.set_key(item().mask, position<true>(row)) == position<false>(key);
    return false;
  }

  // ---- Loading

  // Columns of the rows or keys of the tile to scratch memory.
  template <bool kRows, int kCount, bool kVote>
  HW_DEVICE HW_INLINE void load_rows(A* buffer, const OperandRows<Element>& from, int column) {
    const int64_t batch = kRows ? item().at.batch : source_.key_batch(item());
    const int64_t first = begin<kRows>() + side<kRows>().begin;
    const bool some = load_slice<kCount, kVote, kGathers>(
        buffer, from, batch, kRows ? item().head : item().key_head, column,
        static_cast<int>(side<kRows>().count()), [first](int i) -> int64_t {
          if constexpr (kGathers)
            return tokens<kRows == kOwnRows>()[i];
          else
            return first + i;
        });
    if constexpr (kVote) some_ |= some;
  }

  template <bool kRows, int kCount>
  HW_DEVICE HW_INLINE void load_terms() {
    for (int i = dev::thread_index(); i < kCount; i += kThreads) {
      if constexpr (kRows)
        load_row_terms(i, has_token<true>(i));
      else
        load_key_terms(i, has_token<false>(i));
    }
  }

  HW_DEVICE HW_INLINE void load_row_terms(int i, bool exists) {
    const int64_t b = batch(), at = position<true>(i);
    const int64_t result = source_.row_result(item(), rows().begin + i, token<true>(i));
    const A scale = static_cast<A>(p.scale);
    A factor = exists ? scale : A(0);
    if (exists && p.row_temperature)
      factor = scale * p.row_temperature.template as<const A>()(b, number<true>(i), head());
    terms(Term::factor)[i] = factor;
    terms(Term::gain_row)[i] = at >= p.gain_begin && at < p.gain_end ? A(1) : A(0);
    const auto given_number = [&](const Ref<const void, 3>* of, A otherwise) {
      return given(of) ? of->template as<const A>()(b, head(), result) : otherwise;
    };
    const A row_statistic = exists ? given_number(row_, A(1)) : A(0);
    terms(Term::statistic)[i] = exists ? replayed(p, item().mask, at, row_statistic) : A(0);
    terms(Term::rest)[i] = exists ? replayed_rest(row_statistic, given_number(rest_, A(0))) : A(0);
    const A extra = exists ? given_number(extra_, A(0)) : A(0);
    terms(Term::extra)[i] = extra;
    some_ |= extra != A(0);
  }

  HW_DEVICE HW_INLINE void load_key_terms(int i, bool exists) {
    const auto term = [&](const Ref<const A, 3>& of) {
      return exists && of ? of(batch(), head(), number<false>(i)) : A(0);
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
  const Source& source_;
  const Score& kind_;
  const Ref<const void, 3>*row_, *rest_, *extra_, *key_extra_;  // or null
  const ScoreShape<A> shape;
  const bool shaped_;     // s is not x
  bool idle_ = false;     // the warp owns nothing that exists
  int tile_ = 0;          // of the walk
  uint32_t met_ = 0;      // a bit per pair of the thread
  uint32_t set_ = 0;      // the same: scores that are constants
  bool started_ = false;  // a tile was visited; out of order only
  bool some_ = false;     // the thread saw a row that is not all zeros
};

}  // namespace hw::softmax::simt
