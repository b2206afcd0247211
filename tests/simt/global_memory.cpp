#include "global_memory.h"

#include <list>

#include "shadow.h"

namespace simt {
namespace {

struct Range {
  const Watch* owner;
  uintptr_t begin;
  uint64_t bytes;
  std::string name;
  Shadow shadow;

  void reset() {
    shadow.reset(bytes, true, [this](uint64_t offset) {
      return "global memory, byte " + std::to_string(offset) + " of '" + name + "'";
    });
  }
};
std::list<Range> ranges;

Range* find(const void* p, uint32_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  for (Range& range : ranges) {
    if (address < range.begin + range.bytes && address + bytes > range.begin) {
      if (address < range.begin || address + bytes > range.begin + range.bytes) {
        throw Error("out of bounds", "global memory: an access reaches across an end of '" + range.name + "'");
      }
      return &range;
    }
  }
  return nullptr;
}

void check_alignment(const Accessor& who, const void* p, uint32_t bytes, const Site& site) {
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(p) % bytes) {
    throw Error("misaligned", thread_name(who.thread) + " accesses " + std::to_string(bytes) +
                                  " bytes of global memory at " + to_string(site));
  }
}

}  // namespace

Watch::Watch(const void* memory, uint64_t bytes, const char* name) {
  ranges.push_back({this, reinterpret_cast<uintptr_t>(memory), bytes, name, {}});
  ranges.back().reset();
}

Watch::~Watch() {
  ranges.remove_if([this](const Range& range) { return range.owner == this; });
}

void forget_watched_accesses() {
  for (Range& range : ranges) range.reset();
}

void watched_read(const Accessor& who, const void* p, uint32_t bytes, const Site& site) {
  check_alignment(who, p, bytes, site);
  if (Range* range = find(p, bytes)) {
    range->shadow.read(who, reinterpret_cast<uintptr_t>(p) - range->begin, bytes, true, site);
  }
}

void watched_write(const Accessor& who, const void* p, uint32_t bytes, const Site& site) {
  check_alignment(who, p, bytes, site);
  if (Range* range = find(p, bytes)) {
    range->shadow.write(who, reinterpret_cast<uintptr_t>(p) - range->begin, bytes, site);
  }
}

}  // namespace simt
