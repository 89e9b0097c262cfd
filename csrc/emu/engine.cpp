// SPDX-License-Identifier: Apache-2.0
#include "emu/engine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <utility>

namespace hw::emu {

// Of a thread's stack, what is poisoned: the frames of a kernel, which hold its registers.
constexpr size_t kPoisonedStack = 4096;

constinit thread_local ThreadInfo* current = nullptr;

// On the heap: thread-local memory of a library that is opened late is scarce.
Engine& Engine::local() {
  thread_local const std::unique_ptr<Engine> engine(new Engine);
  return *engine;
}

// ---- One block ----------------------------------------------------------------------------------

void Engine::run_block(const Launch& launch, const Config& config, const int index[3],
                       uint64_t number) {
  prepare(launch, config, index, number);
  exceptions_outside_ = std::uncaught_exceptions();
  if (races_) races_->begin_block(static_cast<int64_t>(number), shared_.base(), shared_.bytes());
  go_on(next_thread());
  if (races_) races_->pause(true);
  current = nullptr;
  running_ = nullptr;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  const ptrdiff_t damage = shared_.damage();
  check(damage == 0, ErrorKind::runtime, "emulator: in ", where(), ": byte ", damage,
        " of shared memory was written, but the launch gave ", shared_.bytes(),
        " bytes; an AddressSanitizer build shows the line");
}

void Engine::prepare(const Launch& launch, const Config& config, const int index[3],
                     uint64_t number) {
  launch_ = &launch;
  config_ = config;
  random_ = Random(config.seed, number);
  for (int d = 0; d < 3; ++d) {
    block_.index[d] = index[d];
    block_.grid[d] = launch.grid[d];
  }
  shared_.reset(static_cast<size_t>(launch.shared_bytes), config.poison);
  barriers_ = {};
  warps_in_use_ = (launch.threads + kLanes - 1) / kLanes;
  live_warps_ = ready_warps_ = 0;
  interrupted_ = true;
  for (int w = 0; w < warps_in_use_; ++w) {
    const int lanes = std::min(kLanes, launch.threads - w * kLanes);
    warps_[w] = Warp{};
    warps_[w].index = w;
    warps_[w].live = warps_[w].ready = 0xffffffffu >> (kLanes - lanes);
    live_warps_ |= 1u << w;
  }
  ready_warps_ = live_warps_;
  for (int t = 0; t < launch.threads; ++t) {
    if (!threads_[t]) {
      auto thread = std::make_unique<Thread>();
      thread->index = t;
      thread->block = &block_;
      thread->engine = this;
      thread->warp = &warps_[t / kLanes];
      thread->lane = t % kLanes;
      thread->fiber.create(&Engine::thread_entry, t);
      threads_[t] = std::move(thread);
    }
    threads_[t]->started = threads_[t]->ended = false;
    threads_[t]->copies.clear();
  }
}

// A fiber stays in this loop for good: each round is one thread of one block.
void Engine::thread_entry() {
  Fiber::entered();
  Engine& engine = running();
  Thread& thread = *engine.running_;
  for (;;) {
    engine.run_thread(thread);
    Thread* next = engine.error_ ? engine.next_cancelled() : engine.next_thread();
    if (next == nullptr && !engine.error_ && engine.live_warps_ != 0) {
      engine.fail(std::make_exception_ptr(Error(ErrorKind::runtime, engine.deadlock_report())));
      next = engine.next_cancelled();
    }
    engine.go_on(next);
  }
}

// Fills the part of the running stack that the kernel's frames will lie on: registers of a thread,
// as shared memory, hold anything at its start.
[[gnu::noinline]] void poison_locals(uint8_t byte) {
  uint8_t room[kPoisonedStack];
  std::memset(room, byte, sizeof room);
  asm volatile("" : : "r"(room) : "memory");  // keeps what nobody reads
}

void Engine::run_thread(Thread& thread) {
  thread.started = true;
  poison_locals(config_.poison);
  try {
    launch_->main(launch_->params);
    leave(thread);
  } catch (const Cancelled&) {
  } catch (...) {
    fail(std::current_exception());
  }
  thread.ended = true;
}

// An exited lane is waited for no longer, so it may be the one that completes its warp's meeting,
// and an exited warp the one that completes the block's barrier.
void Engine::leave(Thread& thread) {
  Warp& warp = *thread.warp;
  if (races_) races_->leave(thread.index);
  warp.live &= ~thread.bit();
  warp.arguments[thread.lane] = nullptr;
  if (warp.live == 0) {
    live_warps_ &= ~(1u << warp.index);
    const uint32_t waiting = barriers_[0].warps;
    if (waiting != 0 && waiting == live_warps_) release_all(waiting);
  } else if (warp.arrived == warp.live) {
    complete(warp);
  }
}

void Engine::fail(std::exception_ptr error) {
  if (!error_) error_ = std::move(error);
  if (races_) races_->pause(true);
}

// ---- Meetings -----------------------------------------------------------------------------------

void Engine::meet(const Meeting& meeting, void* arguments) {
  if (std::uncaught_exceptions() > exceptions_outside_) return;  // a destructor, while unwinding
  if (error_) throw Cancelled{};
  Thread& thread = *running_;
  Warp& warp = *thread.warp;
  join(warp, meeting);
  warp.arguments[thread.lane] = arguments;
  warp.arrived |= thread.bit();
  if (warp.arrived == warp.live) complete(warp);
  if (warp.arrived & thread.bit()) {
    suspend();
  } else if (config_.order == Order::shuffled && random_.one_in(32)) {
    interrupted_ = true;
    warp.ready |= thread.bit();
    ready_warps_ |= 1u << warp.index;
    suspend();
  }
}

namespace {

bool same_site(Site a, Site b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::string(a.file_name()) == b.file_name());
}

bool same_meeting(const Meeting& a, const Meeting& b) {
  return a.operation == b.operation && a.barrier == b.barrier && a.threads == b.threads &&
         same_site(a.site, b.site);
}

std::string name_of(const Meeting& m) {
  if (m.operation != &kSyncGroup) return m.operation->name;
  return concat(m.operation->name, "(", m.barrier, ", ", m.threads, ")");
}

}  // namespace

