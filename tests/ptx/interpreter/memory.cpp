// Global and shared memory: bounds, alignment, uninitialized reads, and races by vector clocks of warps, two bytes at
// a time.
#include <algorithm>
#include <cstdlib>
#include <set>

#include "machine.h"

namespace ptx {

Options options;

namespace {

struct Allocation {
  u64 base, size;
  std::string name;
  std::vector<u8> valid;
  std::vector<Touch> touches;
  std::vector<u8> constant;  // for each two bytes: read by ld.global.nc in this launch
  void* owner;               // to free; null for a part of another allocation
};

std::map<u64, std::unique_ptr<Allocation>> allocations;

struct {
  Allocation* allocation = nullptr;
} latest;  // the allocation that was found last

std::vector<std::string> notes;
std::set<std::string> noted;

Allocation* find(u64 address) {
  auto it = allocations.upper_bound(address);
  if (it == allocations.begin()) return nullptr;
  Allocation* a = std::prev(it)->second.get();
  return address < a->base + a->size ? a : nullptr;
}

Allocation* allocation_of(u64 address, u64 size) {
  const auto inside = [&](const Allocation* a) {
    return a && address >= a->base && address + size <= a->base + a->size;
  };
  if (inside(latest.allocation)) return latest.allocation;
  Allocation* a = find(address);
  if (!inside(a)) return nullptr;
  return latest.allocation = a;
}

// Calls visit(allocation, offset, bytes) for the parts of a range.
template <class Visit>
void visit_range(u64 at, u64 count, Visit visit) {
  while (count) {
    Allocation* a = find(at);
    if (!a) fail("a range outside of all allocations");
    const u64 n = std::min(count, a->base + a->size - at);
    visit(*a, at - a->base, n);
    at += n, count -= n;
  }
}

// --- races ---

// Whether an earlier access by `thread` at its clock `at` is ordered before what (w, lane) does now.
bool ordered(const Warp& w, int lane, u32 thread, u32 at) {
  if (!thread) return true;
  const u32 warp = (thread - 1) >> 6;
  if (warp == w.number) return ((thread - 1) & 63) == static_cast<u32>(lane) || at < w.clocks[warp];
  return w.clocks[warp] >= at;
}

[[noreturn]] void race(const Warp& w, const Instruction& i, int lane, const char* what, const std::string& place,
                       u32 thread, u32 line, const char* did) {
  const auto& all = w.kernel->instructions;
  const auto other =
      std::find_if(all.begin(), all.end(), [&](const auto& o) { return o.line == static_cast<int>(line); });
  const std::string source = other != all.end() && *other->place ? std::string(other->place) + ", " : "";
  fail("race: " + where(w, i, lane) + "\n  " + what + " " + place + "\n  " + thread_name(w, thread) + " " + did +
       " it at " + source + format("PTX line %u", line) + "\n  and nothing orders the two");
}

template <class Place>
void touch_read(Touch& t, const Warp& w, const Instruction& i, int lane, const Place& place) {
  const u32 now = w.clock();
  u32 me = (w.number << 6 | lane) + 1;
  if (!ordered(w, lane, t.writer, t.written)) race(w, i, lane, "reads", place(), t.writer, t.write_line, "wrote");
  if (t.reader && (t.reader - 1) >> 6 != w.number) {
    t.other_reader = t.reader, t.other_read = t.read;
  } else if (t.reader && t.read == now && t.reader != me) {
    me = (w.number << 6 | 32) + 1;  // several lanes
  }
  t.reader = me, t.read = now, t.read_line = i.line;
}

template <class Place>
void touch_write(Touch& t, const Warp& w, const Instruction& i, int lane, const Place& place) {
  if (!ordered(w, lane, t.writer, t.written)) race(w, i, lane, "writes", place(), t.writer, t.write_line, "wrote");
  if (!ordered(w, lane, t.reader, t.read)) race(w, i, lane, "writes", place(), t.reader, t.read_line, "read");
  if (!ordered(w, lane, t.other_reader, t.other_read))
    race(w, i, lane, "writes", place(), t.other_reader, t.read_line, "read");
  t.writer = (w.number << 6 | lane) + 1, t.written = w.clock(), t.write_line = i.line, t.epoch = w.epoch;
}

// The entries of two bytes each that an access covers.
u64 first_pair(u64 at) { return at / 2; }
u64 end_pair(u64 at, u64 size) { return std::max(at / 2 + 1, (at + size) / 2); }

}  // namespace

void* allocate(u64 bytes, const char* name, bool valid) {
  const u64 total = (bytes + 511) / 512 * 512 + 1024;
  u8* raw = static_cast<u8*>(std::aligned_alloc(512, total));
  std::memset(raw, 0xff, total);
  auto a = std::make_unique<Allocation>();
  a->base = reinterpret_cast<u64>(raw) + 512;
  a->size = bytes;
  a->name = name;
  a->valid.assign(bytes, valid);
  a->owner = raw;
  void* result = reinterpret_cast<void*>(a->base);
  allocations[a->base] = std::move(a);
  return result;
}

void adopt(void* memory, u64 bytes, const char* name, bool valid) {
  auto a = std::make_unique<Allocation>();
  a->base = reinterpret_cast<u64>(memory);
  a->size = bytes;
  a->name = name;
  a->valid.assign(bytes, valid);
  a->owner = nullptr;
  latest = {};
  allocations[a->base] = std::move(a);
}

void release(void* allocation) {
  auto it = allocations.find(reinterpret_cast<u64>(allocation));
  if (it == allocations.end()) return;
  latest = {};
  void* owner = it->second->owner;
  u64 end = it->second->base + it->second->size;
  it = allocations.erase(it);
  while (it != allocations.end() && !it->second->owner && it->second->base == end) {  // the parts of a split
    end = it->second->base + it->second->size;
    it = allocations.erase(it);
  }
  std::free(owner);
}

void split(void* allocation, const u64* offsets, int count) {
  const auto it = allocations.find(reinterpret_cast<u64>(allocation));
  if (it == allocations.end()) fail("split of what is no allocation");
  latest = {};
  Allocation& a = *it->second;
  std::set<u64> at(offsets, offsets + count);
  at.insert(a.size);
  at.erase(0);
  u64 begin = 0;
  const std::vector<u8> valid = a.valid;
  for (u64 end : at) {
    if (begin == 0) {
      a.size = end;
      a.valid.resize(end);
    } else {
      auto part = std::make_unique<Allocation>();
      part->base = a.base + begin;
      part->size = end - begin;
      part->name = a.name + "+" + std::to_string(begin);
      part->valid.assign(valid.begin() + begin, valid.begin() + end);
      part->owner = nullptr;
      const u64 base = part->base;
      allocations[base] = std::move(part);
    }
    begin = end;
  }
}

void set_valid(void* bytes, u64 count) {
  visit_range(reinterpret_cast<u64>(bytes), count,
              [](Allocation& a, u64 at, u64 n) { std::memset(a.valid.data() + at, 1, n); });
}

u64 count_invalid(const void* bytes, u64 count) {
  u64 missing = 0;
  visit_range(reinterpret_cast<u64>(bytes), count, [&](Allocation& a, u64 at, u64 n) {
    missing += std::count(a.valid.begin() + at, a.valid.begin() + at + n, 0);
  });
  return missing;
}

bool is_allocated(u64 address) { return find(address) != nullptr; }

void forget_touches() {
  for (auto& [base, a] : allocations) a->touches.clear(), a->constant.clear();
}

void note(const std::string& key, const std::string& text) {
  if (noted.insert(key).second && notes.size() < 200) notes.push_back(text);
}

std::vector<std::string> take_notes() {
  noted.clear();
  return std::exchange(notes, {});
}

std::string where(const Warp& w, const Instruction& i, int lane) {
  const std::string place = *i.place ? std::string(i.place) + ", " : "";
  return w.kernel->name + "\n  at " + place + format("PTX line %d `%s`", i.line, i.text) +
         format("\n  block %d warp %u lane %d", w.block->index, w.index, lane);
}

std::string thread_name(const Warp& w, u32 thread) {
  --thread;
  const u32 warp = thread >> 6, lane = thread & 63, per_block = w.block->grid->warps_per_block;
  return format("block %u warp %u lane ", warp / per_block, warp % per_block) +
         (lane == 32 ? "(all)" : std::to_string(lane));
}

u8* shared_at(Warp& w, const Instruction& i, int lane, u32 address, u32 size, bool write, int as_lane, bool landing) {
  Block& b = *w.block;
  if (address % size) {
    fail("misaligned: shared memory, " + where(w, i, lane) + format("\n  address 0x%x, size %u", address, size));
  }
  const u32 at = address - options.shared_base;
  if (address < options.shared_base || at + size > b.shared.size()) {
    fail("out of bounds: shared memory, " + where(w, i, lane) +
         format("\n  offset 0x%x of %zu, size %u", at, b.shared.size(), size));
  }
  for (u32 j = at / 16; j <= (at + size - 1) / 16; ++j) {
    if (b.forbidden[j]) fail("out of bounds: between arrays of shared memory, " + where(w, i, lane));
    if (landing || !b.in_flight[j]) continue;
    fail("copy in flight: " + where(w, i, lane) + format("\n  touches shared memory 0x%x, where ", at) +
         thread_name(w, b.in_flight[j]) + " copies to");
  }
  if (options.races) {
    const auto place = [&] { return format("shared memory 0x%x", at); };
    for (u64 j = first_pair(at); j < end_pair(at, size); ++j) {
      if (write)
        touch_write(b.touches[j], w, i, as_lane, place);
      else
        touch_read(b.touches[j], w, i, as_lane, place);
    }
  }
  for (u64 j = first_pair(at); options.races && w.epoch && j < end_pair(at, size); ++j) {
    if (!write && b.touches[j].epoch < w.epoch && !b.kept[at / 16]) {
      fail("stale: of an earlier sample, shared memory, " + where(w, i, lane) + format("\n  offset 0x%x", at));
    }
  }
  if (write) {
    std::memset(&b.valid[at], 1, size);
  } else if (std::memchr(&b.valid[at], 0, size)) {
    fail("uninitialized: shared memory, " + where(w, i, lane) + format("\n  offset 0x%x, size %u", at, size));
  }
  return &b.shared[at];
}

u8* global_at(Warp& w, const Instruction& i, int lane, u64 address, u32 size, Access how) {
  if (address % size) {
    fail("misaligned: global memory, " + where(w, i, lane) + format("\n  address 0x%lx, size %u", address, size));
  }
  Allocation* a = allocation_of(address, size);
  if (!a) {
    std::string near;
    const auto it = allocations.upper_bound(address);
    if (it != allocations.begin()) {
      const Allocation& p = *std::prev(it)->second;
      near = format(", %lu bytes into %s of %lu", address - p.base, p.name.c_str(), p.size);
    }
    fail("out of bounds: global memory, " + where(w, i, lane) + format("\n  address 0x%lx, size %u", address, size) +
         near);
  }
  const u64 at = address - a->base;
  const auto place = [&] { return format("%s + %lu", a->name.c_str(), at); };
  if (options.races && how != Access::atomic) {
    if (a->touches.empty()) a->touches.resize((a->size + 3) / 2), a->constant.assign((a->size + 3) / 2, 0);
    for (u64 j = first_pair(at); j < end_pair(at, size); ++j) {
      if (how == Access::write) {
        if (a->constant[j]) fail("not constant: " + where(w, i, lane) + "\n  writes " + place());
        touch_write(a->touches[j], w, i, lane, place);
        continue;
      }
      if (how == Access::read_constant) {
        if (a->touches[j].writer) fail("not constant: " + where(w, i, lane) + "\n  reads " + place());
        a->constant[j] = 1;
      }
      touch_read(a->touches[j], w, i, lane, place);
    }
  }
  if (how == Access::write) {
    std::memset(&a->valid[at], 1, size);
  } else if (std::memchr(&a->valid[at], 0, size)) {
    fail("uninitialized: global memory, " + where(w, i, lane) + "\n  " + place() + format(", size %u", size));
  }
  return reinterpret_cast<u8*>(address);
}

}  // namespace ptx
