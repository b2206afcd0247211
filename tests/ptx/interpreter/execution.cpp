// Runs grids: schedules of blocks and warps, groups of lanes that have diverged, barriers.
#include "machine.h"

namespace ptx {
namespace {

u64 random_state;
u32 next_random() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<u32>(random_state >> 33);
}

// --- one warp ---

enum class Step { next, regroup, wait };  // after an instruction: the next one, look for another group, or stop here

// Runs a warp until it waits, ends, polls or has executed `quantum` instructions. Lanes that have diverged are groups;
// the group with the lowest pc runs until it reaches another.
class WarpRun {
 public:
  WarpRun(Warp& w, u64 quantum) : w_(w), k_(*w.kernel), quantum_(quantum) {}

  void run() {
    Step step = Step::regroup;
    while (step != Step::wait && executed_ < quantum_ && !w_.groups.empty()) {
      if (!choose_group()) continue;
      step = run_group();
    }
    w_.block->grid->executed += executed_ + 1;
    if (w_.groups.empty()) w_.state = State::done;
  }

 private:
  // Returns false if groups were merged: then choose again.
  bool choose_group() {
    auto& groups = w_.groups;
    group_ = -1;
    for (int g = 0; g < static_cast<int>(groups.size()); ++g) {
      if (!groups[g].blocked && (group_ < 0 || groups[g].pc < groups[group_].pc)) group_ = g;
    }
    if (group_ < 0) fail_diverged();
    other_ = ~0u;
    for (int g = 0; g < static_cast<int>(groups.size()); ++g) {
      if (g == group_) continue;
      if (groups[g].pc == groups[group_].pc) {
        groups[group_].mask |= groups[g].mask;
        groups.erase(groups.begin() + g);
        unblock();
        return false;
      }
      if (!groups[g].blocked) other_ = std::min(other_, groups[g].pc);
    }
    return true;
  }

  [[noreturn]] void fail_diverged() {
    std::string others;
    for (const Group& o : w_.groups) {
      const Instruction& i = k_.instructions[o.pc];
      others += format("\n  lanes %08x at ", o.mask) + (*i.place ? std::string(i.place) + ", " : "") +
                format("PTX line %d `%s`", i.line, i.text);
    }
    const Group& g = w_.groups[0];
    fail("divergence: " + where(w_, k_.instructions[g.pc], __builtin_ctz(g.mask)) + others);
  }

  void unblock() {
    for (Group& g : w_.groups) g.blocked = false;
  }

  bool meets_another(u32 pc) const {
    if (pc >= other_) return true;
    for (int g = 0; g < static_cast<int>(w_.groups.size()); ++g) {
      if (g != group_ && w_.groups[g].pc == pc) return true;
    }
    return false;
  }

  Step run_group() {
    const bool alone = w_.groups.size() == 1;
    for (bool begun = false;; begun = true) {
      Group& group = w_.groups[group_];
      if (executed_ >= quantum_ || (begun && !alone && meets_another(group.pc))) return Step::regroup;
      ++executed_;
      const Step step = execute(group, k_.instructions[group.pc]);
      if (step != Step::next) return step;
    }
  }

  static void count(const Instruction& i, u32 m) {
    if (options.statistics) ++i.warps, i.lanes += __builtin_popcount(m);
  }

  Step execute(Group& group, const Instruction& i) {
    w_.now = &i;
    const u32 mask = group.mask;
    u32 m = mask;
    if (i.guarded) {
      need_written(w_, i, i.guard, mask, "guard");
      const u32 p = predicate(w_, i.guard);
      m = mask & (i.negated ? ~p : p);
    }
    switch (i.kind) {
      case Kind::ordinary:
        count(i, m);
        if (m) i.handler(w_, i, m);
        ++group.pc;
        return Step::next;
      case Kind::polling:
        count(i, m);
        i.handler(w_, i, m);
        ++group.pc;
        return Step::wait;
      case Kind::branch: count(i, m); return branch(group, i, m);
      case Kind::leave: count(i, m); return leave(group, i, m);
      case Kind::collective: return collective(group, i, m);
      case Kind::warp_barrier: return warp_barrier(group, i, m);
      case Kind::block_barrier: break;
    }
    return block_barrier(group, i, m);
  }

