// The state of a launch: grid, blocks, warps, registers. Names in the handlers of instructions: w the warp, i the
// instruction, m the mask of lanes that execute it, l a lane.
#pragma once
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "program.h"

namespace ptx {

using Clocks = std::vector<u32>;  // a vector clock: for each warp of the grid, its latest known time

inline Clocks& join(Clocks& to, const Clocks& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (std::size_t j = 0; j < from.size(); ++j) to[j] = std::max(to[j], from[j]);
  return to;
}

// The last accesses of two bytes. Thread IDs are (warp << 6 | lane) + 1; lane 32 is the whole warp (ldmatrix: the ISA
// does not specify which lane reads).
struct Touch {
  u32 writer = 0, written = 0, reader = 0, read = 0, other_reader = 0, other_read = 0;
  u32 write_line = 0, read_line = 0;
  u32 epoch = 0;  // of the writer: the number of its forget_shared() calls
};

struct Block;

struct Copy {  // a cp.async in flight
  u32 to;
  u64 from;
  int valid;
  u32 group;
  int lane;
  const Instruction* instruction;
};

struct LateAtomic {  // an atomic addition that is not done yet
  u64 address;
  u32 value;
  Clocks released;
};

struct Group {  // lanes of a warp that are at the same instruction
  u32 pc, mask;
  bool blocked;
};

enum class State { running, at_barrier, done, at_named_barrier };

struct Warp {
  u8* registers = nullptr;
  std::vector<u32> written;  // bit masks of the registers
  Kernel* kernel = nullptr;
  Block* block = nullptr;
  u32 number = 0, index = 0;  // in the grid, in the block
  u32 live = 0;               // lanes that have not left
  std::vector<Group> groups;
  State state = State::running;
  u32 barrier_pc = 0;
  Clocks clocks, released, acquired;  // now; at the last fence; by atomics since
  std::vector<Copy> copies;
  std::vector<LateAtomic> late_atomics;
  u32 committed[32] = {};
  u32 epoch = 0;
  const Instruction* now = nullptr;
  std::unique_ptr<u8[]> storage;

  u32 clock() const { return clocks[number]; }
  template <class T>
  T* r(const Operand& o) {
    return reinterpret_cast<T*>(registers + o.offset);
  }
};

struct Grid {
  Kernel* kernel;
  int blocks, threads;
  u32 shared_bytes;
  std::vector<u8> parameters;
  u32 warps_per_block, warps;
  bool cooperative;
  u64 executed = 0;
  std::unordered_map<u64, Clocks> atomics;  // what was released at an address
};

struct NamedBarrier {  // bar.sync a, b and bar.arrive a, b
  u32 expected = 0, arrived = 0;
  Clocks clocks;
  std::vector<u32> waiting;
};

struct Block {
  Grid* grid;
  NamedBarrier named[16];
  int index;
  std::vector<Warp> warps;
  std::vector<u8> shared, valid;
  std::vector<Touch> touches;
  std::vector<u32> in_flight;            // for each 16 bytes, the thread that copies there
  std::vector<LateAtomic> late_atomics;  // of warps that have passed a barrier since
  std::vector<u8> forbidden;             // for each 16 bytes: between arrays, by a mark
  std::vector<u8> kept;                  // for each 16 bytes: not forgotten, by a mark
  u32 marked_end = 0;                    // of the arrays that marks have named
  bool done = false;
};

// "KERNEL, FILE:LINE (PTX line N `instruction`), block B warp W lane L"
std::string where(const Warp& w, const Instruction& i, int lane);
std::string thread_name(const Warp& w, u32 thread);
// A hazard that does not stop the launch; one note for each key.
void note(const std::string& key, const std::string& text);

#define LANES for (int l = 0; l < 32; ++l)

// --- memory.cpp: checked accesses ---

enum class Access { read, write, read_constant, atomic };

u8* shared_at(Warp& w, const Instruction& i, int lane, u32 address, u32 size, bool write, int as_lane,
              bool landing = false);
u8* global_at(Warp& w, const Instruction& i, int lane, u64 address, u32 size, Access how);
bool is_allocated(u64 address);
void forget_touches();  // at the start of a launch

// --- counting.cpp: statistics of an access of n bytes a lane ---

void count_shared(const Instruction& i, const u32* address, u32 mask, u32 n);
void count_global(const Instruction& i, const u64* address, u32 mask, u32 n);

// --- memory_instructions.cpp ---

void do_late_atomics(Warp& w);

// --- registers ---

inline void need_written(Warp& w, const Instruction& i, const Operand& o, u32 mask, const char* what) {
  const u32 missing = mask & ~w.written[o.mask];
  if (missing) fail(format("undefined register as %s: ", what) + where(w, i, __builtin_ctz(missing)));
}

// Lanes for which all sources are defined: a result is defined where they are.
inline u32 defined_sources(Warp& w, const Instruction& i) {
  u32 defined = ~0u;
  for (int j = 0; j < i.source_count; ++j) defined &= w.written[i.sources[j].mask];
  return defined;
}

template <class D>
void put(Warp& w, const Operand& o, const D* values, u32 mask, u32 defined) {
  D* d = w.r<D>(o);
  if (mask == ~0u) {
    std::memcpy(d, values, 32 * sizeof(D));
  } else {
    LANES if (mask >> l & 1) d[l] = values[l];
  }
  w.written[o.mask] = (w.written[o.mask] & ~mask) | (defined & mask);
}
inline u32& predicate(Warp& w, const Operand& o) { return *reinterpret_cast<u32*>(w.registers + o.offset); }
inline void put_predicate(Warp& w, const Operand& o, u32 value, u32 mask, u32 defined) {
  u32& p = predicate(w, o);
  p = (p & ~mask) | (value & mask);
  w.written[o.mask] = (w.written[o.mask] & ~mask) | (defined & mask);
}

// --- tables of instructions, one for each file of handlers ---

using Table = std::unordered_map<std::string, Entry>;
void add_arithmetic(Table& table);
void add_conversions(Table& table);
void add_memory(Table& table);
void add_warp_operations(Table& table);

}  // namespace ptx
