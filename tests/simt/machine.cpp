#include "machine.h"

#include <cstring>
#include <exception>
#include <map>

#include "global_memory.h"

namespace simt {
namespace {

// The current launch.
struct Execution {
  const Launch* launch;
  Mode mode;
  const std::function<void()>* body;
  Context home;
  std::vector<Block*> alive;
  Thread* current = nullptr;
  std::exception_ptr failure;
};
Execution* execution = nullptr;

// Stacks and shadows are kept for the next launch: making them costs more than most tests.
std::deque<Thread> thread_pool;
std::deque<Block> block_pool;

std::string coordinates(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

Error with_context(const Error& e, const Block& block) {
  return Error(e.kind, std::string("kernel ") + execution->launch->kernel + ", block " + coordinates(block.index) +
                           ", schedule " + simt::to_string(execution->mode) + "\n  " + e.text);
}

void thread_main(void* argument) {
  Thread& t = *static_cast<Thread*>(argument);
  try {
    (*execution->body)();
    if (!t.uncommitted.empty() || !t.groups.empty()) {
      for (auto& group : t.groups) t.uncommitted.insert(t.uncommitted.end(), group.begin(), group.end());
      if (!t.uncommitted.empty()) {
        throw Error("unfinished copy", thread_name(t.thread) + " exits and has never waited for the copy issued at " +
                                           to_string(t.uncommitted[0].site));
      }
    }
  } catch (const Error& e) {
    execution->failure = std::make_exception_ptr(with_context(e, *t.home));
  } catch (...) {
    execution->failure = std::current_exception();
  }
  t.exited = true;
  t.context.leave(execution->home, true);
}

// Runs a thread until it waits; returns false if it cannot run.
bool go(Thread& t) {
  if (t.waiting || t.exited) return false;
  execution->current = &t;
  threadIdx = {t.thread, 0, 0};
  blockIdx = t.home->index;
  t.context.resume(execution->home);
  if (execution->failure) std::rethrow_exception(execution->failure);
  return true;
}

bool round(const std::vector<Block*>& blocks, Schedule schedule) {
  bool any = false;
  if (schedule == Schedule::forward) {
    for (Block* block : blocks) {
      for (Thread* t : block->threads) any |= go(*t);
    }
  } else if (schedule == Schedule::backward) {
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      for (auto t = (*block)->threads.rbegin(); t != (*block)->threads.rend(); ++t) any |= go(**t);
    }
  } else {
    for (Block* block : blocks) {
      for (bool moved = true; moved; any |= moved) {  // each block as far as it gets, and in it
        moved = false;
        for (Warp& warp : block->warps) {  // each warp as far as it gets
          for (bool ran = true; ran; moved |= ran) {
            ran = false;
            for (Thread* t : warp.lanes) ran |= go(*t);
          }
        }
      }
    }
  }
  return any;
}

// No progress: either all threads are done, or there is a deadlock.
void check_finished(const std::vector<Block*>& blocks) {
  for (const Block* block : blocks) {
    std::map<std::string, std::pair<unsigned, unsigned>> places;  // how many wait, and the first of them
    unsigned exited = 0;
    for (const Thread* t : block->threads) {
      exited += t->exited;
      if (t->exited) continue;
      auto& place = places[std::string(t->waits_for) + " at " + to_string(t->waits_at)];
      if (place.first++ == 0) place.second = t->thread;
    }
    if (places.empty()) continue;
    std::string text = "nothing can move; of " + std::to_string(block->threads.size()) + " threads";
    for (const auto& [name, place] : places) {
      text += "\n  " + std::to_string(place.first) + " wait in " + name + ", first " + thread_name(place.second);
    }
    throw with_context(Error("deadlock", text + "\n  " + std::to_string(exited) + " have exited"), *block);
  }
}

Block& make_block(std::size_t slot, unsigned number, const Launch& l) {
  if (block_pool.size() <= slot) block_pool.resize(slot + 1);
  Block& block = block_pool[slot];
  block.number = number;
  block.index = {number % l.grid.x, number / l.grid.x % l.grid.y, number / l.grid.x / l.grid.y};
  block.threads.clear();
  block.warps.assign(l.threads / 32, Warp());
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  block.grid = Barrier();
  block.shared.reset(l.shared_bytes);
  if (thread_pool.size() < (slot + 1) * l.threads) thread_pool.resize((slot + 1) * l.threads);
  for (unsigned i = 0; i < l.threads; ++i) {
    Thread& t = thread_pool[slot * l.threads + i];
    t.home = &block;
    t.block = number;
    t.thread = i;
    t.phase = t.sample = t.arena_taken = 0;
    t.clock.assign(l.threads, 0);
    t.clock[i] = 1;
    t.waiting = t.exited = false;
    t.uncommitted.clear();
    t.groups.clear();
    t.context.start(thread_main, &t);
    block.threads.push_back(&t);
    block.warps[i / 32].lanes[i % 32] = &t;
  }
  return block;
}

void wait(Thread& t, const char* operation, const Site& site) {
  t.waiting = true;
  t.waits_for = operation;
  t.waits_at = site;
  t.context.leave(execution->home, false);
}

// The current thread's arrival; true if it is the last.
bool add(Barrier& barrier, unsigned expected, bool same_place, const char* operation, const Site& site) {
  Thread& t = current();
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.place = site;
    barrier.heard.assign(t.clock.size(), 0);
  } else if (barrier.expected != expected || (same_place && !same(barrier.place, site))) {
    throw Error("divergence", thread_name(t.thread) + " arrives in " + operation + " at " + to_string(site) + ", for " +
                                  std::to_string(expected) + " threads, where others wait since " +
                                  to_string(barrier.place) + " for " + std::to_string(barrier.expected));
  }
  join(barrier.heard, t.clock);
  ++t.clock[t.thread];  // its later accesses are not ordered before those of others
  return ++barrier.arrived == expected;
}

void release(Barrier& barrier) {
  for (Thread* t : barrier.waiting) {
    join(t->clock, barrier.heard);
    t->waiting = false;
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
}

}  // namespace

std::string to_string(Mode mode) {
  const char* schedule = mode.schedule == Schedule::forward    ? "forward"
                         : mode.schedule == Schedule::backward ? "backward"
                                                               : "ahead";
  return std::string(schedule) + (mode.landing == Landing::issue ? "/issue" : "/wait");
}

Thread& current() { return *execution->current; }
Mode current_mode() { return execution->mode; }

void arrive(Barrier& barrier, unsigned expected, bool waits, bool same_place, const char* operation, const Site& site) {
  Thread& t = current();
  const bool last = add(barrier, expected, same_place, operation, site);
  if (waits) barrier.waiting.push_back(&t);
  if (last)
    release(barrier);
  else if (waits)
    wait(t, operation, site);
}

void arrive_at_grid(const Site& site) {
  Thread& t = current();
  if (!execution->launch->cooperative) {
    throw Error("grid barrier", "at " + to_string(site) + ": not a cooperative launch");
  }
  add(t.home->grid, static_cast<unsigned>(t.home->threads.size()), true, "grid_sync", site);
  t.home->grid.waiting.push_back(&t);
  for (const Block* block : execution->alive) {
    if (block->grid.arrived < block->threads.size()) return wait(t, "grid_sync", site);
  }
  for (Block* block : execution->alive) {
    for (Thread* other : block->threads) ++other->phase;
    release(block->grid);
  }
}

void collective(const char* operation, uint32_t lanes, bool same_place, void* operand, Work work, const Site& site) {
  Thread& t = current();
  Warp& warp = warp_of(t);
  Collective& c = warp.collective;
  if (!(lanes >> t.lane() & 1)) {
    throw Error("divergence",
                thread_name(t.thread) + " is not among the lanes of its " + operation + " at " + to_string(site));
  }
  if (c.arrived == 0) {
    c.operation = operation;
    c.expected = lanes;
    c.place = site;
    for (void*& operand : c.operands) operand = nullptr;
  } else if (std::strcmp(c.operation, operation) || c.expected != lanes || (same_place && !same(c.place, site))) {
    throw Error("divergence", thread_name(t.thread) + " is in " + operation + " at " + to_string(site) +
                                  ", other lanes of its warp in " + c.operation + " at " + to_string(c.place));
  }
  c.operands[t.lane()] = operand;
  c.arrived |= 1u << t.lane();
  if (c.arrived != c.expected) return wait(t, operation, site);
  work(warp, c.operands, site);
  c.arrived = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) warp.lanes[lane]->waiting = false;
  }
}

void launch(const Launch& l, Mode mode, const std::function<void()>& body) {
  if (l.threads == 0 || l.threads % 32 || l.threads > 1024) {
    throw Error("launch", "threads of a block: whole warps, at most 1024");
  }
  Execution now{};
  now.launch = &l;
  now.mode = mode;
  now.body = &body;
  execution = &now;
  gridDim = l.grid;
  blockDim = {l.threads, 1, 1};
  forget_watched_accesses();
  const unsigned blocks = l.grid.x * l.grid.y * l.grid.z;
  const unsigned together = l.cooperative ? blocks : 1;
  for (unsigned first = 0; first < blocks; first += together) {
    now.alive.clear();
    for (unsigned i = 0; i < together; ++i) {
      const bool last_first = mode.schedule == Schedule::backward && !l.cooperative;
      now.alive.push_back(&make_block(i, last_first ? blocks - 1 - first : first + i, l));
    }
    while (round(now.alive, mode.schedule)) {
    }
    check_finished(now.alive);
  }
}

}  // namespace simt
