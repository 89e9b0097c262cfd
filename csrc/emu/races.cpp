// SPDX-License-Identifier: Apache-2.0
#include "emu/races.h"

#include <bit>
#include <utility>

#include "emu/source_lines.h"

#include "core/error.h"

namespace hw::emu {
namespace {

constexpr size_t kMostReports = 10;

// A place is kept as its distance from this.
const char anchor = 0;

CodePlace place_of(const void* return_address) {
  return static_cast<CodePlace>(reinterpret_cast<intptr_t>(return_address) -
                                reinterpret_cast<intptr_t>(&anchor));
}

const void* address_of(CodePlace place) {
  return reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(&anchor) + place);
}

bool conflict(AccessKind a, AccessKind b) { return a != b || a == AccessKind::write; }

}  // namespace

// ---- What happens -------------------------------------------------------------------------------

// Launches are ordered: what earlier ones did is forgotten, by the number of its block.
void Races::begin_launch(const Launch& launch, RaceCheck mode) {
  mode_ = mode;
  launch_ = &launch;
  first_block_ = block_ + 1;
  nodes_.clear();
  others_.clear();
  races_.clear();
  shadow_.trim();
  pause(true);
}

void Races::begin_block(int64_t number, const void* shared, size_t shared_bytes) {
  block_ = std::max(block_, first_block_ - 1) + 1;
  numbers_.resize(block_ - first_block_ + 1);
  numbers_.back() = number;
  shared_begin_ = reinterpret_cast<uintptr_t>(shared);
  shared_bytes_ = shared_bytes;
  clocks_.reset();
  pause(false);
}