  Step branch(Group& group, const Instruction& i, u32 m) {
    const u32 stay = group.mask & ~m;
    if (!m || !stay) {
      group.pc = m ? i.target : group.pc + 1;
      return Step::next;
    }
    const u32 after = group.pc + 1;
    group.pc = i.target, group.mask = m;
    w_.groups.push_back({after, stay, false});
    return Step::regroup;
  }

  Step leave(Group& group, const Instruction& i, u32 m) {
    w_.live &= ~m;
    for (const Copy& c : w_.copies) {
      if (m >> c.lane & 1) fail("unfinished copy: a thread exits, " + where(w_, i, c.lane));
    }
    if (m == group.mask)
      w_.groups.erase(w_.groups.begin() + group_);
    else
      group.mask &= ~m, ++group.pc;
    unblock();
    return Step::regroup;
  }

  Step block_group(Group& group) {
    group.blocked = true;
    return Step::regroup;
  }

  Step collective(Group& group, const Instruction& i, u32 m) {
    u32 want = ~0u;
    if (!std::strncmp(i.text, "shfl", 4)) {
      need_written(w_, i, i.sources[3], group.mask, "membermask");
      want = w_.r<u32>(i.sources[3])[__builtin_ctz(group.mask)];
    } else if (w_.live != ~0u) {
      fail("divergence: lanes of the warp have left, " + where(w_, i, 0));
    }
    if ((group.mask & want) != want) return block_group(group);
    count(i, m);
    i.handler(w_, i, m);
    ++group.pc;
    return Step::next;
  }

  Step warp_barrier(Group& group, const Instruction& i, u32 m) {
    const u32 want = w_.r<u32>(i.sources[0])[__builtin_ctz(group.mask)];
    if ((group.mask & want) != want) return block_group(group);
    count(i, m);
    ++w_.clocks[w_.number];
    ++group.pc;
    return Step::next;
  }

  Step block_barrier(Group& group, const Instruction& i, u32 m) {
    if (group.mask != w_.live) return block_group(group);
    if (i.source_count == 2) return named_barrier(group, i, m);
    if (i.immediate != 0) fail("barrier: other than 0 without a count, " + where(w_, i, 0));
    if (w_.live != ~0u) fail("deadlock: bar.sync after lanes of the warp have left, " + where(w_, i, 0));
    count(i, m);
    w_.barrier_pc = group.pc++;
    w_.state = State::at_barrier;
    return Step::wait;
  }

  Step named_barrier(Group& group, const Instruction& i, u32 m) {
    need_written(w_, i, i.sources[0], m, "barrier");
    need_written(w_, i, i.sources[1], m, "count");
    const u32 *names = w_.r<u32>(i.sources[0]), *counts = w_.r<u32>(i.sources[1]);
    const u32 id = names[0], expected = counts[0];
    LANES if (names[l] != id || counts[l] != expected) fail("barrier: differs within a warp, " + where(w_, i, l));
    if (id > 15 || expected == 0 || expected % 32) fail("barrier: name or count, " + where(w_, i, 0));
    count(i, m);
    NamedBarrier& b = w_.block->named[id];
    if (b.arrived && b.expected != expected) fail("barrier: two counts, " + where(w_, i, 0));
    const bool waits = !std::strncmp(i.text, "bar.sync", 8);
    b.expected = expected;
    b.arrived += 32;
    if (b.arrived > b.expected) fail("barrier: more threads than it counts, " + where(w_, i, 0));
    join(b.clocks, w_.clocks);
    ++w_.clocks[w_.number];
    if (waits) b.waiting.push_back(w_.index), w_.state = State::at_named_barrier;
    ++group.pc;
    if (b.arrived == b.expected) {
      for (u32 index : b.waiting) {
        Warp& other = w_.block->warps[index];
        join(other.clocks, b.clocks);
        ++other.clocks[other.number];
        other.state = State::running;
      }
      b = NamedBarrier();
    }
    return waits ? Step::wait : Step::next;
  }

