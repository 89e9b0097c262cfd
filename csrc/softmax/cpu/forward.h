// SPDX-License-Identifier: Apache-2.0
// Forward pass of attention on the CPU: loop R, rows with a running softmax.
//
// A task is a block of 64 queries of one head and walks the keys it may see, tile by tile. Tiles
// that the mask empties are never visited, tiles whose activation is zero everywhere skip the
// product with v. With few blocks and many keys (decoding) the keys are cut into spans, whose
// partial results are merged in order. Cuts depend on the sizes of a sequence alone, so results
// depend neither on the number of threads nor on the other sequences; whether the spans of a block
// are tasks of their own may depend on both. Where q and k are the same for all batch entries (zero
// strides), one task serves up to kBatchAtOnce of them: scores and softmax are computed once.
// Blocks of a few queries or of a few keys are walked by AlongKeys.
#pragma once

#include "softmax/cpu/along_keys.h"
#include "softmax/cpu/outputs.h"
#include "softmax/cpu/row_sums.h"
#include "softmax/cpu/tile.h"

namespace hw::softmax {
namespace {

constexpr int64_t kFewTasks = 16;      // fewer than this, of a sequence: cut the keys
constexpr int64_t kSpanTokens = 1024;  // shortest span of keys
constexpr int64_t kBatchAtOnce = 8;    // batch entries whose scores are computed once

// By how much scores may exceed the running shift before it moves to their maximum and all sums are
// multiplied: weights stay below e^8, and the shift cancels when rows are divided by their sums.
template <class A>
constexpr A kSlack = 8;

template <class T, SortedSource Source = DenseSource, ScoreKind Score = FullScore>
class Forward {
 public:
  using Block = softmax::Block<Source>;
  using A = Accum<T>;
  using E = Multiplied<T>;
  using V = Vec<A>;

  Forward(const ForwardParams& p, int threads, const Source& source = {}, const Score& score = {})
      : Forward(p, threads, source, score, true) {}

  // For run_block() and run_blocks() alone, of any blocks: those of work items of which a batch
  // entry has `items` for each head.
  Forward(const ForwardParams& p, int threads, int64_t items, const Score& score)
      : Forward(p, threads, Source{}, score, false) {
    items_ = items;
  }

  void run() {
    const auto block = [this](int64_t task) { return block_of(task); };
    if (spans_ > 1) return run_blocks(tasks_, spans_, block);
    parallel_walks(tasks_, 1, threads_, [&](auto next) {
      PackedKeys<T> packed;
      if (packs_) packed.reserve(p_.max_k, p_.dim(), value_dim_);
      for (int64_t task = next(); task >= 0; task = next()) {
        const Block some = block(task);
        if (some.rows.empty()) continue;
        if (packs_) packed.move_to(some.item);
        run_block(some, {}, packs_ ? &packed : nullptr);
      }
    });
  }

  // Blocks block(0), .. block(count - 1), which may be empty, and all their keys: cut into spans,
  // at most `spans` each, which are tasks of their own.
  template <class F>
  HW_NOINLINE void run_blocks(int64_t count, int64_t spans, const F& block) {
    partials_.reserve(count * spans * partial_bytes());
    const auto state = [&](int64_t i, int64_t span) {
      return state_in(partials_.data() + (i * spans + span) * partial_bytes());
    };
    parallel_tasks(count * spans, threads_, [&](int64_t task) {
      const Block some = block(task / spans);
      const int64_t span = task % spans;
      if (some.rows.empty() || span >= cut_of(some).spans) return;
      State part = state(task / spans, span);
      fill(some, cut_of(some), span, part, reserve());
    });
    parallel_tasks(count, threads_, [&](int64_t i) {
      const Block some = block(i);
      if (some.rows.empty()) return;
      State whole = state(i, 0);
      whole.along_keys = along_keys(some);
      for (int64_t span = 1; span < cut_of(some).spans; ++span) add(some, whole, state(i, span));
      finish(some, whole, reserve());
    });
  }

