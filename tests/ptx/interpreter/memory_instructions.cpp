// Loads, stores, asynchronous copies, atomics and fences.
#include <algorithm>
#include <utility>

#include "machine.h"

namespace ptx {
namespace {

enum Space { global, shared, parameter };

// ld of a vector of E (in memory) to registers that hold D.
template <class E, class D, Space space>
void load(Warp& w, const Instruction& i, u32 m, Access how = Access::read) {
  const int vector = i.result_count;
  u32 n = sizeof(E) * vector;
  need_written(w, i, i.sources[0], m, "address");
  D t[4][32] = {};
  u64 addresses[32] = {};
  LANES if (m >> l & 1) {
    const u8* p;
    if (space == global) {
      u64 a = w.r<u64>(i.sources[0])[l] + s64(i.immediate);
      addresses[l] = a;
      p = global_at(w, i, l, a, n, how);
    } else if (space == shared) {
      u32 a = w.r<u32>(i.sources[0])[l] + i.immediate;
      addresses[l] = a;
      p = shared_at(w, i, l, a, n, false, l);
    } else {
      u64 a = w.r<u64>(i.sources[0])[l] + s64(i.immediate);
      if (a % n) fail("misaligned parameter: " + where(w, i, l));
      if (a + n > w.block->grid->parameters.size()) fail("parameter out of bounds: " + where(w, i, l));
      p = w.block->grid->parameters.data() + a;
    }
    for (int j = 0; j < vector; ++j) {
      E e;
      std::memcpy(&e, p + j * sizeof(E), sizeof(E));
      if constexpr (sizeof(D) == sizeof(E))
        std::memcpy(&t[j][l], &e, sizeof(E));
      else
        t[j][l] = D(e);
    }
  }
  if (space == global) count_global(i, addresses, m, n);
  if (space == shared) {
    u32 a[32];
    LANES a[l] = u32(addresses[l]);
    count_shared(i, a, m, n);
  }
  for (int j = 0; j < vector; ++j) put<D>(w, i.results[j], t[j], m, ~0u);
}

// st: the first source is the address, the others are the values.
template <class E, class D, Space space>
void store(Warp& w, const Instruction& i, u32 m) {
  const int vector = i.source_count - 1;
  u32 n = sizeof(E) * vector;
  need_written(w, i, i.sources[0], m, "address");
  for (int j = 0; j < vector; ++j) need_written(w, i, i.sources[1 + j], m, "value stored");
  u64 addresses[32] = {};
  LANES if (m >> l & 1) {
    u8* p;
    if (space == global) {
      u64 a = w.r<u64>(i.sources[0])[l] + s64(i.immediate);
      addresses[l] = a;
      p = global_at(w, i, l, a, n, Access::write);
    } else {
      u32 a = w.r<u32>(i.sources[0])[l] + i.immediate;
      addresses[l] = a;
      p = shared_at(w, i, l, a, n, true, l);
    }
    for (int j = 0; j < vector; ++j) std::memcpy(p + j * sizeof(E), &w.r<D>(i.sources[1 + j])[l], sizeof(E));
  }
  if (space == global)
    count_global(i, addresses, m, n);
  else {
    u32 a[32];
    LANES a[l] = u32(addresses[l]);
    count_shared(i, a, m, n);
  }
}

void read_source(Warp& w, const Instruction& i, int lane, u64 from, int valid) {
  if (valid == 16)
    global_at(w, i, lane, from, 16, Access::read);
  else
    for (int j = 0; j < valid; ++j) global_at(w, i, lane, from + j, 1, Access::read);
}

void fill(Block& b, u32 at, u64 from, int valid) {
  if (valid) std::memcpy(&b.shared[at], reinterpret_cast<const void*>(from), valid);
  std::memset(&b.shared[at + valid], 0, 16 - valid);
}

// "cp.async": cp-size bytes, of which the first src-size are read and the others are zeros; not ordered with anything
// before the issuing thread waits for it.
void land(Warp& w, const Copy& c) {
  Block& b = *w.block;
  const u32 at = c.to - options.shared_base;
  if (options.late_copies) {
    read_source(w, *c.instruction, c.lane, c.from, c.valid);  // the source may be read as late as this
    fill(b, at, c.from, c.valid);
  }
  b.in_flight[at / 16] = 0;
  shared_at(w, *c.instruction, c.lane, c.to, 16, true, c.lane, true);
}

void copy_async(Warp& w, const Instruction& i, u32 m) {
  Block& b = *w.block;
  need_written(w, i, i.sources[0], m, "address");
  need_written(w, i, i.sources[1], m, "address");
  if (i.source_count > 2) need_written(w, i, i.sources[2], m, "size");
  if (i.second != 16) fail("cp.async of other than 16 bytes: " + where(w, i, 0));
  u32 to[32] = {};
  u64 from[32] = {};
  u32 reading = 0;
  LANES if (m >> l & 1) {
    to[l] = w.r<u32>(i.sources[0])[l] + i.immediate;
    from[l] = w.r<u64>(i.sources[1])[l] + s64(s32(i.target));
    const int valid = i.source_count > 2 ? w.r<s32>(i.sources[2])[l] : 16;
    if (valid < 0 || valid > 16) fail("cp.async of more bytes than it has: " + where(w, i, l));
    if (from[l] % 16) fail("misaligned: source of cp.async, " + where(w, i, l));
    if (valid) {
      read_source(w, i, l, from[l], valid);
      reading |= 1u << l;
    } else if (!is_allocated(from[l])) {
      note("zero copy" + std::to_string(i.line) + w.kernel->name,
           "cp.async of no bytes from an address outside of all allocations: " + where(w, i, l));
    }
    shared_at(w, i, l, to[l], 16, true, l);  // checks bounds, alignment, races with earlier accesses, other copies
    const u32 at = to[l] - options.shared_base;
    if (options.late_copies)
      std::memset(&b.shared[at], 0xff, 16);
    else
      fill(b, at, from[l], valid);
    b.in_flight[at / 16] = (w.number << 6 | l) + 1;
    w.copies.push_back({to[l], from[l], valid, w.committed[l], l, &i});
  }
  count_shared(i, to, m, 16);
  count_global(i, from, reading, 16);
}

void copy_commit(Warp& w, u32 m) { LANES if (m >> l & 1)++ w.committed[l]; }

void copy_wait(Warp& w, const Instruction& i, u32 m) {
  size_t kept = 0;
  for (size_t j = 0; j < w.copies.size(); ++j) {
    const Copy c = w.copies[j];
    if ((m >> c.lane & 1) && s64(c.group) < s64(w.committed[c.lane]) - i.second)
      land(w, c);
    else
      w.copies[kept++] = c;
  }
  w.copies.resize(kept);
}

// --- marks: in test builds kernels mark the ends of arrays in shared memory (csrc/cuda/ptx.cuh) ---

// prefetchu.L1 of an address: an array ends there and `gap` unused bytes follow; an odd address: the array
// is not forgotten. Of zero: what this warp reads from now on must have been written since.
void mark(Warp& w, const Instruction& i, u32 m) {
  constexpr u32 gap = 128;
  const int lane = __builtin_ctz(m);
  const u64 address = w.r<u64>(i.sources[0])[lane];
  if (!address) {
    ++w.epoch;
    return;
  }
  Block& b = *w.block;
  const u32 end = static_cast<u32>(address & ~u64{15}) - options.shared_base;
  if (end <= b.marked_end && b.forbidden[end / 16]) return;  // another warp has marked it
  u32 gaps = 0;
  for (u32 j = 0; j < b.marked_end / 16; ++j) gaps += b.forbidden[j];
  if (end - gaps * 16 > w.block->grid->shared_bytes || end + gap > b.shared.size()) {
    fail("out of bounds: arrays of more shared memory than the launch has, " + where(w, i, lane));
  }
  std::fill_n(b.forbidden.begin() + end / 16, gap / 16, 1);
  if (address & 1) std::fill(b.kept.begin() + b.marked_end / 16, b.kept.begin() + end / 16, 1);
  b.marked_end = end + gap;
}

// --- atomics and fences: what is released by a fence before an atomic is acquired by a fence after another ---

void add(Warp& w, const LateAtomic& a) {
  *reinterpret_cast<u32*>(a.address) += a.value;
  join(w.block->grid->atomics[a.address], a.released);
}

// "membar", "fence": an atomic after it may release what this warp has observed, and what an atomic before it
// acquired is visible after it. Delayed atomics are done by now: this warp's, and those of warps that a
// barrier of the block has ordered before it.
void fence(Warp& w) {
  do_late_atomics(w);
  join(w.clocks, w.acquired);
  w.released = w.clocks;
  ++w.clocks[w.number];
}

// atom.add and red.add. If the result is unused, it may be done as late as the next fence; other blocks do not see it
// before.
void atomic_add(Warp& w, const Instruction& i, u32 m) {
  need_written(w, i, i.sources[0], m, "address");
  need_written(w, i, i.sources[1], m, "value");
  alignas(64) u32 t[32] = {};
  u64 addresses[32] = {};
  LANES if (m >> l & 1) {
    const u64 a = addresses[l] = w.r<u64>(i.sources[0])[l] + s64(i.immediate);
    const u32* p = reinterpret_cast<const u32*>(global_at(w, i, l, a, 4, Access::atomic));
    const LateAtomic mine{a, w.r<u32>(i.sources[1])[l], w.released};
    if (!i.result_is_read && options.late_atomics) {
      w.late_atomics.push_back(mine);
      continue;
    }
    for (LateAtomic& before : w.late_atomics) {  // a thread sees its own in order
      if (before.address == a) add(w, std::exchange(before, {a, 0, {}}));
    }
    t[l] = *p;
    join(w.acquired, w.block->grid->atomics[a]);
    add(w, mine);
  }
  count_global(i, addresses, m, 4);
  if (i.result_count) put<u32>(w, i.results[0], t, m, ~0u);
}

void load_acquire(Warp& w, const Instruction& i, u32 m) {
  need_written(w, i, i.sources[0], m, "address");
  alignas(64) u32 t[32] = {};
  LANES if (m >> l & 1) {
    const u64 a = w.r<u64>(i.sources[0])[l] + s64(i.immediate);
    t[l] = *reinterpret_cast<u32*>(global_at(w, i, l, a, 4, Access::atomic));
    join(w.clocks, w.block->grid->atomics[a]);
  }
  put<u32>(w, i.results[0], t, m, ~0u);
}

}  // namespace

void do_late_atomics(Warp& w) {
  for (std::vector<LateAtomic>* list : {&w.late_atomics, &w.block->late_atomics}) {
    for (const LateAtomic& a : *list) add(w, a);
    list->clear();
  }
}

#define H(...)                                                                                                   \
  Entry {                                                                                                        \
    []([[maybe_unused]] Warp& w, [[maybe_unused]] const Instruction& i, [[maybe_unused]] u32 m) { __VA_ARGS__; } \
  }

namespace {

// ld and st of elements of `bytes` bytes with these type names, in registers of D; with every vector length.
template <class E, class D>
void add_width(Table& t, const std::string& vector, std::initializer_list<const char*> types) {
  for (const std::string type : types) {
    for (const std::string space : {".global", ".global.cg", ".global.cs", ".global.ca", ".volatile.global"}) {
      t["ld" + space + vector + type] = H((load<E, D, global>(w, i, m)));
      t["st" + space + vector + type] = H((store<E, D, global>(w, i, m)));
    }
    t["ld.global.nc" + vector + type] = H((load<E, D, global>(w, i, m, Access::read_constant)));
    t["ld.shared" + vector + type] = H((load<E, D, shared>(w, i, m)));
    t["st.shared" + vector + type] = H((store<E, D, shared>(w, i, m)));
    t["ld.param" + vector + type] = H((load<E, D, parameter>(w, i, m)));
  }
}

}  // namespace

void add_memory(Table& t) {
  for (const std::string vector : {"", ".v2", ".v4"}) {
    add_width<u8, u32>(t, vector, {".u8", ".b8"});
    add_width<u16, u32>(t, vector, {".u16", ".b16"});
    add_width<u32, u32>(t, vector, {".u32", ".b32", ".s32", ".f32"});
    add_width<u64, u64>(t, vector, {".u64", ".b64", ".s64", ".f64"});
    t["ld.param" + vector + ".s8"] = H((load<int8_t, u32, parameter>(w, i, m)));
  }
  // into 64-bit registers: extended to the register's width
  t["ld.param.s8.64"] = H((load<int8_t, s64, parameter>(w, i, m)));
  t["ld.param.u8.64"] = H((load<u8, u64, parameter>(w, i, m)));
  t["ld.param.s32.64"] = H((load<s32, s64, parameter>(w, i, m)));
  t["ld.param.u32.64"] = H((load<u32, u64, parameter>(w, i, m)));
  t["ld.global.u32.64"] = H((load<u32, u64, global>(w, i, m)));
  t["ld.global.s32.64"] = H((load<s32, s64, global>(w, i, m)));
  t["cp.async.cg.shared.global"] = t["cp.async.ca.shared.global"] = H(copy_async(w, i, m));
  t["cp.async.commit_group"] = H(copy_commit(w, m));
  t["cp.async.wait_group"] = H(copy_wait(w, i, m));
  t["prefetchu.L1"] = H(mark(w, i, m));
  t["membar.gl"] = t["fence.acq_rel.gpu"] = t["fence.sc.gpu"] = H(fence(w));
  t["atom.global.add.u32"] = t["atom.add.u32"] = t["red.global.add.u32"] = H(atomic_add(w, i, m));
  t["ld.acquire.gpu.global.u32"] = {H(load_acquire(w, i, m)).handler, Kind::polling};
}

}  // namespace ptx
