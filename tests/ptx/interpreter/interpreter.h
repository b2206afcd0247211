// Executes PTX on the CPU, a warp of 32 lanes at a time, and checks every instruction. It is called by the
// stand-in for the CUDA runtime (../runtime). Errors are std::runtime_error with a report of several lines.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

enum class Schedule { forward, backward, random };  // warps and blocks in order, in reverse, in turns of random length

struct Options {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 1;
  bool late_copies = true;   // cp.async completes only at its wait; else at once
  bool late_atomics = true;  // an atomic whose result is unused is done only at a fence; else at once
  bool approximate = false;  // approximations are off by up to what the ISA allows, at random; else exact to fp32
  bool coarse_sums = false;  // mma: fp32 sums of four products, truncated; else exact sums, one rounding
  bool races = true;         // detect races
  bool statistics = false;   // count executions, bank conflicts, sectors
  uint32_t shared_base = 1024 + 128;  // where dynamic shared memory begins: a multiple of 128 and of no more
};
extern Options options;

// --- global memory: every access is checked against these allocations ---

// 512-byte aligned, filled with 0xff, with forbidden bytes around it. Bytes that are not `valid` may not be read
// before they are written.
void* allocate(uint64_t bytes, const char* name, bool valid);
// Memory that the caller owns, until it is released.
void adopt(void* memory, uint64_t bytes, const char* name, bool valid);
void release(void* allocation);
// Splits an allocation at these offsets into separate allocations.
void split(void* allocation, const uint64_t* offsets, int count);
void set_valid(void* bytes, uint64_t count);
uint64_t count_invalid(const void* bytes, uint64_t count);

// --- programs ---

struct Kernel;
struct Module {
  std::map<std::string, std::shared_ptr<Kernel>> kernels;
};
std::shared_ptr<Module> load_module(const std::string& text, const std::string& name);
void launch(Kernel& kernel, int blocks, int threads, uint32_t shared_bytes, void** arguments, bool cooperative);

// --- what was executed ---

struct Statistic {
  std::string kernel, instruction, place;    // place: FILE:LINE of the source, where the PTX has it
  int line;                                  // of the PTX
  uint64_t warps, lanes;                     // executions, active lanes
  uint64_t accesses, wavefronts, fewest;     // shared memory: instructions, wavefronts, the fewest possible
  uint64_t requests, sectors, lines, bytes;  // global memory: instructions, 32-byte sectors, 128-byte lines, bytes
};
std::vector<Statistic> take_statistics(Kernel& kernel);  // and sets them to zero
std::vector<std::string> take_notes();                   // hazards that do not stop a launch

// --- mutation: synchronizations (barriers, commits, waits, fences) by the source line that requests them ---

struct Synchronization {
  std::string place;      // FILE:LINE, or "PTX line N"
  std::string operation;  // the instruction
  uint64_t executions;    // since statistics were last taken
};
std::vector<Synchronization> synchronizations(Kernel& kernel);
void remove_synchronization(Kernel& kernel, const std::string& place, const std::string& operation);
void weaken_wait(Kernel& kernel, const std::string& place);  // wait for one group fewer
void restore(Kernel& kernel);

}  // namespace ptx