// The running thread comes to its warp's meeting, or opens it.
void Engine::join(Warp& warp, const Meeting& meeting) {
  if (warp.arrived == 0) {
    warp.meeting = meeting;
    return;
  }
  if (same_meeting(warp.meeting, meeting)) return;
  throw fault(meeting.site, "divergent warp: it calls ", name_of(meeting), " while thread ",
              warp.index * kLanes + std::countr_zero(warp.arrived), " of the same warp waits at ",
              name_of(warp.meeting), " (", place(warp.meeting.site),
              "); all lanes of a warp have to reach the same one");
}

// All live lanes of the warp are here.
void Engine::complete(Warp& warp) {
  const WarpOperation& operation = *warp.meeting.operation;
  if (&operation == &kSyncBlock) return arrive_block(warp);
  if (&operation == &kSyncGroup) return arrive_group(warp);
  if (operation.needs_all_lanes && warp.live != 0xffffffffu) {
    throw fault(warp.meeting.site, operation.name, " needs all 32 lanes of warp ", warp.index,
                ", but only ", std::popcount(warp.live), " of them have not exited");
  }
  operation.execute(warp.arguments, warp.live);
  if (races_) races_->meet(warp.index, &operation == &kSyncWarp);
  release(warp);
}

void Engine::arrive_block(Warp& warp) {
  Barrier& barrier = barriers_[0];
  if (barrier.warps != 0) {
    const Warp& other = warps_[std::countr_zero(barrier.warps)];
    if (!same_meeting(other.meeting, warp.meeting)) {
      throw fault(warp.meeting.site, "divergent block: warp ", warp.index,
                  " is at this sync_block while warp ", other.index, " waits at the one at ",
                  place(other.meeting.site), "; use sync_group for barriers of some warps");
    }
  }
  barrier.warps |= 1u << warp.index;
  if (barrier.warps == live_warps_) release_all(barrier.warps);
}

// Like the hardware, counts whole warps.
void Engine::arrive_group(Warp& warp) {
  Barrier& barrier = barriers_[warp.meeting.barrier];
  if (barrier.warps != 0 && barrier.threads != warp.meeting.threads) {
    throw fault(warp.meeting.site, "barrier count mismatch: warp ", warp.index, " expects ",
                warp.meeting.threads, " threads at barrier ", warp.meeting.barrier, ", but warp ",
                std::countr_zero(barrier.warps), " expects ", barrier.threads);
  }
  barrier.threads = warp.meeting.threads;
  barrier.arrived += kLanes;
  barrier.warps |= 1u << warp.index;
  if (barrier.arrived < barrier.threads) return;
  const uint32_t warps = barrier.warps;
  barrier = {};
  release_all(warps);
}

// The lanes of the warp, but for the running thread, become ready.
void Engine::release(Warp& warp) {
  warp.arrived = 0;
  warp.ready = warp.live;
  if (running_->warp == &warp) warp.ready &= ~running_->bit();
  if (warp.ready != 0) ready_warps_ |= 1u << warp.index;
}

void Engine::release_all(uint32_t warps) {
  if (races_) races_->meet_all(warps);
  barriers_[0].warps &= ~warps;
  for (uint32_t rest = warps; rest != 0; rest &= rest - 1) release(warps_[std::countr_zero(rest)]);
  interrupted_ = true;
}

// ---- Scheduling ---------------------------------------------------------------------------------

// Lets another thread run; returns when this one may go on.
void Engine::suspend() {
  Thread* next = next_thread();
  if (next == nullptr) throw Error(ErrorKind::runtime, deadlock_report());
  if (next != running_) go_on(next);
  if (error_) throw Cancelled{};
}

