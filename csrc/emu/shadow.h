// SPDX-License-Identifier: Apache-2.0
// What the race check remembers of memory: a cell for every two bytes, with the accesses that a
// later one has to be compared with.
//
//   write     the last one
//   reads     since the last write; of each warp the latest interval is enough, with its lanes
//   updates   (atomics) likewise
//   others    of other blocks of the same launch, one of each kind is enough
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace hw::emu {

enum class AccessKind : uint8_t { read, write, update };
inline constexpr int kAccessKinds = 3;

// A place in kernel code, as the distance of its return address from a fixed one; 0: none.
using CodePlace = int32_t;

struct Access {
  CodePlace place = 0;  // 0: there is none
  uint32_t when = 0;    // interval of the warp; of a copy, the thread's group
  uint32_t lanes = 0;   // of the warp, that made it at this place or earlier in the interval
  uint16_t thread = 0;  // the latest of them
  bool copy = false;

  int warp() const { return thread / 32; }
};

struct ForeignAccess {
  CodePlace place = 0;
  uint32_t block = 0;
  uint16_t thread = 0;
  bool copy = false;
};
using ForeignAccesses = std::array<ForeignAccess, kAccessKinds>;

// Accesses of one kind: the first one here, more of them in a list.
struct Accesses {
  Access first;
  uint32_t more = 0;
};

struct Cell {
  uint32_t block = 0;  // whose accesses these are; 0: nobody's
  uint32_t others = 0;
  Access write;
  Accesses reads, updates;
};

inline constexpr size_t kCellBytes = 2;

// Objects that are given out by number (from 1 on) and all taken back at once.
template <class T>
class Pool {
 public:
  uint32_t take() {
    if (!free_.empty()) {
      const uint32_t i = free_.back();
      free_.pop_back();
      items_[i] = T{};
      return i;
    }
    items_.emplace_back();
    return static_cast<uint32_t>(items_.size() - 1);
  }
  void give(uint32_t i) { free_.push_back(i); }
  T& operator[](uint32_t i) { return items_[i]; }
  void clear() {
    items_.resize(1);
    free_.clear();
  }

 private:
  std::vector<T> items_ = std::vector<T>(1);
  std::vector<uint32_t> free_;
};

// The cells of all memory that kernels touch, page by page.
class Shadow {
 public:
  Cell& cell(uintptr_t address) {
    const uintptr_t page = address / kPageBytes;
    Recent& recent = recent_[page % kRecent];
    if (recent.page != page) recent = {page, find(page)};
    return (*recent.cells)[address % kPageBytes / kCellBytes];
  }

  // Between launches, when nothing in it counts any longer: gives back memory if it is much.
  void trim() {
    if (pages_.size() <= kMostPages) return;
    pages_.clear();
    recent_.fill({});
  }

 private:
  static constexpr uintptr_t kPageBytes = 4096;
  static constexpr size_t kRecent = 64, kMostPages = 2048;  // a page's cells take 128 KB
  using Page = std::array<Cell, kPageBytes / kCellBytes>;
  struct Recent {
    uintptr_t page = ~uintptr_t{0};
    Page* cells = nullptr;
  };

  Page* find(uintptr_t page) {
    std::unique_ptr<Page>& p = pages_[page];
    if (!p) p = std::make_unique<Page>();
    return p.get();
  }

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::array<Recent, kRecent> recent_;
};

}  // namespace hw::emu