void Races::access(int thread, const void* p, size_t bytes, AccessKind kind, const void* from) {
  if (paused_ || bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(p);
  // The launch's parameters are constant memory.
  if (begin - reinterpret_cast<uintptr_t>(launch_->params) < launch_->params_bytes) return;
  const int warp = thread / kLanes;
  touch(begin, bytes, kind,
        {place_of(from), clocks_.now(warp), 1u << (thread % kLanes), static_cast<uint16_t>(thread),
         false});
}

// From the call on until the wait: unordered to everything in between, the caller's own included.
void Races::copy(int thread, void* to, const void* from, int bytes, int valid, const void* place) {
  if (paused_) return;
  const Access access{place_of(place), clocks_.open_group(thread), 1u << (thread % kLanes),
                      static_cast<uint16_t>(thread), true};
  if (valid > 0) {
    touch(reinterpret_cast<uintptr_t>(from), static_cast<size_t>(valid), AccessKind::read, access);
  }
  touch(reinterpret_cast<uintptr_t>(to), static_cast<size_t>(bytes), AccessKind::write, access);
}

// ---- One access ---------------------------------------------------------------------------------

void Races::touch(uintptr_t begin, size_t bytes, AccessKind kind, const Access& access) {
  for (uintptr_t at = begin / kCellBytes * kCellBytes; at < begin + bytes; at += kCellBytes) {
    address_ = at;
    touch_cell(shadow_.cell(at), kind, access);
  }
}

void Races::touch_cell(Cell& cell, AccessKind kind, const Access& access) {
  if (cell.block != block_) renew(cell);
  if (repeats(cell, kind, access)) return;
  const Side now = side(access, kind);
  if (cell.others != 0) compare_with_others(cell, now);
  compare({cell.write}, AccessKind::write, now);
  if (kind != AccessKind::read) compare(cell.reads, AccessKind::read, now);
  if (kind != AccessKind::update) compare(cell.updates, AccessKind::update, now);
  switch (kind) {
    case AccessKind::read: return add(cell.reads, access);
    case AccessKind::update: return add(cell.updates, access);
    case AccessKind::write: break;
  }
  cell.write = access;
  forget(cell.reads);
  forget(cell.updates);
}

// Whether nothing has happened to the cell since the same thread did the same.
bool Races::repeats(const Cell& cell, AccessKind kind, const Access& access) const {
  if (access.copy || kind == AccessKind::update) return false;
  const Access& last = kind == AccessKind::read ? cell.reads.first : cell.write;
  const bool same = last.place != 0 && !last.copy && last.warp() == access.warp() &&
                    last.when == access.when && (last.lanes & access.lanes) != 0;
  return same && (kind == AccessKind::read ||
                  (cell.reads.first.place == 0 && cell.updates.first.place == 0));
}

// The cell comes from another block. Shared memory is the block's own; of global memory one access
// of each kind is kept, since nothing orders it against this block's.
void Races::renew(Cell& cell) {
  uint32_t others = 0;
  if (cell.block >= first_block_ && !in_shared(address_)) {
    others = cell.others;
    const Access* const latest[] = {&cell.reads.first, &cell.write, &cell.updates.first};
    for (int kind = 0; kind < kAccessKinds; ++kind) {
      const Access& a = *latest[kind];
      if (a.place == 0) continue;
      if (others == 0) others = others_.take();
      ForeignAccess& kept = others_[others][static_cast<size_t>(kind)];
      if (kept.place == 0) kept = {a.place, cell.block, a.thread, a.copy};
    }
  }
  if (cell.block >= first_block_) {
    forget(cell.reads);
    forget(cell.updates);
  }
  cell = Cell{block_, others, {}, {}, {}};
}

void Races::compare_with_others(const Cell& cell, const Side& now) {
  const ForeignAccesses& others = others_[cell.others];
  for (int k = 0; k < kAccessKinds; ++k) {
    const ForeignAccess& a = others[static_cast<size_t>(k)];
    const auto kind = static_cast<AccessKind>(k);
    if (a.place != 0 && conflict(kind, now.kind)) {
      found({kind, a.place, a.block, a.thread, a.copy}, now);
    }
  }
}

void Races::compare(const Accesses& earlier, AccessKind kind, const Side& now) {
  if (earlier.first.place == 0) return;
  const auto look = [&](const Access& a) {
    if (before(a, now.thread)) return;
    Side first = side(a, kind);
    const uint32_t own =
        first.thread / kLanes == now.thread / kLanes ? 1u << now.thread % kLanes : 0;
    if (!a.copy && (a.lanes & ~own) != 0) {  // one that is not the present thread
      const int lane = std::countr_zero(a.lanes & ~own);
      first.thread = static_cast<uint16_t>(a.warp() * kLanes + lane);
    }
    found(first, now);
  };
  look(earlier.first);
  for (uint32_t i = earlier.more; i != 0; i = nodes_[i].next) look(nodes_[i].access);
}

// An access takes the place of one that happened before it: what comes behind the later one comes
// behind both. Lanes of one interval share an entry.
void Races::add(Accesses& accesses, const Access& access) {
  const auto put = [&](Access& at) {
    const bool together = at.place != 0 && !at.copy && !access.copy && at.warp() == access.warp() &&
                          at.when == access.when;
    if (!together && at.place != 0 && !before(at, access.thread)) return false;
    const uint32_t lanes = access.lanes | (together ? at.lanes : 0);
    at = access;
    at.lanes = lanes;
    return true;
  };
  if (put(accesses.first)) return;
  for (uint32_t i = accesses.more; i != 0; i = nodes_[i].next) {
    if (put(nodes_[i].access)) return;
  }
  const uint32_t added = nodes_.take();
  nodes_[added] = {access, accesses.more};
  accesses.more = added;
}

void Races::forget(Accesses& accesses) {
  for (uint32_t i = accesses.more; i != 0;) {
    const uint32_t next = nodes_[i].next;
    nodes_.give(i);
    i = next;
  }
  accesses = {};
}

bool Races::before(const Access& earlier, int thread) const {
  return earlier.copy ? clocks_.copy_before(earlier.thread, earlier.when, thread)
                      : clocks_.before(earlier.warp(), earlier.when, earlier.lanes, thread);
}

Races::Side Races::side(const Access& access, AccessKind kind) const {
  return {kind, access.place, block_, access.thread, access.copy};
}

// ---- Reports ------------------------------------------------------------------------------------

std::string Races::verb(const Side& side) {
  constexpr const char* kVerbs[] = {"reads", "writes", "updates"};
  return kVerbs[static_cast<size_t>(side.kind)];
}

// A race of two places is reported once, whatever threads and blocks run into it, in either order.
void Races::found(const Side& first, const Side& second) {
  const bool shared = in_shared(address_);
  const uintptr_t offset = shared ? address_ - shared_begin_ : address_;
  const std::pair a(first.place, first.kind), b(second.place, second.kind);
  const Key key(std::min(a, b), std::max(a, b));
  const auto [at, fresh] = races_.try_emplace(key, Race{first, second, offset, shared});
  ++at->second.count;
}

// Races whose lines read the same (of an instruction that was unrolled or inlined several times)
// become one, the first.
std::string Races::report() {
  if (races_.empty()) return {};
  std::vector<const void*> places;
  for (const auto& [key, race] : races_) {
    for (const Side* side : {&race.first, &race.second}) places.push_back(address_of(side->place));
  }
  const std::vector<std::string> lines = source_lines(places);
  std::map<std::string, Race> by_lines;
  std::map<std::string, std::string> texts;
  size_t i = 0;
  for (const auto& [key, race] : races_) {
    const std::string a = verb(race.first) + lines[i], b = verb(race.second) + lines[i + 1];
    const auto [at, fresh] = by_lines.try_emplace(std::min(a, b) + std::max(a, b), race);
    if (!fresh) at->second.count += race.count;
    if (fresh) texts[at->first] = describe(race, lines[i], lines[i + 1]);
    i += 2;
  }
  std::string text = concat("emulator: in kernel ", launch_->kernel, ": ", by_lines.size(),
                            by_lines.size() == 1 ? " race" : " races");
  size_t shown = 0;
  for (const auto& [key, race] : by_lines) {
    if (shown++ == kMostReports) break;
    text += concat("\n  ", texts[key], " (", race.count, race.count == 1 ? " time)" : " times)");
  }
  if (shown > kMostReports) text += concat("\n  and ", by_lines.size() - kMostReports, " more");
  return text;
}

std::string Races::describe(const Race& race, const std::string& first,
                            const std::string& second) const {
  const std::string where =
      race.shared ? concat("byte ", race.offset, " of shared memory")
                  : concat("global memory at ", reinterpret_cast<const void*>(race.offset));
  const bool blocks = race.first.block != race.second.block;
  const bool pending = race.first.copy && race.first.thread == race.second.thread && !blocks;
  return concat(where, ": ", describe(race.first, first), ", and ", describe(race.second, second),
                blocks    ? ": blocks of a grid have no order"
                : pending ? ", before a wait for the copy"
                          : ", with nothing that orders them");
}

std::string Races::describe(const Side& side, const std::string& line) const {
  const int64_t number = numbers_[side.block - first_block_];
  const int64_t x = launch_->grid[0], y = launch_->grid[1];
  return concat(side.copy ? "the copy of thread " : "thread ", side.thread, " of block (",
                number % x, ", ", number / x % y, ", ", number / (x * y), ") ", verb(side),
                " it at ", line);
}

}  // namespace hw::emu
