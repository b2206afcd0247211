// Which accesses are ordered. Each thread has a vector clock: for every thread of its block, the last synchronization
// of that thread that it is ordered after. Only barriers merge clocks. An access that is not ordered before another
// access to the same bytes, directly or through other threads, is a race, in any order of
// execution.
#pragma once

#include <cstdint>
#include <vector>

#include "error.h"

namespace simt {

using Clock = std::vector<uint32_t>;

inline void join(Clock& into, const Clock& from) {
  for (std::size_t i = 0; i < into.size(); ++i) into[i] = into[i] < from[i] ? from[i] : into[i];
}

// Who is accessing memory, and when.
struct Accessor {
  unsigned block = 0, thread = 0;
  uint32_t phase = 0;   // grid barriers passed
  uint32_t sample = 0;  // forget_shared() calls made
  Clock clock;
};

struct Access {
  uint32_t block = 0, thread = 0, clock = 0, phase = 0;
  Site site;

  Access() = default;
  Access(const Accessor& who, const Site& site)
      : block(who.block), thread(who.thread), clock(who.clock[who.thread]), phase(who.phase), site(site) {}

  // Whether this access is ordered before `who`.
  bool before(const Accessor& who) const { return block == who.block ? clock <= who.clock[thread] : phase < who.phase; }
};

// "thread 33 (warp 1, lane 1)"
inline std::string thread_name(uint32_t thread) {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / 32) + ", lane " +
         std::to_string(thread % 32) + ")";
}

}  // namespace simt