  // A block that is not empty, and all its keys, spans one after another. `prefetches`: see
  // core/cpu/matmul.h.
  HW_NOINLINE void run_block(const Block& block, const Prefetches& prefetches = {},
                             PackedKeys<T>* packed = nullptr) {
    const Cut cut = cut_of(block);
    if (cut.spans > 1) return run_spans(block, cut, packed);
    Scratch& scratch = reserve();
    State state = state_in(scratch.take<char>(partial_bytes()));
    fill(block, cut, 0, state, scratch, prefetches, packed);
    finish(block, state, scratch);
  }

  // Into how many spans the keys of a block are cut.
  int64_t spans_of(const Block& block) const { return cut_of(block).spans; }

 private:
  // `cuts`: into batch entries at once, and spans of keys.
  HW_NOINLINE Forward(const ForwardParams& p, int threads, const Source& source, const Score& score,
                      bool cuts)
      : p_(p),
        threads_(threads),
        source_(source),
        score_(score),
        v_(p_.v.as<const T>()),
        outputs_(p_),
        soft_(is_softmax(p_.activation)),
        reads_out_(p_.row || p_.entropy || p_.p_max || p_.sq_norm || p_.mass),
        value_dim_(p_.value_dim()),
        heads_(p_.query_heads()),
        batch_at_once_(cuts && shared_scores() ? std::min(p_.batch(), kBatchAtOnce) : 1),
        groups_(p_.packed() ? p_.sequences() : ceil_div(p_.batch(), batch_at_once_)),
        blocks_(ceil_div<int64_t>(p_.max_q, kRows)),
        tasks_(groups_ * heads_ * blocks_),
        packs_(cuts && packs_keys()) {
    if (!cuts || tasks_ == 0 || tasks_ >= kFewTasks) return;
    for (int64_t n = 0; n < p_.sequences(); ++n)
      for (int head = 0; head < heads_; ++head)
        spans_ = std::max(spans_, cut_of({&source_, source_.work_item(p_, n, head), {}}).spans);
  }

  // Spans of the keys of a block, and keys of one.
  struct Cut {
    int64_t spans, length;
  };
  static constexpr Cut kWhole{1, int64_t{1} << 62};

  // By the sizes of the block's work item.
  HW_NOINLINE Cut cut_of(const Block& block) const {
    const int64_t tasks = heads_ * items_ * ceil_div<int64_t>(block.row_count(), kRows);
    if (tasks == 0 || tasks >= kFewTasks) return kWhole;
    const int64_t spans = std::min(ceil_div(kFewTasks, tasks), block.key_count() / kSpanTokens);
    if (spans <= 1) return kWhole;
    return {spans, round_up(ceil_div(block.key_count(), spans), static_cast<int64_t>(kKeys))};
  }

  // What a task keeps: sums of its rows, and w before the division.
  struct State {
    BlockSums<A>* rows;
    A* values;  // w^T [batch, Dv, kRows], or `along_keys` w [batch, kRows, padded Dv]
    bool along_keys = false;
  };

  // Where keys are gathered each batch entry has its own.
  bool shared_scores() const {
    if (Source::kGathers) return false;
    const bool same_mass = !p_.mass_keys || p_.mass_keys.stride[0] == 0;
    return !p_.packed() && p_.batch() > 1 && same_scores_in_batch(p_) && same_mass && !p_.skip_dead;
  }

  // Whether a thread keeps operands of keys: they are worth their making twice, and not too large.
  bool packs_keys() const {
    return !std::is_same_v<T, A> && batch_at_once_ == 1 && blocks_ * p_.group() >= kFewTasks &&
           source_.keys_in_order() &&
           PackedKeys<T>::bytes(p_.max_k, p_.dim(), value_dim_) <= PackedKeys<T>::kMostBytes;
  }

  int64_t values_size() const { return batch_at_once_ * padded_values() * kRows; }
  HW_NOINLINE int64_t partial_bytes() const {
    return round_up<int64_t>(sizeof(BlockSums<A>), 64) + Scratch::bytes_of<A>(values_size());
  }

