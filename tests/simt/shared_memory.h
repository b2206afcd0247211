// A block's shared memory: bytes, their shadow, and the arrays that the kernel's arena allocates in it, with
// forbidden zones between.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shadow.h"

namespace simt {

class SharedMemory {
 public:
  static constexpr uint32_t window = 0x400;  // the first address: an offset from 0 is then no valid address
  static constexpr uint32_t redzone = 128;   // a multiple of all banks, so that statistics do not change

  // Poisoned: filled with NaN in every floating-point type.
  void reset(uint32_t bytes);

  // The n-th array of a thread: the same for all threads, otherwise an error. Returns its address.
  uint32_t take(uint32_t n, const char* name, uint32_t element_bytes, uint32_t bytes, bool keep, const Site& site);

  void read(const Accessor& who, uint32_t address, void* to, uint32_t bytes, const Site& site);
  void write(const Accessor& who, uint32_t address, const void* from, uint32_t bytes, const Site& site);
  void copy_begins(const Accessor& who, uint32_t address, uint32_t bytes, const Site& site);
  void copy_lands(const Accessor& who, uint32_t address, uint32_t bytes, const Site& site);
  // The bytes themselves, unchecked.
  void put(uint32_t address, const void* from, uint32_t bytes);
  void poison(uint32_t address, uint32_t bytes);

  std::string describe(uint32_t address) const;

 private:
  struct Array {
    std::string name;
    uint32_t begin, bytes, element_bytes;
    bool keep;
  };
  // The array in which [address, address + bytes) lies; an error if there is none, or the address is not aligned.
  const Array& array_at(const Accessor& who, uint32_t address, uint32_t bytes, const char* verb,
                        const Site& site) const;

  std::vector<unsigned char> bytes_;
  std::vector<Array> arrays_;
  uint32_t budget_ = 0, taken_ = 0;
  Shadow shadow_;
};

}  // namespace simt
