// Global memory that a test watches: races between threads and blocks, as in shared memory. Only accesses through
// ptx::load, store, load16, store16 and copy_async are checked.
#pragma once

#include <cstdint>

#include "clocks.h"

namespace simt {

// Watches these bytes as long as it lives and one launch after the other; a launch orders everything before it.
class Watch {
 public:
  Watch(const void* memory, uint64_t bytes, const char* name);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
};

void forget_watched_accesses();  // at the start of a launch

// Also check that a multiple of `bytes` (a power of two) is accessed.
void watched_read(const Accessor& who, const void* p, uint32_t bytes, const Site& site);
void watched_write(const Accessor& who, const void* p, uint32_t bytes, const Site& site);

}  // namespace simt