  // Blocks of a head lie together, the last one, which sees most keys, first.
  HW_NOINLINE Block block_of(int64_t task) const {
    const int64_t group = task / blocks_ / heads_, head = task / blocks_ % heads_;
    const int64_t first = p_.packed() ? group : group * batch_at_once_;
    const Block all{&source_, source_.work_item(p_, first, static_cast<int>(head)), {0, 0}};
    const int64_t index = blocks_ - 1 - task % blocks_, rows = all.row_count();
    if (index * kRows >= rows) return all;
    return {&source_, all.item, rows_of_block<Source>(index, rows)};
  }

  int64_t batch_of(const Block& b) const {
    return p_.packed() ? 1 : std::min(batch_at_once_, p_.batch() - b.batch());
  }

  HW_NOINLINE Scratch& reserve() const {
    Scratch& scratch = Scratch::of_thread();
    const int64_t tile = Tile<T, Source, Score>::bytes(p_) + Scratch::bytes_of<A>(kTile) +
                         Scratch::bytes_of<E>(operand_size<T>(kKeys, value_dim_));
    scratch.reset(std::max(tile, AlongKeys<T, Source, Score>::bytes(p_)) + partial_bytes() +
                  2 * Scratch::bytes_of<A>(kRows * padded_values()));
    return scratch;
  }

  int padded_values() const { return round_up(std::max(value_dim_, 1), kLanes<A>); }

  static State state_in(char* memory) {
    return {reinterpret_cast<BlockSums<A>*>(memory),
            reinterpret_cast<A*>(memory + round_up<int64_t>(sizeof(BlockSums<A>), 64))};
  }

  HW_NOINLINE void run_spans(const Block& block, const Cut& cut, PackedKeys<T>* packed) {
    Buffer memory;
    memory.reserve(2 * partial_bytes());
    State whole = state_in(memory.data()), part = state_in(memory.data() + partial_bytes());
    fill(block, cut, 0, whole, reserve(), {}, packed);
    for (int64_t span = 1; span < cut.spans; ++span) {
      fill(block, cut, span, part, reserve(), {}, packed);
      add(block, whole, part);
    }
    finish(block, whole, reserve());
  }

  // The sums of a span of keys.
  HW_NOINLINE void fill(const Block& block, const Cut& cut, int64_t span, State& state,
                        Scratch& scratch, const Prefetches& prefetches = {},
                        PackedKeys<T>* packed = nullptr) {
    state.rows->clear();
    const bool unseen = dead(block);
    state.along_keys = along_keys(block);
    if (unseen || !state.along_keys) std::fill_n(state.values, values_size(), A(0));
    if (!unseen) walk(block, cut, span, state, scratch, prefetches, packed);
  }

  bool along_keys(const Block& block) const {
    return AlongKeys<T, Source, Score>::serves(p_, block.count(), block.keys().count());
  }

  // Nobody can see what the loop would find.
  HW_NOINLINE bool dead(const Block& b) const {
    if (!p_.skip_dead) return false;
    if (p_.identity_mix && p_.identity_mix.template as<const A>()(b.batch(), b.head()) == 1)
      return true;
    if (!p_.head_gate) return false;
    for (int i = 0; i < b.count(); ++i)
      if (p_.head_gate.template as<const A>()(b.batch(), b.number(i), b.head()) != 0) return false;
    return true;
  }

