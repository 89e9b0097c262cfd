// SPDX-License-Identifier: Apache-2.0
// What happened before what, in a block. See docs/emulator.md, "Races".
//
// All lanes of a warp meet at every operation of the warp, so the warp's time is cut into intervals
// by its meetings; an access is known by its warp, interval and lane. What a warp knows of another
// one is the last interval that a barrier has made visible to it. Hence, exactly:
//
//   a (warp v, interval i, lane l) happened before what a lane m of warp w does now
//     same warp    l = m, or i < interval of w now
//     other warp   i <= seen[w][v]
//
// An exit is no meeting: what a lane does after its last one is never seen by another thread. A
// thread's asynchronous copies happen, for everyone, when the wait that covers them returns.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <vector>

namespace hw::emu {

inline constexpr int kLanes = 32, kMaxWarps = 32, kMaxThreads = kLanes * kMaxWarps;

class Clocks {
 public:
  void reset() {
    now_.fill(1);
    exited_.fill(0);
    for (auto& row : seen_) row.fill(0);
    for (auto& copies : copies_) copies = {};
  }

  uint32_t now(int warp) const { return now_[warp]; }

  // The live lanes of a warp have met.
  void meet(int warp) { ++now_[warp]; }

  // Whole warps have met: each learns what any of them knows.
  void meet_all(uint32_t warps) {
    std::array<uint32_t, kMaxWarps> known{};
    for_each(warps, [&](int w) {
      for (int v = 0; v < kMaxWarps; ++v) known[v] = std::max(known[v], seen_[w][v]);
    });
    for_each(warps, [&](int w) { known[w] = now_[w]; });
    for_each(warps, [&](int w) {
      seen_[w] = known;
      ++now_[w];
    });
  }

  void leave(int thread) {
    exited_[thread / kLanes] |= 1u << (thread % kLanes);
    left_[thread] = now_[thread / kLanes];
  }

  // Whether what `lanes` of `warp` did in interval `when` happened before what `thread` does now.
  bool before(int warp, uint32_t when, uint32_t lanes, int thread) const {
    const int own = thread / kLanes;
    if (warp == own && lanes == 1u << (thread % kLanes)) return true;
    if (warp == own ? when >= now_[own] : when > seen_[own][warp]) return false;
    return (lanes & exited_[warp]) == 0 || !was_last(warp, when, lanes);
  }

  // --- asynchronous copies: a thread's groups, counted from 0

  uint32_t open_group(int thread) const { return copies_[thread].closed; }
  void commit(int thread) { ++copies_[thread].closed; }
  void wait(int thread, uint32_t under_way) {
    Copies& c = copies_[thread];
    while (c.done.size() + under_way < c.closed) c.done.push_back({now_[thread / kLanes]});
  }
  bool copy_before(int copier, uint32_t group, int thread) const {
    const Copies& c = copies_[copier];
    return group < c.done.size() &&
           before(copier / kLanes, c.done[group].interval, 1u << (copier % kLanes), thread);
  }

 private:
  struct Wait {
    uint32_t interval;  // in which it returned
  };
  struct Copies {
    uint32_t closed = 0;
    std::vector<Wait> done;  // by group
  };

  template <class F>
  static void for_each(uint32_t warps, const F& f) {
    for (; warps != 0; warps &= warps - 1) f(std::countr_zero(warps));
  }

  // Whether one of the lanes has exited in this interval.
  bool was_last(int warp, uint32_t when, uint32_t lanes) const {
    bool last = false;
    for_each(lanes & exited_[warp], [&](int lane) { last |= left_[warp * kLanes + lane] == when; });
    return last;
  }

  std::array<uint32_t, kMaxWarps> now_, exited_;
  std::array<std::array<uint32_t, kMaxWarps>, kMaxWarps> seen_;
  std::array<uint32_t, kMaxThreads> left_;
  std::array<Copies, kMaxThreads> copies_;
};

}  // namespace hw::emu
