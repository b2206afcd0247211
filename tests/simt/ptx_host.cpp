// Synchronization, memory and copies. The matrix operations are in matrix_host.cpp.
#include "ptx_host.h"

#include "banks.h"
#include "global_memory.h"
#include "machine.h"
#include "sync_points.h"

namespace diffratio::ptx {

using namespace simt;

// --- synchronization -------------------------------------------------------------------------------------------

void block_sync(Site site) {
  if (left_out("block_sync", site)) return;
  Block& block = *current().home;
  arrive(block.barriers[0], static_cast<unsigned>(block.threads.size()), true, true, "block_sync", site);
}

namespace {

Barrier& named_barrier(int id, int threads, const Site& site) {
  Block& block = *current().home;
  if (id < 1 || id > 15 || threads < 32 || threads % 32 || threads > static_cast<int>(block.threads.size())) {
    throw Error("barrier", "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads at " +
                               to_string(site) + ": names are 1 to 15, and whole warps of the block arrive");
  }
  return block.barriers[id];
}

}  // namespace

void barrier_sync(int id, int threads, Site site) {
  if (left_out("barrier_sync", site)) return;
  arrive(named_barrier(id, threads, site), threads, true, false, "barrier_sync", site);
}

void barrier_arrive(int id, int threads, Site site) {
  if (left_out("barrier_arrive", site)) return;
  arrive(named_barrier(id, threads, site), threads, false, false, "barrier_arrive", site);
}

void warp_sync(uint32_t lanes, Site site) {
  if (left_out("warp_sync", site)) return;
  Thread& t = current();
  if (!(lanes >> t.lane() & 1)) {
    throw Error("divergence", thread_name(t.thread) + " is not among the lanes of its warp_sync at " + to_string(site));
  }
  arrive(warp_of(t).barrier, __builtin_popcount(lanes), true, false, "warp_sync", site);
}

void grid_sync(uint32_t* arrived, Site site) {
  if (left_out("grid_sync", site)) return;
  if (*arrived != 0) throw Error("grid barrier", "at " + to_string(site) + ": its word was not zero before the launch");
  arrive_at_grid(site);
}

void forget_shared() { ++current().sample; }

// --- shuffles --------------------------------------------------------------------------------------------------

namespace {

struct ShuffleOperand {
  host::Shuffle how;
  uint64_t in, out;
  int argument;
};

void do_shuffle(Warp&, void* const* operands, const Site& site) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<ShuffleOperand*>(operands[lane]);
    if (!mine) continue;
    int from = lane;
    if (mine->how == host::Shuffle::from) from = mine->argument & 31;
    if (mine->how == host::Shuffle::exclusive_or) from = lane ^ mine->argument;
    if (mine->how == host::Shuffle::down) from = lane + mine->argument;
    if (from < 0 || from > 31) from = lane;  // as the hardware does
    if (!operands[from]) {
      throw Error("divergence", "shuffle at " + to_string(site) + ": lane " + std::to_string(lane) + " asks lane " +
                                    std::to_string(from) + ", which does not take part");
    }
    mine->out = static_cast<const ShuffleOperand*>(operands[from])->in;
  }
}

}  // namespace

uint64_t host::shuffle(Shuffle how, uint64_t value, int argument, uint32_t lanes, const Site& site) {
  ShuffleOperand operand{how, value, 0, argument};
  collective("shuffle", lanes, true, &operand, do_shuffle, site);
  return operand.out;
}

// --- memory ----------------------------------------------------------------------------------------------------

void host::global_read(const void* p, void* to, uint32_t bytes, const Site& site) {
  watched_read(current(), p, bytes, site);
  std::memcpy(to, p, bytes);
}

void host::global_write(void* p, const void* from, uint32_t bytes, const Site& site) {
  watched_write(current(), p, bytes, site);
  std::memcpy(p, from, bytes);
}

SharedArena::SharedArena() { current().arena_taken = 0; }

uint32_t host::shared_take(const char* name, uint32_t element_bytes, int64_t count, bool keep, const Site& site) {
  Thread& t = current();
  return t.home->shared.take(t.arena_taken++, name, element_bytes, static_cast<uint32_t>(count * element_bytes), keep,
                             site);
}

void host::shared_read(uint32_t address, void* to, uint32_t bytes, const Site& site) {
  Thread& t = current();
  t.home->shared.read(t, address, to, bytes, site);
  count_access(t, address, bytes, site);
}

void host::shared_write(uint32_t address, const void* from, uint32_t bytes, const Site& site) {
  Thread& t = current();
  t.home->shared.write(t, address, from, bytes, site);
  count_access(t, address, bytes, site);
}

void host::outside(int64_t first, int64_t end, int64_t count, uint32_t base, const Site& site) {
  throw Error("out of bounds", current().home->shared.describe(base) + " begins an array of " + std::to_string(count) +
                                   " elements, of which " + thread_name(current().thread) + " uses " +
                                   std::to_string(first) + " to " + std::to_string(end - 1) + " at " + to_string(site));
}

// --- asynchronous copies ---------------------------------------------------------------------------------------

namespace {

void land(Thread& t, const Copy& copy) {
  unsigned char bytes[16] = {};
  std::memcpy(bytes, copy.from, copy.valid);
  t.home->shared.put(copy.to, bytes, 16);
}

}  // namespace

void copy_async(uint32_t to, const void* from, int valid, Site site) {
  Thread& t = current();
  if (reinterpret_cast<uintptr_t>(from) % 16 || valid < 0 || valid > 16) {
    throw Error("misaligned", thread_name(t.thread) + " copies " + std::to_string(valid) + " of 16 bytes at " +
                                  to_string(site) + " from an address that is not a multiple of 16, or too many");
  }
  if (valid) watched_read(t, from, valid, site);
  t.home->shared.copy_begins(t, to, 16, site);
  t.uncommitted.push_back({to, from, valid, site});
  if (current_mode().landing == Landing::issue)
    land(t, t.uncommitted.back());
  else
    t.home->shared.poison(to, 16);
}

void copy_commit(Site site) {
  if (left_out("copy_commit", site)) return;
  Thread& t = current();
  t.groups.push_back(std::move(t.uncommitted));
  t.uncommitted.clear();
}

void host::wait_for_groups(int pending, const Site& site) {
  if (left_out("copy_wait", site, pending)) return;
  Thread& t = current();
  const std::size_t allowed = pending_groups(pending, site);
  while (t.groups.size() > allowed) {
    for (const Copy& copy : t.groups.front()) {
      if (current_mode().landing == Landing::wait) land(t, copy);
      t.home->shared.copy_lands(t, copy.to, 16, copy.site);
    }
    t.groups.pop_front();
  }
}

}  // namespace diffratio::ptx