  HW_NOINLINE void walk(const Block& block, const Cut& cut, int64_t span, State& state,
                        Scratch& scratch, Prefetches prefetches, PackedKeys<T>* packed) {
    Range keys = block.keys();
    keys.begin = std::max(keys.begin / kKeys * kKeys, span * cut.length);
    keys.end = std::min(keys.end, (span + 1) * cut.length);
    if (state.along_keys)
      return AlongKeys<T, Source, Score>(p_, batch_at_once_, score_)
          .walk(block, keys, *state.rows, state.values, prefetches);
    Tile<T, Source, Score> tile(p_, score_);
    tile.prefetches = prefetches;
    tile.packed = packed;
    A* s = scratch.take<A>(kTile);
    E* buffer = scratch.take<E>(operand_size<T>(kKeys, value_dim_));
    const T* gathered[kKeys];
    tile.load_queries(block);
    for (int64_t j = keys.begin; j < keys.end; j += kKeys) {
      const Range some{j, std::min<int64_t>(j + kKeys, keys.end)};
      if (!tile.move_to(some)) continue;
      tile.products(some, s);
      tile.scores(some, s, s);
      const bool any = soft_ ? exponentiate(block, some, tile, s, state)
                             : activate(block, some, tile.lanes(), s, state);
      if (any && v_) add_values(block, some, tile, s, state, buffer, gathered);
    }
  }

  // p relative to the running shift: in place of s, and as pairs where pairs are multiplied.
  HW_NOINLINE bool exponentiate(const Block& block, const Range& keys, Tile<T, Source, Score>& tile,
                                A* s, State& state) {
    BlockSums<A>& r = *state.rows;
    const Lanes lanes = tile.lanes();
    const int n = static_cast<int>(keys.count());
    alignas(64) A factor[kRows];
    V moved{};
    for (int l = lanes.begin; l < lanes.end; l += kLanes<A>) {
      const V before = load(r.max + l);
      V top = top_of<A>(s + l, n, load(r.top + l));
      store(r.top + l, top);
      top = top <= before + kSlack<A> ? before : top;
      store(factor + l, r.move(l, top, moved));
      const V base = top == -kInfinity<A> ? V{} : top;
      E* const pairs = kPaired<T> ? tile.pairs() + (l - lanes.begin) : nullptr;
      const V total = weights(s + l, n, base, r.tilt + l, pairs);
      store(r.sum + l, load(r.sum + l) + total);
      if (p_.sq_norm) add_squares(s + l, n, r.squares + l);
      if (p_.mass) add_mass(block, keys, s + l, r.mass + l);
    }
    if (sum<A>(moved) != 0) rescale(lanes, factor, state.values);
    return true;
  }

  // e^(s - base) of n keys, whose sum is returned.
  V weights(A* s, int n, V base, A* tilt, E* pairs) const {
    V total{};
    const auto weight = [&](int j) {
      A* at = s + j * kRows;
      const V e = weight_exp<T>(load(at) - base);
      total += e;
      if (p_.entropy) add_tilt(at, base, e, tilt);
      return e;
    };
    if constexpr (kPaired<T>) {
      const bool keeps = p_.sq_norm || p_.mass;
      for (int j = 0; j < n; j += 2) {
        const V first = weight(j), second = j + 1 < n ? weight(j + 1) : V{};
        store(pairs + j / 2 * kRows, zip(first, second));
        if (!keeps) continue;
        store(s + j * kRows, first);
        if (j + 1 < n) store(s + (j + 1) * kRows, second);
      }
    } else {
      for (int j = 0; j < n; ++j) store(s + j * kRows, weight(j));
    }
    return total;
  }

  HW_NOINLINE void add_mass(const Block& block, const Range& keys, const A* e, A* sum) {
    const Ref<const A, 3> m = p_.mass_keys.template as<const A>();
    V total = load(sum);
    for (int64_t j = keys.begin; j < keys.end; ++j)
      if (const int64_t key = block.key_number(j); key >= 0)
        total += load(e + (j - keys.begin) * kRows) * m(block.batch(), block.head(), key);
    store(sum, total);
  }

  HW_NOINLINE void rescale(const Lanes& lanes, const A* factor, A* values) {
    for (int64_t d = 0; d < batch_at_once_ * value_dim_; ++d)
      for (int l = lanes.begin; l < lanes.end; l += kLanes<A>) {
        A* at = values + d * kRows + l;
        store(at, load(at) * load(factor + l));
      }
  }

