// A GPU's threads, warps and blocks, and the scheduler that runs them.
//
// Each thread has its own stack and runs until it must wait for others; then the schedule selects the next thread.
#pragma once

#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "clocks.h"
#include "context.h"
#include "error.h"
#include "shared_memory.h"

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
// Of the current thread.
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __launch_bounds__(...)

namespace simt {

// forward, backward: threads in turn, each until it waits, in ascending or descending order.
// ahead: one warp as far as possible before the next warp starts.
enum class Schedule { forward, backward, ahead };
// When an asynchronous copy completes: at once, or only at its wait.
enum class Landing { issue, wait };

struct Mode {
  Schedule schedule = Schedule::forward;
  Landing landing = Landing::issue;
};
constexpr Mode modes[] = {{Schedule::forward, Landing::issue},  {Schedule::forward, Landing::wait},
                          {Schedule::backward, Landing::issue}, {Schedule::backward, Landing::wait},
                          {Schedule::ahead, Landing::issue},    {Schedule::ahead, Landing::wait}};
std::string to_string(Mode mode);  // "forward/issue"

struct Launch {
  const char* kernel;  // for reports
  Dim3 grid;
  unsigned threads;           // of a block, a multiple of 32
  uint32_t shared_bytes = 0;  // of dynamic shared memory, as the launcher computes them
  bool cooperative = false;   // all blocks alive at once, so that they may wait for one another
};

// Runs a kernel: body() once per thread. Throws Error at the first error.
void launch(const Launch& launch, Mode mode, const std::function<void()>& body);

// --- building blocks of the operations of ptx_host.h -----------------------------------------------------------

struct Block;

struct Copy {
  uint32_t to;
  const void* from;
  int valid;
  Site site;
};

struct Thread : Accessor {
  Block* home = nullptr;
  Context context;
  bool waiting = false, exited = false;
  const char* waits_for = nullptr;  // reason and place, while waiting
  Site waits_at;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
  uint32_t arena_taken = 0;  // arrays taken so far

  unsigned lane() const { return thread % 32; }
};

// A point that a number of threads must reach. Everything before it in any of these threads happens before everything
// after it in the threads that wait.
struct Barrier {
  unsigned expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
  Site place;  // of the first to arrive
  Clock heard;
};

// Lanes in an operation of a whole warp; the last lane to arrive executes it for all.
struct Collective {
  const char* operation = nullptr;
  uint32_t expected = 0, arrived = 0;  // sets of lanes
  Site place;
  void* operands[32] = {};  // on the lanes' stacks
};

struct Warp {
  Barrier barrier;
  Collective collective;
  Thread* lanes[32];
};

struct Block {
  Dim3 index;
  unsigned number;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  Barrier barriers[16], grid;
  SharedMemory shared;
};

// The current thread and its launch.
Thread& current();
Mode current_mode();

// wait: otherwise only arrives. same_place: all arrivals must come from one line of the source.
void arrive(Barrier& barrier, unsigned expected, bool wait, bool same_place, const char* operation, const Site& site);
void arrive_at_grid(const Site& site);

// Runs work(warp, operands) once, with an operand from each of `lanes`, when all have arrived.
using Work = void (*)(Warp& warp, void* const* operands, const Site& site);
void collective(const char* operation, uint32_t lanes, bool same_place, void* operand, Work work, const Site& site);

inline Warp& warp_of(Thread& thread) { return thread.home->warps[thread.thread / 32]; }

}  // namespace simt
