// A parsed kernel.
#pragma once
#include <cstdio>
#include <stdexcept>

#include "interpreter.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s32 = int32_t;
using s64 = int64_t;

[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error(text); }

template <class... Arguments>
std::string format(const char* pattern, Arguments... arguments) {
  char buffer[2000];
  std::snprintf(buffer, sizeof buffer, pattern, arguments...);
  return buffer;
}

// A register of a warp: its 32 values, and the bit mask of lanes that have written it.
struct Operand {
  u32 offset = 0;  // bytes into the warp's registers
  u32 mask = 0;    // index of the bit mask
};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32 mask);

enum class Kind : u8 { ordinary, branch, leave, block_barrier, warp_barrier, collective, polling };

struct Instruction {
  Handler handler = nullptr;
  Kind kind = Kind::ordinary;
  bool guarded = false, negated = false;
  Operand guard;
  Operand results[4], sources[10];
  u8 result_count = 0, source_count = 0;
  bool result_is_read = true;  // of an atomic
  s32 immediate = 0;           // an address's offset, or a barrier's number
  s32 second = 0;              // cp.async's size, a wait's count
  u32 target = 0;              // of a branch; cp.async: the source address's offset
  int line = 0;                // of the PTX
  const char* text = "";
  const char* place = "";  // FILE:LINE of the source
  mutable u64 warps = 0, lanes = 0, accesses = 0, wavefronts = 0, fewest = 0;
  mutable u64 requests = 0, sectors = 0, lines = 0, bytes = 0;
};

struct Constant {
  Operand operand;
  u64 value;
  bool wide;  // 64 bits
};

struct Kernel {
  std::string name, module;
  std::vector<Instruction> instructions;
  std::vector<std::pair<u32, u32>> parameters;  // offset, size
  u32 parameter_bytes = 0, register_bytes = 0, register_count = 0;
  std::vector<Constant> constants;
  std::vector<std::pair<Operand, std::string>> specials;
  int most_threads = 0;
  bool has_marks = false;                                    // of arrays in shared memory: see memory_instructions.cpp
  std::vector<std::unique_ptr<std::string>> strings;         // what `text` and `place` point to
  std::vector<std::pair<std::size_t, Instruction>> changed;  // by a mutation: index, original

  const char* keep(const std::string& text) {
    strings.push_back(std::make_unique<std::string>(text));
    return strings.back()->c_str();
  }
};

// Implementation of an instruction, in the tables of machine.h.
struct Entry {
  Handler handler;
  Kind kind = Kind::ordinary;
};

}  // namespace ptx