  // a(s) in place of s; false if all of the tile is zero.
  HW_NOINLINE bool activate(const Block&, const Range& keys, const Lanes& lanes, A* s,
                            State& state) {
    V any{};
    for (int l = lanes.begin; l < lanes.end; l += kLanes<A>) {
      V total{};
      for (int j = 0; j < keys.count(); ++j) {
        A* at = s + j * kRows + l;
        const V a = activation(p_.activation, load(at));
        total += a;
        store(at, a);
      }
      store(state.rows->sum + l, load(state.rows->sum + l) + total);
      any = total != A(0) ? splat(A(1)) : any;
    }
    return sum<A>(any) != 0;
  }

  // w^T += v^T p^T of the tile.
  HW_NOINLINE void add_values(const Block& block, const Range& keys, Tile<T, Source, Score>& tile,
                              const A* s, State& state, E* buffer, const T** gathered) {
    const int n = static_cast<int>(keys.count());
    const E* p = kPaired<T> && soft_ ? tile.pairs() : tile.over_keys(s, n);
    for (int64_t b = 0; b < batch_of(block); ++b) {
      Rows<T> v = rows_of_keys(v_, block, block.key_batch() + b, keys, buffer, gathered);
      if (tile.packed != nullptr) tile.packed->find_v(keys, v);
      multiply<true>(value_dim_, tile.lanes().count(), steps<E>(n), over_rows_transposed(v), p,
                     kRows, state.values + b * value_dim_ * kRows + tile.lanes().begin, kRows,
                     NoFactors{}, &tile.prefetches);
    }
  }

  // The sums of the next span to those of the spans before.
  HW_NOINLINE void add(const Block& block, State& whole, const State& part) {
    const int width = round_up(block.count(), kLanes<A>);
    alignas(64) A of_whole[kRows], of_part[kRows];
    for (int i = 0; i < width; ++i) {
      BlockSums<A>&a = *whole.rows, &b = *part.rows;
      const A top = std::max(a.max[i], b.max[i]);
      of_whole[i] = a.move(i, top);
      of_part[i] = b.move(i, top);
      a.top[i] = std::max(a.top[i], b.top[i]);
      a.sum[i] += b.sum[i];
      a.tilt[i] += b.tilt[i];
      a.squares[i] += b.squares[i];
      a.mass[i] += b.mass[i];
    }
    if (whole.along_keys) return add_rows(block, whole.values, of_whole, part.values, of_part);
    for (int64_t d = 0; d < batch_at_once_ * value_dim_; ++d)
      for (int l = 0; l < width; l += kLanes<A>) {
        A* at = whole.values + d * kRows + l;
        const V part_value = load(part.values + d * kRows + l) * load(of_part + l);
        store(at, fma(load(at), load(of_whole + l), part_value));
      }
  }

  HW_NOINLINE void add_rows(const Block& block, A* whole, const A* of_whole, const A* part,
                            const A* of_part) {
    for (int64_t b = 0; b < batch_at_once_; ++b)
      for (int i = 0; i < block.count(); ++i) {
        const int64_t row = (b * kRows + i) * padded_values();
        for (int d = 0; d < padded_values(); ++d)
          whole[row + d] = whole[row + d] * of_whole[i] + part[row + d] * of_part[i];
      }
  }

  // Outputs of a block.
  HW_NOINLINE void finish(const Block& block, State& state, Scratch& scratch) {
    alignas(64) A factor[kRows];
    find_factors(block, state, factor);
    if (!v_) return;
    if (state.along_keys) return finish_rows(block, state.values, factor, scratch);
    if (outputs_.writes_vectors()) {
      for (int64_t b = 0; b < batch_of(block); ++b)
        outputs_.write_rows(block, block.batch() + b, factor,
                            state.values + b * value_dim_ * kRows);
      return;
    }
    const int padded = padded_values();
    rescale({0, round_up(block.count(), kLanes<A>)}, factor, state.values);
    A* rows = scratch.take<A>(kRows * padded);
    A* v_row = scratch.take<A>(kRows * padded);
    for (int64_t b = 0; b < batch_of(block); ++b) {
      hw::transpose(state.values + b * value_dim_ * kRows, kRows, value_dim_, block.count(), rows,
                    padded);
      for (int i = 0; i < block.count(); ++i)
        outputs_.write_row(block, block.batch() + b, i, rows + i * padded, v_row);
    }
  }

