// A shadow of some memory: for every two bytes, the last write and the reads since.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "clocks.h"

namespace simt {

class Shadow {
 public:
  // describe: "shared memory 0x1420, element 16 of 'a'" from an offset in bytes, for reports.
  using Describe = std::function<std::string(uint64_t)>;

  // initialized: whether the content may be read before it is written.
  void reset(uint64_t bytes, bool initialized, Describe describe);

  void read(const Accessor& who, uint64_t offset, uint64_t bytes, bool may_be_old, const Site& site);
  void write(const Accessor& who, uint64_t offset, uint64_t bytes, const Site& site);

  // An asynchronous copy writes at some time between the two; until then no access to its destination is allowed.
  void copy_begins(const Accessor& who, uint64_t offset, uint64_t bytes, const Site& site);
  void copy_lands(const Accessor& who, uint64_t offset, uint64_t bytes, const Site& site);

 private:
  struct Cell {
    Access write;
    std::vector<Access> reads;  // since the last write; only those that are not before another of them
    uint32_t sample = 0;        // of the last write
    bool written = false, initialized = false, in_flight = false;
  };

  void check_write(const Cell& cell, const Accessor& who, uint64_t offset, const Site& site, const char* what) const;
  [[noreturn]] void race(const Accessor& who, const char* now, const Site& site, const Access& other, const char* then,
                         uint64_t offset) const;

  std::vector<Cell> cells_;
  Describe describe_;
};

}  // namespace simt