  Warp& w_;
  Kernel& k_;
  const u64 quantum_;
  u64 executed_ = 0;
  int group_ = -1;
  u32 other_ = ~0u;  // the lowest pc of the other groups that could run
};

// --- blocks ---

u32 special_register(const std::string& name, const Grid& g, const Block& b, u32 index, int lane) {
  if (name == "%tid.x") return index * 32 + lane;
  if (name == "%ctaid.x") return b.index;
  if (name == "%ntid.x") return g.threads;
  if (name == "%nctaid.x") return g.blocks;
  if (name == "%laneid") return lane;
  const char dimension = name.back();
  if (dimension != 'y' && dimension != 'z') fail("special register " + name);
  return name[1] == 'n' ? 1 : 0;
}

void start_warp(Grid& g, Block& b, u32 index) {
  Warp& w = b.warps[index];
  Kernel& k = *g.kernel;
  w.kernel = &k, w.block = &b, w.index = index;
  w.number = b.index * g.warps_per_block + index;
  w.storage.reset(new u8[k.register_bytes + 64]);
  w.registers = reinterpret_cast<u8*>((reinterpret_cast<u64>(w.storage.get()) + 63) / 64 * 64);
  std::memset(w.registers, 0xdb, k.register_bytes);  // never written
  w.written.assign(k.register_count, 0);
  for (const Constant& c : k.constants) {
    LANES {
      if (c.wide)
        w.r<u64>(c.operand)[l] = c.value;
      else
        w.r<u32>(c.operand)[l] = static_cast<u32>(c.value);
    }
    w.written[c.operand.mask] = ~0u;
  }
  for (const auto& [operand, name] : k.specials) {
    LANES w.r<u32>(operand)[l] = special_register(name, g, b, index, l);
    w.written[operand.mask] = ~0u;
  }
  w.live = ~0u;
  w.groups = {{0, ~0u, false}};
  w.clocks.assign(g.warps, 0);
  w.clocks[w.number] = 1;
  w.state = State::running;
}

void start_block(Grid& g, Block& b, int index) {
  b.grid = &g;
  b.index = index;
  constexpr u32 room_for_gaps = 4096;
  const u32 bytes = g.shared_bytes + (g.kernel->has_marks ? room_for_gaps : 0);
  b.shared.assign(bytes, 0xff);
  b.valid.assign(bytes, 0);
  b.touches.assign(bytes / 2 + 1, Touch{});
  b.in_flight.assign(bytes / 16 + 1, 0);
  b.forbidden.assign(bytes / 16 + 1, 0);
  b.kept.assign(bytes / 16 + 1, 0);
  b.warps = std::vector<Warp>(g.warps_per_block);
  for (u32 j = 0; j < g.warps_per_block; ++j) start_warp(g, b, j);
}

// All warps of a block have reached a barrier: order them, and move their late atomics to the block.
void pass_barrier(Block& b) {
  const Kernel& k = *b.grid->kernel;
  Clocks all;
  const u32 pc = b.warps[0].barrier_pc;
  for (Warp& w : b.warps) {
    join(all, w.clocks);
    if (w.barrier_pc == pc) continue;
    const Instruction &one = k.instructions[pc], &other = k.instructions[w.barrier_pc];
    if (std::strcmp(one.place, other.place)) {
      fail("divergence: warps of a block meet in different barriers, " + where(w, other, 0) + "\n  others at " +
           one.place);
    }
    note("barriers" + std::to_string(pc) + "/" + std::to_string(w.barrier_pc) + k.name,
         format("warps of a block meet in different bar.sync: %s, PTX lines %d and %d", k.name.c_str(), one.line,
                other.line));
  }
  for (Warp& w : b.warps) {
    w.clocks = all;
    ++w.clocks[w.number];
    w.state = State::running;
    b.late_atomics.insert(b.late_atomics.end(), w.late_atomics.begin(), w.late_atomics.end());
    w.late_atomics.clear();
  }
}

[[noreturn]] void fail_deadlock(const Block& b, u32 done) {
  for (const Warp& w : b.warps) {
    if (w.state != State::at_barrier) continue;
    fail(format("deadlock: bar.sync, while %u warps of the block have left or wait elsewhere, ", done) +
         where(w, b.grid->kernel->instructions[w.barrier_pc], 0));
  }
  fail("deadlock: " + b.grid->kernel->name);
}

// Runs the block's warps until all of them wait. Returns whether any made progress.
bool run_block(Block& b) {
  std::vector<u32> order;
  for (u32 j = 0; j < b.warps.size(); ++j) order.push_back(j);
  if (options.schedule == Schedule::backward) std::reverse(order.begin(), order.end());
  if (options.schedule == Schedule::random) {
    for (std::size_t j = order.size(); j > 1; --j) std::swap(order[j - 1], order[next_random() % j]);
  }
  bool moved = false;
  for (u32 j : order) {
    Warp& w = b.warps[j];
    if (w.state != State::running) continue;
    WarpRun(w, options.schedule == Schedule::random ? 1 + next_random() % 400 : u64{1} << 62).run();
    moved = true;
  }
  u32 waiting = 0, done = 0, elsewhere = 0;
  for (const Warp& w : b.warps) {
    waiting += w.state == State::at_barrier, done += w.state == State::done;
    elsewhere += w.state == State::at_named_barrier;
  }
  const u32 all = static_cast<u32>(b.warps.size());
  b.done = done == all;
  if (waiting == all) {
    pass_barrier(b);
    moved = true;
  } else if (waiting && waiting + done + elsewhere == all) {
    fail_deadlock(b, done + elsewhere);
  }
  return moved;
}

// Performs the delayed atomics of a block that has ended.
void end_block(Block& b) {
  for (Warp& w : b.warps) do_late_atomics(w);
}

// Blocks that run concurrently, as many as the launch needs.
void run_together(Grid& g, int first, int count) {
  constexpr u64 most_idle = 1000000;
  std::vector<Block> blocks(count);
  for (int j = 0; j < count; ++j) start_block(g, blocks[j], first + j);
  int left = count;
  u64 idle = 0, still = 0;
  while (left) {
    bool moved = false;
    const u64 before = g.executed;
    for (Block& b : blocks) {
      if (b.done || (options.schedule == Schedule::random && next_random() % 3 == 0)) continue;
      moved |= run_block(b);
      if (b.done) --left;
    }
    idle = g.executed - before > static_cast<u64>(count) * 64 ? 0 : idle + 1;
    still = moved ? 0 : still + 1;
    if (still > (options.schedule == Schedule::random ? 200 : 0)) fail("deadlock: " + g.kernel->name);
    if (idle > most_idle) fail("livelock: " + g.kernel->name);
  }
  for (Block& b : blocks) end_block(b);
}

void run_one_by_one(Grid& g) {
  // A block's delayed atomics are done when the grid ends: later blocks do not see them without a fence.
  std::vector<LateAtomic> late;
  for (int j = 0; j < g.blocks; ++j) {
    Block b;
    start_block(g, b, options.schedule == Schedule::backward ? g.blocks - 1 - j : j);
    while (!b.done) {
      if (!run_block(b)) fail("deadlock: " + g.kernel->name);
    }
    for (Warp& w : b.warps) late.insert(late.end(), w.late_atomics.begin(), w.late_atomics.end());
    late.insert(late.end(), b.late_atomics.begin(), b.late_atomics.end());
  }
  for (const LateAtomic& a : late) *reinterpret_cast<u32*>(a.address) += a.value;
}

}  // namespace