  // The same of w as AlongKeys leaves it.
  HW_NOINLINE void finish_rows(const Block& block, A* values, const A* factor, Scratch& scratch) {
    const bool vectors = outputs_.writes_vectors();
    A* v_row = scratch.take<A>(padded_values());
    for (int64_t b = 0; b < batch_of(block); ++b) {
      A* of_batch = values + b * kRows * padded_values();
      if (vectors) {
        outputs_.write_vectors(block, block.batch() + b, factor, of_batch);
        continue;
      }
      for (int i = 0; i < block.count(); ++i) {
        A* w = of_batch + i * padded_values();
        for (int d = 0; d < value_dim_; ++d) w[d] *= factor[i];
        outputs_.write_row(block, block.batch() + b, i, w, v_row);
      }
    }
  }

  // What the values of each row are multiplied by.
  HW_NOINLINE void find_factors(const Block& block, State& state, A* factor) {
    const A extra = extra_logit<A>(p_, block.batch(), block.head());
    if (soft_ && extra == -kInfinity<A> && !reads_out_) {
      for (int l = 0; l < block.count(); l += kLanes<A>) {
        const V total = load(state.rows->sum + l);
        store(factor + l, total == A(0) ? V{} : A(1) / total);
      }
      return;
    }
    std::fill_n(factor, kRows, A(0));
    for (int i = 0; i < block.count(); ++i)
      factor[i] = soft_ ? finalize(block, i, state) : normalize(block, i, state);
  }

  // Row statistic and read-outs of a softmax row; returns the factor of its values.
  HW_NOINLINE A finalize(const Block& block, int i, const State& state) {
    const RowResult<A> x =
        finalize_softmax(state.rows->row(i), extra_logit<A>(p_, block.batch(), block.head()));
    put(p_.row, block, i, x.row);
    put(p_.rest, block, i, x.rest);
    put(p_.entropy, block, i, x.entropy);
    // Where max stayed behind p_max does not.
    const A top = state.rows->top[i], max = state.rows->max[i];
    put(p_.p_max, block, i, top > max ? std::exp((top - x.row) - x.rest) : x.p_max);
    put(p_.sq_norm, block, i, x.sq_norm);
    put(p_.mass, block, i, x.mass);
    return x.factor;
  }

  HW_NOINLINE A normalize(const Block& block, int i, const State& state) {
    const A n = p_.normalizer == Normalizer::sum ? state.rows->sum[i]
                : p_.normalizer == Normalizer::length
                    ? static_cast<A>(block.visible_keys(i).count())
                    : A(1);
    if (p_.normalizer == Normalizer::sum) put(p_.row, block, i, n);
    put(p_.rest, block, i, A(0));
    return n != 0 ? 1 / n : A(0);
  }

  HW_NOINLINE void put(const Ref<void, 3>& to, const Block& block, int i, A value) {
    for (int64_t b = 0; to && b < batch_of(block); ++b)
      to.template as<A>()(block.batch() + b, block.head(), block.result(i)) = value;
  }

  const ForwardParams p_;
  const int threads_;
  const Source source_;
  const Score score_;
  const Ref<const T, 4> v_;
  const Outputs<T> outputs_;
  const bool soft_, reads_out_;  // reads_out: something is wanted of a row besides its values
  const int value_dim_, heads_;
  const int64_t batch_at_once_, groups_, blocks_, tasks_;
  const bool packs_;
  int64_t items_ = 1;  // of which a batch entry has as many for each head
  int64_t spans_ = 1;  // tasks of a block: the most spans of any, or one for all of them
  Buffer partials_;
};

}  // namespace
}  // namespace hw::softmax