int Engine::choose_warp() {
  switch (config_.order) {
    case Order::forward: return std::countr_zero(ready_warps_);
    case Order::reverse: return 31 - std::countl_zero(ready_warps_);
    case Order::shuffled: break;
  }
  const int own = running_ == nullptr ? 0 : running_->warp->index;
  if (!interrupted_ && (ready_warps_ >> own & 1u)) return own;
  interrupted_ = false;
  return random_.pick_bit(ready_warps_);
}

// Takes the next thread from those that are ready; null if there is none.
Thread* Engine::next_thread() {
  if (ready_warps_ == 0) return nullptr;
  Warp& warp = warps_[choose_warp()];
  int lane = 0;
  switch (config_.order) {
    case Order::forward: lane = std::countr_zero(warp.ready); break;
    case Order::reverse: lane = 31 - std::countl_zero(warp.ready); break;
    case Order::shuffled: lane = random_.pick_bit(warp.ready); break;
  }
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) ready_warps_ &= ~(1u << warp.index);
  return threads_[warp.index * kLanes + lane].get();
}

// After a failure: a thread that still has something on its stack; null when none is left.
Thread* Engine::next_cancelled() {
  for (int t = 0; t < launch_->threads; ++t) {
    if (threads_[t]->started && !threads_[t]->ended) return threads_[t].get();
  }
  return nullptr;
}

// Switches to a thread, or, without one, back to run_block().
void Engine::go_on(Thread* thread) {
  Fiber& from = running_ == nullptr ? host_ : running_->fiber;
  running_ = thread;
  current = thread;
  from.switch_to(thread == nullptr ? host_ : thread->fiber);
}

void Engine::issue_copy(const Copy& copy, const void* place) {
  const bool early =
      config_.copies == Copies::early || (config_.copies == Copies::mixed && random_.one_in(2));
  if (races_) {
    races_->copy(running_->index, copy.to, copy.from, copy.bytes, copy.valid, place);
    races_->pause(true);
  }
  if (early)
    copy.land();
  else
    running_->copies.issue(copy);
  if (races_) races_->pause(false);
}

void Engine::commit_copies() {
  if (races_) races_->commit(running_->index);
  running_->copies.commit();
}

void Engine::wait_for_copies(int groups_under_way) {
  if (races_) races_->wait(running_->index, groups_under_way);
  running_->copies.wait(static_cast<size_t>(groups_under_way));
}

// ---- Reports ------------------------------------------------------------------------------------

std::string Engine::place(Site site) { return concat(site.file_name(), ":", site.line()); }

std::string Engine::where() const {
  return concat("kernel ", launch_->kernel, ", block (", block_.index[0], ", ", block_.index[1],
                ", ", block_.index[2], ")");
}

void Engine::require_shared(const char* operation, const void* p, int bytes, Site site) const {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (!shared_.contains(p, static_cast<size_t>(bytes))) {
    throw fault(site, operation, ": the ", bytes, " bytes at offset ",
                static_cast<intptr_t>(address - reinterpret_cast<uintptr_t>(shared_.base())),
                " are not in shared memory, which has ", shared_.bytes(), " bytes");
  }
  if (address % static_cast<uintptr_t>(bytes) != 0) {
    throw fault(site, operation, ": offset ", address - reinterpret_cast<uintptr_t>(shared_.base()),
                " of shared memory is not aligned to ", bytes, " bytes");
  }
}

std::string Engine::waiting_for(const Warp& warp) const {
  const Meeting& m = warp.meeting;
  std::string text = concat(name_of(m), " (", place(m.site), ")");
  if (m.operation == &kSyncGroup) {
    const Barrier& barrier = barriers_[static_cast<size_t>(m.barrier)];
    text += concat(", where ", barrier.arrived, " of ", barrier.threads, " threads have arrived");
  } else if (m.operation == &kSyncBlock) {
    text += concat(", where ", std::popcount(barriers_[0].warps), " of ",
                   std::popcount(live_warps_), " warps have arrived");
  }
  return text;
}

// One line for each run of warps that wait for the same, or that have exited.
std::string Engine::deadlock_report() const {
  std::string text = concat("emulator: deadlock in ", where(), ": no thread can run");
  for (int first = 0; first < warps_in_use_;) {
    const Warp& warp = warps_[first];
    int end = first + 1;
    while (end < warps_in_use_ && (warps_[end].live == 0) == (warp.live == 0) &&
           (warp.live == 0 || same_meeting(warps_[end].meeting, warp.meeting))) {
      ++end;
    }
    const int last = std::min(end * kLanes, launch_->threads) - 1;
    text += concat("\n  threads ", first * kLanes, " to ", last,
                   warp.live == 0 ? std::string(" have exited") : " wait at " + waiting_for(warp));
    first = end;
  }
  return text;
}

}  // namespace hw::emu
