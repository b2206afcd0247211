#include "shared_memory.h"

#include <cstdio>
#include <cstring>

namespace simt {

namespace {
constexpr uint32_t most_arrays = 64;
uint32_t round16(uint32_t bytes) { return (bytes + 15) / 16 * 16; }
}  // namespace

void SharedMemory::reset(uint32_t bytes) {
  budget_ = bytes;
  taken_ = 0;
  arrays_.clear();
  bytes_.assign(bytes + (most_arrays + 1) * redzone, 0xff);
  shadow_.reset(bytes_.size(), false, [this](uint64_t offset) { return describe(window + offset); });
}

uint32_t SharedMemory::take(uint32_t n, const char* name, uint32_t element_bytes, uint32_t bytes, bool keep,
                            const Site& site) {
  if (n < arrays_.size()) {
    const Array& a = arrays_[n];
    if (a.name != name || a.bytes != bytes || a.keep != keep) {
      throw Error("arena", "threads of a block take different arrays: '" + a.name + "' and '" + name + "' at " +
                               to_string(site));
    }
    return a.begin;
  }
  taken_ += round16(bytes);
  if (taken_ > budget_ || n >= most_arrays) {
    throw Error("arena", "'" + std::string(name) + "' at " + to_string(site) + " makes it " + std::to_string(taken_) +
                             " bytes of shared memory in " + std::to_string(n + 1) + " arrays, the launch gave " +
                             std::to_string(budget_));
  }
  // The address without redzones, plus a multiple of all banks.
  const uint32_t begin = window + taken_ - round16(bytes) + (n + 1) * redzone;
  arrays_.push_back({name, begin, bytes, element_bytes, keep});
  return begin;
}

std::string SharedMemory::describe(uint32_t address) const {
  char text[32];
  std::snprintf(text, sizeof text, "shared memory 0x%x", address);
  for (const Array& a : arrays_) {
    if (address - a.begin < a.bytes) {
      return text + std::string(", element ") + std::to_string((address - a.begin) / a.element_bytes) + " of '" +
             a.name + "'";
    }
  }
  const Array* before = nullptr;
  for (const Array& a : arrays_) {
    if (a.begin <= address) before = &a;
  }
  return before ? text + std::string(", ") + std::to_string(address - before->begin - before->bytes) +
                      " bytes past the end of '" + before->name + "'"
                : text + std::string(", in no array");
}

const SharedMemory::Array& SharedMemory::array_at(const Accessor& who, uint32_t address, uint32_t bytes,
                                                  const char* verb, const Site& site) const {
  const auto report = [&](const char* kind) {
    return Error(kind, describe(address) + ": " + thread_name(who.thread) + " " + verb + " " + std::to_string(bytes) +
                           " bytes at " + to_string(site));
  };
  if (address % bytes) throw report("misaligned");
  for (const Array& a : arrays_) {
    if (address >= a.begin && address + bytes <= a.begin + a.bytes) return a;
  }
  throw report("out of bounds");
}

void SharedMemory::read(const Accessor& who, uint32_t address, void* to, uint32_t bytes, const Site& site) {
  const Array& a = array_at(who, address, bytes, "reads", site);
  shadow_.read(who, address - window, bytes, a.keep, site);
  std::memcpy(to, &bytes_[address - window], bytes);
}

void SharedMemory::write(const Accessor& who, uint32_t address, const void* from, uint32_t bytes, const Site& site) {
  array_at(who, address, bytes, "writes", site);
  shadow_.write(who, address - window, bytes, site);
  std::memcpy(&bytes_[address - window], from, bytes);
}

void SharedMemory::copy_begins(const Accessor& who, uint32_t address, uint32_t bytes, const Site& site) {
  array_at(who, address, bytes, "copies", site);
  shadow_.copy_begins(who, address - window, bytes, site);
}

void SharedMemory::copy_lands(const Accessor& who, uint32_t address, uint32_t bytes, const Site& site) {
  shadow_.copy_lands(who, address - window, bytes, site);
}

void SharedMemory::put(uint32_t address, const void* from, uint32_t bytes) {
  std::memcpy(&bytes_[address - window], from, bytes);
}

void SharedMemory::poison(uint32_t address, uint32_t bytes) { std::memset(&bytes_[address - window], 0xff, bytes); }

}  // namespace simt
