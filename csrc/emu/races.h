// SPDX-License-Identifier: Apache-2.0
// The race check: any two accesses to shared or global memory, at least one of them a write, of
// which neither happened before the other. See docs/emulator.md, "Races".
//
// Kernels are compiled with -fsanitize=thread, which puts a call before every access to memory; the
// functions it calls are ours (race_hooks.cpp) and end here. The engine reports who has met.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emu/clocks.h"
#include "emu/emulator.h"
#include "emu/shadow.h"

#if !defined(HW_EMU_RACES)
#define HW_EMU_RACES 0
#endif

namespace hw::emu {

class Races {
 public:
  // --- what happens, in order
  void begin_launch(const Launch& launch, RaceCheck mode);
  void begin_block(int64_t number, const void* shared, size_t shared_bytes);
  void pause(bool paused) { paused_ = paused || mode_ == RaceCheck::off; }

  void meet(int warp, bool orders_memory) {
    if (orders_memory || mode_ != RaceCheck::strict) clocks_.meet(warp);
  }
  void meet_all(uint32_t warps) { clocks_.meet_all(warps); }
  void leave(int thread) { clocks_.leave(thread); }

  void access(int thread, const void* p, size_t bytes, AccessKind kind, const void* from);
  void copy(int thread, void* to, const void* from, int bytes, int valid, const void* place);
  void commit(int thread) { clocks_.commit(thread); }
  void wait(int thread, int under_way) { clocks_.wait(thread, static_cast<uint32_t>(under_way)); }

  // --- what was found in the launch; empty if nothing
  std::string report();

 private:
  // One of the two accesses of a race.
  struct Side {
    AccessKind kind;
    CodePlace place;
    uint32_t block;
    uint16_t thread;
    bool copy;
  };
  struct Race {
    Side first, second;
    uintptr_t offset;  // in shared memory, or the address
    bool shared;
    int64_t count = 0;
  };
  using Key = std::pair<std::pair<CodePlace, AccessKind>, std::pair<CodePlace, AccessKind>>;
  struct Node {
    Access access;
    uint32_t next = 0;
  };

  // --- one access
  void touch(uintptr_t begin, size_t bytes, AccessKind kind, const Access& access);
  void touch_cell(Cell& cell, AccessKind kind, const Access& access);
  bool repeats(const Cell& cell, AccessKind kind, const Access& access) const;
  void renew(Cell& cell);
  void compare_with_others(const Cell& cell, const Side& now);
  void compare(const Accesses& earlier, AccessKind kind, const Side& now);
  void add(Accesses& accesses, const Access& access);
  void forget(Accesses& accesses);
  bool before(const Access& earlier, int thread) const;
  bool in_shared(uintptr_t address) const { return address - shared_begin_ < shared_bytes_; }

  // --- reports
  static std::string verb(const Side& side);
  Side side(const Access& access, AccessKind kind) const;
  void found(const Side& first, const Side& second);
  std::string describe(const Race& race, const std::string& first, const std::string& second) const;
  std::string describe(const Side& side, const std::string& line) const;

  RaceCheck mode_ = RaceCheck::off;
  bool paused_ = true;
  const Launch* launch_ = nullptr;
  uintptr_t shared_begin_ = 0, shared_bytes_ = 0;
  // Blocks are counted over all launches, from 1, so that those of earlier ones are recognised.
  uint32_t block_ = 0, first_block_ = 1;
  std::vector<int64_t> numbers_;  // of the launch's blocks, in its grid
  uintptr_t address_ = 0;         // that is being touched
  Clocks clocks_;
  Shadow shadow_;
  Pool<Node> nodes_;
  Pool<ForeignAccesses> others_;
  std::map<Key, Race> races_;
};

}  // namespace hw::emu