void launch(Kernel& k, int blocks, int threads, u32 shared_bytes, void** arguments, bool cooperative) {
  if (blocks <= 0 || threads <= 0 || threads > 1024 || threads % 32) {
    fail(format("launch of %d blocks of %d threads", blocks, threads));
  }
  if (k.most_threads && threads > k.most_threads) fail(format("%d threads, of .maxntid %d", threads, k.most_threads));
  Grid g{};
  g.kernel = &k;
  g.blocks = blocks, g.threads = threads, g.shared_bytes = shared_bytes, g.cooperative = cooperative;
  g.warps_per_block = threads / 32;
  g.warps = g.warps_per_block * blocks;
  g.parameters.assign(k.parameter_bytes, 0);
  for (std::size_t j = 0; j < k.parameters.size(); ++j) {
    std::memcpy(&g.parameters[k.parameters[j].first], arguments[j], k.parameters[j].second);
  }
  forget_touches();
  random_state = options.seed * 0x9E3779B97F4A7C15ull + 12345;
  if (cooperative) return run_together(g, 0, blocks);
  if (options.schedule != Schedule::random) return run_one_by_one(g);
  constexpr int at_once = 16;
  for (int at = 0; at < blocks; at += at_once) run_together(g, at, std::min(at_once, blocks - at));
}

}  // namespace ptx
